//! The service on real parts: PostgreSQL, a database a test; Apache Kafka (or, without Java and
//! Maven, the embedded broker), topics and consumer group a test. The parts are started once a run.

#![expect(clippy::disallowed_methods, reason = "a test looks at the database by itself")]

mod support;

mod admin;
mod admin_access;
mod admin_relay;
mod adoption;
mod bad_requests;
mod commands;
mod commit_in_doubt;
mod connections;
mod database_settings;
mod grpc;
mod grpc_sessions;
mod grpc_tls;
mod hang_ups;
mod housekeeping;
mod http;
mod listeners;
mod registration;
mod relay;
mod relay_deaths;
mod relay_fencing;
mod relay_implicit_acknowledgement;
mod relay_parked;
mod relay_replay;
mod replicas;
mod replies;
mod saga_suite;
mod sagas;
mod schema;
mod secrets;
mod session_cookies;
mod session_time;
mod sessions;
mod sign_in;
mod sign_in_names;
mod sign_in_traces;
mod tasks;
mod verify;

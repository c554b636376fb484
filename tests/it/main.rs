//! The service on real parts: PostgreSQL, a database a test; Apache Kafka (or, without Java and
//! Maven, the embedded broker), topics and consumer group a test. The parts are started once a run.

mod support;

mod bad_requests;
mod commit_in_doubt;
mod http;
mod registration;
mod relay;
mod sagas;
mod sessions;
mod sign_in;

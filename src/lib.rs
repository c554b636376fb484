//! auth-service: registrations that never get lost or left half-done.

pub mod accounts;
pub mod admin;
pub mod app;
pub mod cli;
pub mod config;
pub mod crypto;
pub mod db;
#[cfg(feature = "dev")]
pub mod dev;
pub mod domain;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod grpc;
pub mod health;
pub mod housekeeping;
pub mod http;
pub mod migrations;
mod outbox_command;
pub mod participants;
pub mod server;
pub mod sessions;
pub mod shutdown;
pub mod telemetry;
pub mod user_client;

//! The whole system on one machine, with nothing to install: a private PostgreSQL, an in-process
//! Kafka-compatible broker and a small reference `user-service`.
//!
//! None of this is in the production image: the cargo feature `dev` brings it.

pub mod broker;
mod command;
pub mod demo;
pub mod forward;
mod ledger;
pub mod postgres;
pub mod system;
pub mod user_service;

pub use command::{DevArgs, UserServiceArgs, run, run_user_service};

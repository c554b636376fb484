//! Opens to `tests/fuzz` what this crate reads of bytes that others wrote. No part of its interface.

use std::collections::BTreeMap;

use axum::Router;
use chrono::DateTime;
use metrics_exporter_prometheus::PrometheusHandle;

use crate::{
    app::App,
    config::{Config, ConfigError, environment},
    dev::user_service::{
        commands::{Answer, Command},
        profiles::Decided,
    },
    grpc,
};

/// What the roles share, without any role running.
pub fn app(config: Config, metrics: PrometheusHandle) -> anyhow::Result<App> {
    App::build(config, metrics)
}

/// The gRPC services but the one for health, and what surrounds them.
pub fn grpc(app: &App) -> Result<Router, grpc::GrpcError> {
    grpc::router(app)
}

/// Variables of an `.env` file, and what is wrong with it.
pub fn dotenv(bytes: &[u8]) -> (BTreeMap<String, String>, Vec<ConfigError>) {
    environment::read_dotenv(bytes)
}

/// The answer of the reference user-service to a command.
#[derive(Debug)]
pub struct Answered {
    /// Its headers.
    pub headers: Vec<(&'static str, String)>,
    /// Its value.
    pub value: String,
}

/// A command as the reference user-service reads it: its answer, or what is wrong with it.
pub fn command(topic: &str, headers: &BTreeMap<String, String>, payload: Option<&[u8]>) -> Result<Answered, String> {
    let command = Command::read(topic, headers, payload)?;
    let answer = Answer::to(&command, &Decided { refusal: None, at: DateTime::UNIX_EPOCH });
    Ok(Answered { headers: answer.headers, value: answer.payload })
}

//! The configuration: environment variables, read once, every error reported at once.
//!
//! `.env.example` lists the variables with their defaults; a test holds the two together.

mod admin;
mod database;
pub(crate) mod environment;
mod error;
mod grpc;
mod http;
mod kafka;
mod listeners;
mod passwords;
mod relay;
mod retention;
mod sagas;
mod tokens;
mod vars;

use std::fmt::Write;
use std::net::SocketAddr;
use std::time::Duration;

pub use admin::{AdminConfig, AdminToken, Scope};
pub use database::DatabaseConfig;
pub use environment::environment;
pub use error::{ConfigError, ConfigErrors};
pub use grpc::{CallerToken, GrpcConfig, GrpcTls};
pub use http::{CookiePolicy, HttpConfig};
pub use kafka::KafkaConfig;
pub use listeners::{ListenerConfig, MAX_HEADERS, Timeouts};
pub use passwords::PasswordConfig;
pub use relay::RelayConfig;
pub use retention::RetentionConfig;
pub use sagas::{SagaConfig, SilencePolicy};

use tracing_subscriber::EnvFilter;

use crate::crypto::{TokenSettings, TokenSigner};
use vars::{Setting, Vars, without_credentials};

/// What the service is started for: some values are safe on a developer's machine only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Profile {
    /// `serve` and everything beside it.
    Production,
    /// `dev`, `demo` and tests: cheap password hashes, cookies that work over plain HTTP.
    Dev,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
}

/// Everything the service needs to know before it starts.
#[derive(Debug, Clone)]
pub struct Config {
    /// PostgreSQL.
    pub database: DatabaseConfig,
    /// Kafka.
    pub kafka: KafkaConfig,
    /// REST.
    pub http: HttpConfig,
    /// gRPC.
    pub grpc: GrpcConfig,
    /// The operators' port.
    pub admin: AdminConfig,
    /// How long clients are waited for.
    pub timeouts: Timeouts,
    /// How tokens are made.
    pub tokens: TokenSettings,
    /// The keys, read and tested.
    pub signer: TokenSigner,
    /// Passwords.
    pub passwords: PasswordConfig,
    /// The outbox relay.
    pub relay: RelayConfig,
    /// The sagas.
    pub sagas: SagaConfig,
    /// How long history is kept.
    pub retention: RetentionConfig,
    /// For how long a stopping instance says "not ready" before it stops accepting.
    pub shutdown_drain: Duration,
    /// For how long a task may fail again and again before the process ends.
    pub task_give_up_after: Duration,
    /// How log lines are written.
    pub log_format: LogFormat,
    /// Which log lines are written (`RUST_LOG`).
    pub log_filter: String,
    /// Who sends our events: the `sender` header and `ce_source`.
    pub sender: String,
    /// What is allowed but should be known; to be logged at every start.
    pub warnings: Vec<String>,
    settings: Vec<Setting>,
}

impl Config {
    /// Reads every variable it knows and ignores the rest. An empty variable is one that is not set.
    pub fn from_vars(vars: impl IntoIterator<Item = (String, String)>, profile: Profile) -> Result<Self, ConfigErrors> {
        let mut vars = Vars::new(vars, profile);
        let tokens = tokens::settings(&mut vars);
        let signer = tokens::signer(&mut vars, &tokens);
        let database = DatabaseConfig::read(&mut vars);
        let kafka = KafkaConfig::read(&mut vars);
        let http = HttpConfig::read(&mut vars);
        let grpc = GrpcConfig::read(&mut vars);
        let admin = AdminConfig::read(&mut vars);
        let timeouts = Timeouts::read(&mut vars);
        let passwords = PasswordConfig::read(&mut vars);
        let relay = RelayConfig::read(&mut vars);
        let sagas = SagaConfig::read(&mut vars);
        let retention = RetentionConfig::read(&mut vars);
        let shutdown_drain =
            vars.duration("SHUTDOWN_DRAIN", Duration::from_secs(5), Duration::ZERO..=Duration::from_secs(300));
        let task_give_up_after = vars.duration(
            "TASK_GIVE_UP_AFTER",
            Duration::from_secs(300),
            Duration::from_secs(1)..=Duration::from_secs(86_400),
        );
        let log_format = vars.choice("LOG_FORMAT", &[("text", LogFormat::Text), ("json", LogFormat::Json)]);
        let log_filter = log_filter(&mut vars);
        let sender = sender(&mut vars);
        if let (Some(http), Some(grpc), Some(admin)) = (&http, &grpc, &admin) {
            distinct_ports(
                &mut vars,
                [("PORT", http.listen), ("GRPC_PORT", grpc.listen), ("ADMIN_PORT", admin.listen)],
            );
        }
        match (database, kafka, http, grpc, admin, signer) {
            (Some(database), Some(kafka), Some(http), Some(grpc), Some(admin), Some(signer))
                if vars.errors.is_empty() =>
            {
                Ok(Self {
                    database,
                    kafka,
                    http,
                    grpc,
                    admin,
                    timeouts,
                    tokens,
                    signer,
                    passwords,
                    relay,
                    sagas,
                    retention,
                    shutdown_drain,
                    task_give_up_after,
                    log_format,
                    log_filter,
                    sender,
                    warnings: vars.warnings,
                    settings: vars.settings,
                })
            }
            _ => Err(ConfigErrors(vars.errors)),
        }
    }

    /// Every variable with the value in force, one a line, secrets hidden.
    pub fn summary(&self) -> String {
        let mut text = String::new();
        for Setting { name, value, is_default } in &self.settings {
            let mark = if *is_default { "  # default" } else { "" };
            // Writing to a String can't fail.
            let _ = writeln!(text, "{name}={value}{mark}");
        }
        text
    }
}

/// Where the local instance answers REST: all that the health check of a container has to know.
pub fn http_listen(vars: impl IntoIterator<Item = (String, String)>) -> Result<SocketAddr, ConfigErrors> {
    let mut vars = Vars::new(vars, Profile::Production);
    match http::listen(&mut vars) {
        Some(listen) => Ok(listen),
        None => Err(ConfigErrors(vars.errors)),
    }
}

/// The database alone: all that `migrate` has to know.
pub fn database(vars: impl IntoIterator<Item = (String, String)>) -> Result<DatabaseConfig, ConfigErrors> {
    let mut vars = Vars::new(vars, Profile::Production);
    match DatabaseConfig::read(&mut vars) {
        Some(database) if vars.errors.is_empty() => Ok(database),
        _ => Err(ConfigErrors(vars.errors)),
    }
}

/// Where events are and where they go: all that `outbox verify` has to know.
#[derive(Debug, Clone)]
pub struct OutboxPlaces {
    /// PostgreSQL.
    pub database: DatabaseConfig,
    /// Kafka.
    pub kafka: KafkaConfig,
    /// Who sends our events.
    pub sender: String,
}

/// Reads them.
pub fn outbox_places(vars: impl IntoIterator<Item = (String, String)>) -> Result<OutboxPlaces, ConfigErrors> {
    let mut vars = Vars::new(vars, Profile::Production);
    let (database, kafka) = (DatabaseConfig::read(&mut vars), KafkaConfig::read(&mut vars));
    let sender = sender(&mut vars);
    match (database, kafka) {
        (Some(database), Some(kafka)) if vars.errors.is_empty() => Ok(OutboxPlaces { database, kafka, sender }),
        _ => Err(ConfigErrors(vars.errors)),
    }
}

fn log_filter(vars: &mut Vars) -> String {
    vars.parse(
        "RUST_LOG",
        "info,librdkafka=warn,tokio_cron_scheduler=warn".to_owned(),
        |filter| without_credentials(filter),
        |raw| EnvFilter::try_new(raw).is_ok().then(|| raw.to_owned()),
        "Write levels (error, warn, info, debug, trace) and targets, for example RUST_LOG=info,librdkafka=warn",
    )
}

fn sender(vars: &mut Vars) -> String {
    vars.text("KAFKA_EVENT_SOURCE", "auth-service")
}

fn distinct_ports(vars: &mut Vars, listeners: [(&'static str, SocketAddr); 3]) {
    for (i, (name, listen)) in listeners.iter().enumerate() {
        for (earlier, other) in &listeners[..i] {
            let same_host = listen.ip() == other.ip() || listen.ip().is_unspecified() || other.ip().is_unspecified();
            if listen.port() != 0 && listen.port() == other.port() && same_host {
                vars.reject(
                    name,
                    format!("is {}, which {earlier} has too", listen.port()),
                    "Give each listener its own port",
                );
            }
        }
    }
}

#[cfg(test)]
mod tests;

//! `auth-service dev` and `auth-service user-service`.

use std::{path::PathBuf, process::ExitCode, time::Instant};

use clap::Args;
use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;

use super::{
    system::{System, Wanted, ignored_variables},
    user_service::{UserService, UserServiceSettings},
};
use crate::{config::LogFormat, shutdown, telemetry};

/// Where `dev` listens and keeps its data.
#[derive(Debug, Args)]
pub struct DevArgs {
    /// REST; 0 for any free port
    #[arg(long, env = "PORT", default_value_t = 4003)]
    port: u16,
    /// gRPC; 0 for any free port
    #[arg(long, env = "GRPC_PORT", default_value_t = 50051)]
    grpc_port: u16,
    /// Operators; 0 for any free port
    #[arg(long, env = "ADMIN_PORT", default_value_t = 4004)]
    admin_port: u16,
    /// A fixed bootstrap address for the embedded broker; 0 for its own free port alone
    #[arg(long, default_value_t = 0)]
    broker_port: u16,
    /// Keys, the admin token and the private PostgreSQL cluster
    #[arg(long, default_value = ".dev", value_name = "DIR")]
    data_dir: PathBuf,
    /// Use this database instead of a private cluster (its schema is brought up to date)
    #[arg(long, value_name = "URL")]
    database_url: Option<SecretString>,
    /// Use this Kafka instead of the embedded broker (its topics must exist)
    #[arg(long, value_name = "HOST:PORT,…")]
    kafka_brokers: Option<String>,
}

/// Runs the whole system until Ctrl-C.
pub async fn run(args: DevArgs) -> anyhow::Result<ExitCode> {
    let since = Instant::now();
    let filter = std::env::var("RUST_LOG")
        .unwrap_or_else(|_| "warn,auth_service=info,librdkafka=error,reqwest_retry=off,reqwest_tracing=off".to_owned());
    let metrics = telemetry::init(LogFormat::Text, &filter)?;
    let ignored = ignored_variables();
    if !ignored.is_empty() {
        println!("dev does not use {}: name servers with --database-url and --kafka-brokers", ignored.join(", "));
    }
    if std::path::Path::new(".env").exists() {
        println!("dev does not read .env");
    }
    let wanted = Wanted {
        data_dir: args.data_dir,
        http_port: args.port,
        grpc_port: args.grpc_port,
        admin_port: args.admin_port,
        broker_port: args.broker_port,
        database_url: args.database_url,
        kafka_brokers: args.kafka_brokers,
        settings: vec![],
    };
    let starting = System::start(wanted, metrics, |step| println!("starting {step} …"));
    let system = tokio::select! {
        system = starting => system?,
        requested = shutdown::requested() => {
            requested?;
            println!("stopped before everything was up");
            return Ok(ExitCode::SUCCESS);
        }
    };
    println!("{}", greeting(&system, since));
    let stopping = system.running.app.shutdown.stopping.clone();
    let asked_to = tokio::select! {
        requested = shutdown::requested() => { requested?; true }
        () = stopping.cancelled() => false,
    };
    println!("\nstopping …");
    system.stop().await;
    println!("stopped; nothing is left running");
    Ok(if asked_to { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn greeting(system: &System, since: Instant) -> String {
    let url = |address: Option<std::net::SocketAddr>| address.map(|a| format!("http://{a}")).unwrap_or_default();
    let (http, admin) = (url(system.running.http), url(system.running.admin));
    let grpc = system.running.grpc.map(|a| a.to_string()).unwrap_or_default();
    let token = system.admin_token.expose_secret();
    let postgres = match &system.cluster {
        Some(cluster) => format!("private cluster in {}", cluster.location().display()),
        None => "as given".to_owned(),
    };
    let kafka = match (&system.broker, system.forwarded()) {
        (Some(_), None) => format!("{} (embedded: messages are gone when this ends)", system.brokers),
        (Some(_), Some(fixed)) => format!("{fixed} → {} (embedded: messages are gone when this ends)", system.brokers),
        (None, _) => format!("{} (as given)", system.brokers),
    };
    let user_service = system.user_service.grpc_addr();
    let database_url = system.database_url.expose_secret();
    format!(
        r#"
ready in {ready:.1?}

  REST          {http}
  gRPC          {grpc}
  admin         {admin}   (token below)
  user-service  {user_service} (gRPC; refuses usernames that begin with "refuse")
  Kafka         {kafka}
  PostgreSQL    {postgres}
                psql '{database_url}'

  TOKEN={token}

try it:

  # register; both cookies go to ./cookies
  curl -i -c cookies -H 'content-type: application/json' -d '{{"username":"ada","email":"ada@example.com","password":"correct horse battery"}}' {http}/auth/register
  # log in by e-mail or username
  curl -i -c cookies -H 'content-type: application/json' -d '{{"identifier":"ada","password":"correct horse battery"}}' {http}/auth/login
  # who am I
  curl -i -b cookies {http}/auth/me
  # log out
  curl -i -b cookies -c cookies -X DELETE {http}/auth/logout
  # health: whole, process alone, ready to serve
  curl -i {http}/auth/health
  curl -i {http}/auth/health/live
  curl -i {http}/auth/health/ready
  # public keys
  curl -i {http}/.well-known/jwks.json

  # operators: the outbox, its relays, the sagas, who did what, metrics
  curl -H 'authorization: Bearer {token}' '{admin}/admin/outbox?status=pending'
  curl -H 'authorization: Bearer {token}' {admin}/admin/relay
  curl -H 'authorization: Bearer {token}' '{admin}/admin/sagas?status=stuck'
  curl -H 'authorization: Bearer {token}' {admin}/admin/audit
  curl {admin}/metrics

  # gRPC, with reflection
  grpcurl -plaintext -d '{{"refresh_token":"…"}}' {grpc} auth.v1.TokenService/RefreshAccessToken
  grpcurl -plaintext -d '{{"access_token":"…"}}' {grpc} auth.v1.TokenService/ValidateAccessToken

Ctrl-C stops all of it; the next start goes on with the same users and outbox."#,
        ready = since.elapsed()
    )
}

/// The reference user-service as a process of its own.
#[derive(Debug, Args)]
pub struct UserServiceArgs {
    /// Its database; its tables are in a schema of their own, `user_service`
    #[arg(long, env = "DATABASE_URL", value_name = "URL", hide_env_values = true)]
    database_url: SecretString,
    /// `host:port`, comma-separated
    #[arg(long, env = "KAFKA_BROKERS")]
    kafka_brokers: String,
    /// Where its gRPC listens
    #[arg(long, env = "GRPC_LISTEN", default_value = "127.0.0.1:50052")]
    grpc_listen: std::net::SocketAddr,
    /// Put before every topic's name
    #[arg(long, env = "KAFKA_TOPIC_PREFIX", default_value = "")]
    topic_prefix: String,
    /// Consumer group
    #[arg(long, default_value = "user-service")]
    group_id: String,
    /// Usernames it refuses begin so
    #[arg(long, value_delimiter = ',', default_value = "refuse")]
    refused_prefixes: Vec<String>,
}

/// Runs the user-service until a signal.
pub async fn run_user_service(args: UserServiceArgs) -> anyhow::Result<ExitCode> {
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "info,librdkafka=warn".to_owned());
    telemetry::init(LogFormat::Text, &filter)?;
    let stop = CancellationToken::new();
    let settings = UserServiceSettings {
        database_url: args.database_url,
        kafka_brokers: args.kafka_brokers,
        kafka_client: vec![],
        topic_prefix: args.topic_prefix,
        group_id: args.group_id,
        grpc_listen: args.grpc_listen,
        refused_prefixes: args.refused_prefixes,
    };
    let service = UserService::start(settings, stop.clone()).await?;
    tracing::info!(grpc = %service.grpc_addr(), "reference user-service is up");
    shutdown::requested().await?;
    stop.cancel();
    service.stopped().await;
    Ok(ExitCode::SUCCESS)
}

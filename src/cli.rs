//! The command line.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::Context;
use chrono::{DateTime, SecondsFormat, TimeDelta, Utc};
use clap::{Parser, Subcommand};
use metrics_exporter_prometheus::PrometheusHandle;
use outbox_relay::archive::Unpositioned;
use sqlx::{Connection, PgConnection};

use crate::{
    app::{self, Role},
    config::{self, Config, ConfigErrors, Profile},
    crypto,
    db::{self, users::SharedName},
    migrations,
    outbox_command::OutboxCommand,
    shutdown, telemetry,
};

/// Authentication for microservice systems whose registrations never get lost or left half-done.
///
/// Fresh machine? `auth-service dev` brings up everything it needs and prints what to type next.
#[derive(Debug, Parser)]
#[command(version, about, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// The whole system on this machine: PostgreSQL, broker, keys, schema, every role, a user-service
    #[cfg(feature = "dev")]
    Dev(crate::dev::DevArgs),
    /// A tour on embedded parts that ends by itself and counts what it did; exit 1 when a count is wrong
    #[cfg(feature = "dev")]
    Demo(crate::dev::demo::DemoArgs),
    /// The reference user-service alone, as `compose.yaml` runs it
    #[cfg(feature = "dev")]
    UserService(crate::dev::UserServiceArgs),
    /// Run the service; several replicas of any role may run side by side
    Serve {
        /// Fail where FAILPOINTS says, for the fault suite; the variable alone does nothing
        #[cfg(feature = "dev")]
        #[arg(long, hide = true)]
        arm_fault_points: bool,
        /// What this process does, all of it by default: http, grpc, admin, relay, sagas, housekeeping
        #[arg(long = "role", value_delimiter = ',', value_name = "ROLE,…")]
        roles: Vec<Role>,
    },
    /// Bring the database's schema up to date; safe when many replicas start at once
    Migrate,
    /// Key pairs for signing tokens
    #[command(subcommand)]
    Keys(Keys),
    /// Tokens for the admin port
    #[command(subcommand)]
    AdminToken(AdminToken),
    /// The outbox and its archive
    #[command(subcommand)]
    Outbox(OutboxCommand),
    /// Say every configuration error at once, secrets redacted; exit 2 when something is wrong
    CheckConfig,
    /// Exit 0 when the local instance is ready (for container health checks)
    Healthcheck {
        /// Where to ask; by default this machine on PORT
        #[arg(long, value_name = "URL")]
        url: Option<String>,
    },
}

#[derive(Debug, Subcommand)]
enum Keys {
    /// Make two RSA key pairs, one for access and one for refresh tokens
    Generate {
        /// Folder to write them to; nothing in it is overwritten
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Size of the keys in bits: 2048, 3072 or 4096
        #[arg(long, default_value_t = 3072)]
        bits: u32,
    },
}

#[derive(Debug, Subcommand)]
enum AdminToken {
    /// Make a token: prints it once, and the entry for ADMIN_TOKENS
    New {
        /// Who it is for; stands in the audit log
        #[arg(long)]
        name: String,
        /// What it may do: read, operate, admin
        #[arg(long, value_delimiter = ',', default_value = "read")]
        scopes: Vec<String>,
    },
}

/// How a command ended badly.
pub(crate) enum Failure {
    /// Exit 2: the configuration.
    Config(ConfigErrors),
    /// Exit 2: what was typed, where only more than its words shows it.
    Usage(String),
    /// Exit 4: nothing was found out, for commands whose exit code 1 says that something was.
    NotDone(anyhow::Error),
    /// Exit 1: anything else.
    Other(anyhow::Error),
}

impl<E: Into<anyhow::Error>> From<E> for Failure {
    fn from(error: E) -> Self {
        Failure::Other(error.into())
    }
}

/// Runs the command that was typed.
pub fn run() -> ExitCode {
    let cli = Cli::parse();
    crypto::install_provider();
    let runtime = match tokio::runtime::Runtime::new() {
        Ok(runtime) => runtime,
        Err(error) => return fail(Failure::Other(error.into())),
    };
    let ended = runtime.block_on(dispatch(cli.command));
    // bcrypt and client threads that are still at work must not hold the exit up.
    runtime.shutdown_timeout(Duration::from_secs(2));
    ended.unwrap_or_else(fail)
}

fn fail(failure: Failure) -> ExitCode {
    match failure {
        Failure::Config(errors) => {
            eprintln!("{errors}");
            ExitCode::from(2)
        }
        Failure::Usage(problem) => {
            eprintln!("auth-service: {problem}");
            ExitCode::from(2)
        }
        Failure::NotDone(error) => {
            eprintln!("auth-service: {error:#}");
            ExitCode::from(4)
        }
        Failure::Other(error) => {
            eprintln!("auth-service: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn dispatch(command: Command) -> Result<ExitCode, Failure> {
    match command {
        #[cfg(feature = "dev")]
        Command::Dev(args) => Ok(crate::dev::run(args).await?),
        #[cfg(feature = "dev")]
        Command::Demo(args) => Ok(crate::dev::demo::run(args).await?),
        #[cfg(feature = "dev")]
        Command::UserService(args) => Ok(crate::dev::run_user_service(args).await?),
        Command::Serve {
            #[cfg(feature = "dev")]
            arm_fault_points,
            roles,
        } => {
            let config = configuration()?;
            let metrics = telemetry::init(config.log_format, &config.log_filter)?;
            #[cfg(feature = "dev")]
            if arm_fault_points {
                outbox_relay::fault_points::arm();
            }
            serve(config, metrics, roles).await
        }
        Command::Migrate => migrate().await,
        Command::Keys(Keys::Generate { out, bits }) => {
            let files = crypto::write_key_files(&out, bits)?;
            println!("{}", files.env_lines());
            Ok(ExitCode::SUCCESS)
        }
        Command::AdminToken(AdminToken::New { name, scopes }) => {
            print!("{}", crate::admin::auth::new_token(&name, &scopes)?);
            Ok(ExitCode::SUCCESS)
        }
        Command::Outbox(command) => command.run().await,
        Command::CheckConfig => {
            let config = configuration()?;
            print!("{}", config.summary());
            config.warnings.iter().for_each(|warning| println!("# warning: {warning}"));
            Ok(ExitCode::SUCCESS)
        }
        Command::Healthcheck { url } => healthcheck(url).await,
    }
}

fn configuration() -> Result<Config, Failure> {
    from_environment(|vars| Config::from_vars(vars, Profile::Production))
}

/// Reads the environment; what is wrong with `.env` stands beside everything else that is wrong.
pub(crate) fn from_environment<T>(
    read: impl FnOnce(BTreeMap<String, String>) -> Result<T, ConfigErrors>,
) -> Result<T, Failure> {
    let (vars, mut errors) = config::environment();
    match read(vars) {
        Ok(read) if errors.is_empty() => Ok(read),
        Ok(_) => Err(Failure::Config(ConfigErrors(errors))),
        Err(others) => {
            errors.extend(others.0);
            Err(Failure::Config(ConfigErrors(errors)))
        }
    }
}

async fn serve(config: Config, metrics: PrometheusHandle, roles: Vec<Role>) -> Result<ExitCode, Failure> {
    let roles: BTreeSet<Role> = if roles.is_empty() { Role::ALL.into() } else { roles.into_iter().collect() };
    let drain = config.shutdown_drain;
    let running = app::start(config, &roles, metrics).await?;
    let names: Vec<_> = roles.iter().map(Role::to_string).collect();
    tracing::info!(
        roles = names.join(","),
        http = running.http.map(display),
        grpc = running.grpc.map(display),
        admin = running.admin.map(display),
        "auth-service {} is up",
        env!("CARGO_PKG_VERSION")
    );
    let stopping = running.app.shutdown.stopping.clone();
    let ended = tokio::select! {
        requested = shutdown::requested() => requested.map_err(anyhow::Error::from),
        () = stopping.cancelled() => Err(anyhow::anyhow!("a part of this process has failed; see the log")),
        gave_up = running.gave_up() => Err(gave_up.into()),
    };
    match &ended {
        Ok(()) => tracing::info!("stopping"),
        Err(error) => tracing::error!(%error, "stopping: this process can't do its work"),
    }
    running.stop(if ended.is_ok() { drain } else { Duration::ZERO }, Duration::from_secs(30)).await;
    Ok(ended.map(|()| ExitCode::SUCCESS)?)
}

async fn migrate() -> Result<ExitCode, Failure> {
    let database = from_environment(config::database)?;
    let place = format!("{}:{}", database.options.get_host(), database.options.get_port());
    let migrated = migrations::run(&database.options)
        .await
        .with_context(|| format!("migrating the database at {place} (DATABASE_URL, or DB_HOST and DB_PORT)"))?;
    migrated.put_back.iter().for_each(|lost| println!("put back: {lost}"));
    match migrated.applied {
        0 => println!("the schema is up to date"),
        applied => println!("applied {applied} migration(s); the schema is up to date"),
    }
    let mut conn = PgConnection::connect_with(&database.options).await.context("looking for shared names")?;
    for SharedName { name, username_of, email_of } in db::users::shared_names(&mut conn).await? {
        eprintln!(
            "warning: {name} is the username of user {username_of} and the e-mail address of user {email_of}. Both keep \
             it, and a login by it is user {email_of}'s; rename user {username_of} to end that. New accounts can't \
             get into this state."
        );
    }
    conn.close().await?;
    let unpositioned = migrations::unpositioned_events(&database.options).await;
    if let Some(found) = unpositioned.with_context(|| format!("looking at the archive of the database at {place}"))? {
        eprintln!("{}", advice_on(&found));
    }
    Ok(ExitCode::SUCCESS)
}

/// What to do about events that may never have reached Kafka.
fn advice_on(found: &Unpositioned) -> String {
    let Unpositioned { rows, ids, published } = found;
    let moment = |at: DateTime<Utc>| at.to_rfc3339_opts(SecondsFormat::Micros, true);
    // The end is excluded. To the microsecond, so that it does not lie ahead: verify speaks of no such window.
    let (from, to) = (moment(*published.start()), moment(*published.end() + TimeDelta::microseconds(1)));
    let listed: Vec<_> = ids.iter().map(i64::to_string).collect();
    let more = if *rows > ids.len() as i64 { ", …" } else { "" };
    format!(
        "warning: {rows} event(s) are archived as published without a position in Kafka (\"offset\" below 0): rows \
         {}{more}\n\
         An earlier release took a delivery report without an offset for an acknowledgement. Some of them may never \
         have reached Kafka.\n\
         To see which: auth-service outbox verify --from {from} --to {to}\n\
         To send one again under its old ce_id: POST /admin/outbox/ID/replay {{\"reason\": \"never reached Kafka\"}}. A \
         copy does no harm: consumers know it by its ce_id.\n\
         The database refuses new rows of this kind.",
        listed.join(", ")
    )
}

async fn healthcheck(url: Option<String>) -> Result<ExitCode, Failure> {
    let url = match url {
        Some(url) => url,
        None => {
            let mut listen = from_environment(config::http_listen)?;
            if listen.ip().is_unspecified() {
                listen = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), listen.port());
            }
            format!("http://{listen}/auth/health/ready")
        }
    };
    let client = reqwest::Client::builder().timeout(Duration::from_secs(3)).build()?;
    let answer = client.get(&url).send().await?;
    if answer.status().is_success() {
        return Ok(ExitCode::SUCCESS);
    }
    eprintln!("{url} answers {}: {}", answer.status(), answer.text().await.unwrap_or_default());
    Ok(ExitCode::FAILURE)
}

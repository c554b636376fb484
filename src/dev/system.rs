//! Everything at once: PostgreSQL, broker, keys, schema, all roles, the reference user-service.
//! `dev` keeps it running, `demo` walks through it.

use std::{
    collections::BTreeMap,
    env,
    ffi::OsString,
    fs,
    io::Write,
    net::{Ipv4Addr, TcpListener},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::Context;
use metrics_exporter_prometheus::PrometheusHandle;
use secrecy::{ExposeSecret, SecretString};
use tokio_util::sync::CancellationToken;

use super::{
    broker::EmbeddedBroker,
    forward::Forwarder,
    postgres::{PostgresOptions, PrivateCluster},
    user_service::{UserService, UserServiceSettings},
};
use crate::{
    admin::auth::AdminSecret,
    app::{self, Role, Running},
    config::{Config, Profile},
    crypto::write_key_files,
    migrations,
};

/// Topics of the fleet; the embedded broker has no admin API to make them with.
const TOPICS: [&str; 7] = [
    "user.create",
    "user.create.close",
    "user.create.done",
    "saga-reply",
    "user.delete",
    "user.delete.done",
    "user.delete.close",
];

/// Variables that would name a database or a broker: only the command line may, here.
const NOT_HONOURED: [&str; 8] =
    ["DATABASE_URL", "DB_DATABASE", "DB_USERNAME", "DB_PASSWORD", "DB_HOST", "DB_PORT", "DB_DIALECT", "KAFKA_BROKERS"];

/// What to start.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Where keys, the admin token and the cluster live.
    pub data_dir: PathBuf,
    /// Port of REST; 0 for any.
    pub http_port: u16,
    /// Port of gRPC; 0 for any.
    pub grpc_port: u16,
    /// Port for operators; 0 for any.
    pub admin_port: u16,
    /// Port that forwards to the embedded broker; 0 for none.
    pub broker_port: u16,
    /// A given database instead of the private cluster.
    pub database_url: Option<SecretString>,
    /// A given broker instead of the embedded one.
    pub kafka_brokers: Option<String>,
    /// Settings on top of the environment's.
    pub settings: Vec<(&'static str, String)>,
}

impl Wanted {
    /// Embedded parts on any free ports, with their data in this folder.
    pub fn embedded(data_dir: PathBuf) -> Self {
        Self {
            data_dir,
            http_port: 0,
            grpc_port: 0,
            admin_port: 0,
            broker_port: 0,
            database_url: None,
            kafka_brokers: None,
            settings: vec![],
        }
    }

    /// Said before anything is started, which would only have to be stopped again.
    fn check_ports(&self) -> anyhow::Result<()> {
        let ports = [
            ("--port", self.http_port),
            ("--grpc-port", self.grpc_port),
            ("--admin-port", self.admin_port),
            ("--broker-port", self.broker_port),
        ];
        for (index, (option, port)) in ports.into_iter().enumerate().filter(|(_, (_, port))| *port != 0) {
            if let Some((other, _)) = ports[..index].iter().find(|(_, earlier)| *earlier == port) {
                anyhow::bail!("{other} and {option} are both {port}: give each its own, or 0 for any free one");
            }
            if let Err(error) = TcpListener::bind((Ipv4Addr::LOCALHOST, port)) {
                anyhow::bail!(
                    "port {port} can't be used ({error}): choose another with {option}, or 0 for any free one"
                );
            }
        }
        Ok(())
    }
}

/// The running system.
pub struct System {
    /// The service.
    pub running: Running,
    /// The embedded broker, unless one was given.
    pub broker: Option<EmbeddedBroker>,
    /// Bootstrap address.
    pub brokers: String,
    /// The private cluster, unless a database was given.
    pub cluster: Option<PrivateCluster>,
    /// URL of the service's database; it holds the password.
    pub database_url: SecretString,
    /// The reference user-service.
    pub user_service: UserService,
    /// A token with every scope for the admin port.
    pub admin_token: SecretString,
    forwarder: Option<Forwarder>,
    parts_stop: CancellationToken,
}

impl System {
    /// Starts everything; says each step to `progress`.
    pub async fn start(wanted: Wanted, metrics: PrometheusHandle, progress: impl Fn(&str)) -> anyhow::Result<Self> {
        wanted.check_ports()?;
        fs::create_dir_all(&wanted.data_dir)
            .with_context(|| format!("can't make {}: choose another --data-dir", wanted.data_dir.display()))?;
        let (cluster, database_url) = database(&wanted, &progress).await?;
        let (broker, brokers) = kafka(&wanted, &progress).await?;
        let forwarder = match (&broker, wanted.broker_port) {
            (Some(_), port) if port != 0 => Some(Forwarder::start(port, brokers.clone()).await?),
            _ => None,
        };
        let keys = keys(&wanted.data_dir, &progress)?;
        let admin = admin_token(&wanted.data_dir)?;

        progress("schema");
        let options = database_url.expose_secret().parse().context("--database-url")?;
        migrations::run(&options).await?;

        progress("reference user-service");
        let parts_stop = CancellationToken::new();
        let settings = UserServiceSettings {
            database_url: database_url.clone(),
            kafka_brokers: brokers.clone(),
            kafka_client: vec![],
            topic_prefix: String::new(),
            group_id: "user-service".to_owned(),
            grpc_listen: ([127, 0, 0, 1], 0).into(),
            refused_prefixes: vec!["refuse".to_owned()],
        };
        let user_service = UserService::start(settings, parts_stop.clone()).await?;

        progress("auth-service");
        let mut vars = inherited();
        let given = vars.get("ADMIN_TOKENS").map(|entries| format!("{entries},")).unwrap_or_default();
        let own = [
            ("DATABASE_URL", database_url.expose_secret().to_owned()),
            ("KAFKA_BROKERS", brokers.clone()),
            ("HOST", "127.0.0.1".to_owned()),
            ("ADMIN_HOST", "127.0.0.1".to_owned()),
            ("GRPC_HOST", "127.0.0.1".to_owned()),
            ("PORT", wanted.http_port.to_string()),
            ("GRPC_PORT", wanted.grpc_port.to_string()),
            ("ADMIN_PORT", wanted.admin_port.to_string()),
            ("ADMIN_TOKENS", given + &admin.entry),
        ];
        vars.extend(own.map(|(name, value)| (name.to_owned(), value)));
        let defaults = [
            ("USER_SERVICE_GRPC_URL", format!("http://{}", user_service.grpc_addr())),
            ("SHUTDOWN_DRAIN", "0s".to_owned()),
            // A stop by kill -9 leaves lanes that have to run out first.
            ("RELAY_LEASE", "3s".to_owned()),
        ];
        for (name, value) in defaults.into_iter().chain(keys) {
            vars.entry(name.to_owned()).or_insert(value);
        }
        vars.extend(wanted.settings.into_iter().map(|(name, value)| (name.to_owned(), value)));
        let config = Config::from_vars(vars, Profile::Dev)?;
        let running = app::start(config, &Role::ALL.into(), metrics).await?;
        Ok(Self {
            running,
            broker,
            brokers,
            cluster,
            database_url,
            user_service,
            admin_token: admin.token,
            forwarder,
            parts_stop,
        })
    }

    /// The fixed bootstrap address, if there is one.
    pub fn forwarded(&self) -> Option<std::net::SocketAddr> {
        self.forwarder.as_ref().map(Forwarder::address)
    }

    /// Stops everything, the service first.
    pub async fn stop(self) {
        self.running.stop(Duration::ZERO, Duration::from_secs(10)).await;
        self.parts_stop.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(8), self.user_service.stopped()).await;
        if let Some(cluster) = self.cluster {
            cluster.stop().await;
        }
    }
}

/// The variables that are set and do not apply here, for a line that says so.
pub fn ignored_variables() -> Vec<&'static str> {
    NOT_HONOURED.into_iter().filter(|name| env::var_os(name).is_some_and(|value| !value.is_empty())).collect()
}

fn inherited() -> BTreeMap<String, String> {
    let readable = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    env::vars_os()
        .filter_map(readable)
        .filter(|(name, value)| !value.is_empty() && !NOT_HONOURED.contains(&name.as_str()))
        .collect()
}

async fn database(wanted: &Wanted, progress: &impl Fn(&str)) -> anyhow::Result<(Option<PrivateCluster>, SecretString)> {
    if let Some(url) = &wanted.database_url {
        return Ok((None, url.clone()));
    }
    progress("PostgreSQL");
    let cluster = PrivateCluster::start(&wanted.data_dir.join("postgres"), PostgresOptions::default()).await?;
    cluster.create_database("auth").await?;
    let url = cluster.url("auth");
    Ok((Some(cluster), url))
}

async fn kafka(wanted: &Wanted, progress: &impl Fn(&str)) -> anyhow::Result<(Option<EmbeddedBroker>, String)> {
    if let Some(brokers) = &wanted.kafka_brokers {
        return Ok((None, brokers.clone()));
    }
    progress("embedded Kafka-compatible broker");
    let broker = EmbeddedBroker::start(&TOPICS).await?;
    let brokers = broker.bootstrap_servers().to_owned();
    Ok((Some(broker), brokers))
}

/// The key files of the data folder, made the first time.
fn keys(data_dir: &Path, progress: &impl Fn(&str)) -> anyhow::Result<Vec<(&'static str, String)>> {
    let dir = data_dir.join("keys");
    if !dir.join("refresh_public.pem").exists() {
        progress("signing keys");
        // Left half-made by a start that was interrupted.
        let _ = fs::remove_dir_all(&dir);
        write_key_files(&dir, 3072)?;
    }
    let file = |name: &str| dir.join(name).display().to_string();
    Ok(vec![
        ("ACCESS_TOKEN_PRIVATE_KEY_FILE", file("access_private.pem")),
        ("ACCESS_TOKEN_PUBLIC_KEY_FILE", file("access_public.pem")),
        ("REFRESH_TOKEN_PRIVATE_KEY_FILE", file("refresh_private.pem")),
        ("REFRESH_TOKEN_PUBLIC_KEY_FILE", file("refresh_public.pem")),
    ])
}

/// The same token at every start, so that a shell that was left open still works.
fn admin_token(data_dir: &Path) -> anyhow::Result<AdminSecret> {
    let path = data_dir.join("admin-token");
    if let Ok(token) = fs::read_to_string(&path) {
        return Ok(AdminSecret::from_token("dev", &["admin"], token.trim().to_owned())?);
    }
    let secret = AdminSecret::generate("dev", &["admin"])?;
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
    file.write_all(secret.token.expose_secret().as_bytes())?;
    Ok(secret)
}

//! The composition root: everything a process needs, and the roles it may play.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    fmt,
    net::SocketAddr,
    ops::Deref,
    str::FromStr,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::Context;
use metrics_exporter_prometheus::PrometheusHandle;
use outbox_relay::{
    Database, KafkaSettings, PoolSettings, PublishTrouble, Relay, RelaySettings, Wake, session,
    supervisor::{GaveUp, RestartPolicy, Supervisor},
    trouble::Troubles,
    watch_kafka,
};
use saga_orchestrator::{ConsumerSettings, ConsumerStatus, Definition, Orchestrator, SagaSettings, flows::create_user};
use tokio_util::task::TaskTracker;

use crate::{
    accounts::FailedLogins,
    admin,
    config::Config,
    crypto::{Hasher, TokenSigner},
    db, grpc,
    health::Health,
    housekeeping, http,
    participants::Participants,
    server::{Listener, Protocol, fit_descriptors},
    shutdown::Shutdown,
    telemetry,
    user_client::UserServiceClient,
};

/// The kinds of sagas this service runs.
pub static SAGAS: &[&Definition] = &[&create_user::DEFINITION];

/// How often silence is looked for.
const SWEEP: Duration = Duration::from_secs(1);

/// What every request and every role shares. Cheap to clone.
#[derive(Clone)]
pub struct App(Arc<Shared>);

/// See [`App`].
pub struct Shared {
    /// The configuration.
    pub config: Config,
    /// For requests, sagas and housekeeping; the relay has a pool of its own.
    pub db: Database,
    /// The bounded bcrypt pool.
    pub hasher: Hasher,
    /// Signs and verifies tokens.
    pub signer: TokenSigner,
    /// Passwords that let nobody in, by account.
    pub failed_logins: FailedLogins,
    /// Sagas.
    pub sagas: Orchestrator<Participants>,
    /// What keeps their replies from being read.
    pub replies: ConsumerStatus,
    /// What keeps events from being published.
    pub publishing: Troubles<PublishTrouble>,
    /// Wakes the relay after a commit.
    pub wake: Wake,
    /// Whether this instance can serve.
    pub health: Health,
    /// Runs its tasks.
    pub supervisor: Supervisor,
    /// Renders the metrics.
    pub metrics: PrometheusHandle,
    /// When the process began.
    pub started: Instant,
    /// The two moments of a stop.
    pub shutdown: Shutdown,
}

impl Deref for App {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        &self.0
    }
}

/// One thing a process does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// REST.
    Http,
    /// gRPC.
    Grpc,
    /// The operator's port.
    Admin,
    /// Publishing the outbox.
    Relay,
    /// Replies and deadlines.
    Sagas,
    /// Tidying up.
    Housekeeping,
}

impl Role {
    /// All of them.
    pub const ALL: [Role; 6] = [Role::Http, Role::Grpc, Role::Admin, Role::Relay, Role::Sagas, Role::Housekeeping];

    fn as_str(self) -> &'static str {
        match self {
            Role::Http => "http",
            Role::Grpc => "grpc",
            Role::Admin => "admin",
            Role::Relay => "relay",
            Role::Sagas => "sagas",
            Role::Housekeeping => "housekeeping",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Role::ALL.into_iter().find(|role| role.as_str() == text).ok_or_else(|| {
            let known: Vec<_> = Role::ALL.iter().map(|role| role.as_str()).collect();
            format!("no such role; the roles are {}", known.join(", "))
        })
    }
}

/// A running process: its addresses, and how to stop it.
pub struct Running {
    /// What the roles share.
    pub app: App,
    /// Where REST is served.
    pub http: Option<SocketAddr>,
    /// Where gRPC is served.
    pub grpc: Option<SocketAddr>,
    /// Where operators are served.
    pub admin: Option<SocketAddr>,
    tasks: TaskTracker,
}

impl App {
    pub(crate) fn build(config: Config, metrics: PrometheusHandle) -> anyhow::Result<Self> {
        let db = db::pool(&config.database);
        let client = config.sagas.user_service_url.as_deref().map(UserServiceClient::new).transpose();
        let client = client.context("USER_SERVICE_GRPC_URL")?;
        let settings = SagaSettings {
            source: config.sender.clone(),
            topic_prefix: config.kafka.topic_prefix.clone(),
            participant: config.sagas.participant.clone(),
            step_timeout: config.sagas.step_timeout,
            ask_timeout: Duration::from_secs(10),
            resolve_backoff: config.sagas.resolve_backoff,
            resolve_attempts: config.sagas.resolve_attempts,
            reply_clock_tolerance: config.sagas.reply_clock_tolerance,
        };
        let wake = Wake::default();
        let participants = Participants::new(client, config.sagas.silence_policy);
        Ok(Self(Arc::new(Shared {
            hasher: Hasher::new(config.passwords.hasher.clone()).context("password hashing")?,
            signer: config.signer.clone(),
            sagas: Orchestrator::new(settings, SAGAS, participants, wake.clone()),
            failed_logins: FailedLogins::default(),
            replies: ConsumerStatus::default(),
            publishing: Troubles::default(),
            health: Health::default(),
            supervisor: Supervisor::new(RestartPolicy {
                give_up_after: config.task_give_up_after,
                ..RestartPolicy::default()
            }),
            started: Instant::now(),
            shutdown: Shutdown::default(),
            wake,
            metrics,
            db,
            config,
        })))
    }

    /// A pool for the relay alone.
    fn relay_pool(&self) -> Database {
        let settings = PoolSettings {
            connections: self.config.relay.pool_size,
            acquire_timeout: self.config.database.acquire_timeout,
            work_timeout: self.config.relay.lease,
            session: &session::RELAY,
        };
        Database::new(self.config.database.options.clone(), settings)
    }

    fn kafka_settings(&self) -> KafkaSettings {
        let kafka = &self.config.kafka;
        KafkaSettings { brokers: kafka.brokers.clone(), client: kafka.client.clone() }
    }

    /// Every topic that events are published on.
    fn command_topics(&self) -> Vec<String> {
        let prefix = &self.config.kafka.topic_prefix;
        let topics = SAGAS.iter().flat_map(|saga| saga.command_topics());
        let topics: BTreeSet<String> = topics.map(|topic| format!("{prefix}{topic}")).collect();
        topics.into_iter().collect()
    }

    fn relay(&self) -> Relay {
        let config = &self.config;
        let host = std::env::var("HOSTNAME").unwrap_or_else(|_| "localhost".to_owned());
        let settings = RelaySettings {
            name: format!("{host}:{}", std::process::id()),
            kafka: self.kafka_settings(),
            lease: config.relay.lease,
            batch: config.relay.batch,
            workers: config.relay.workers,
            poll: config.relay.poll,
            fencing: config.relay.fencing,
        };
        Relay::new(self.relay_pool(), settings, self.wake.clone()).supervised_by(self.supervisor.clone())
    }
}

/// Starts the roles. Ports are bound before anything runs, so that a port that is taken is said at
/// once; a database that is away is not an error: the process serves when it is back.
pub async fn start(mut config: Config, roles: &BTreeSet<Role>, metrics: PrometheusHandle) -> anyhow::Result<Running> {
    let descriptors = fit_descriptors(&mut config);
    for warning in config.warnings.iter().chain(&descriptors) {
        tracing::warn!("{warning}");
    }
    let app = App::build(config, metrics)?;
    check_database(&app, roles).await?;
    let config = &app.config;
    let bind = async |role: Role, address, bounds, protocol| match roles.contains(&role) {
        true => Listener::bind(role.as_str(), address, bounds, config.timeouts, protocol).await.map(Some),
        false => Ok(None),
    };
    let json = Protocol::Http(http::unreadable);
    let http = bind(Role::Http, (config.http.listen, "PORT"), config.http.listener, json).await?;
    let protocol = grpc::protocol(config.grpc.tls.as_ref())?;
    let grpc = bind(Role::Grpc, (config.grpc.listen, "GRPC_PORT"), config.grpc.listener, protocol).await?;
    let json = Protocol::Http(http::unreadable);
    let admin = bind(Role::Admin, (config.admin.listen, "ADMIN_PORT"), config.admin.listener, json).await?;
    let address = |listener: &Option<Arc<Listener>>| listener.as_ref().map(|listener| listener.address());
    let running = Running {
        http: address(&http),
        grpc: address(&grpc),
        admin: address(&admin),
        app: app.clone(),
        tasks: TaskTracker::new(),
    };
    let stop = app.shutdown.stopping.clone();
    if let Some(listener) = http {
        let (app, stop) = (app.clone(), stop.clone());
        running.supervise("http", move || {
            listener.clone().serve(http::router(app.clone()), http::FINISH_DEADLINE, stop.clone())
        });
    }
    if let Some(listener) = grpc {
        let (app, stop) = (app.clone(), stop.clone());
        running.supervise("grpc", move || grpc::serve(listener.clone(), app.clone(), stop.clone()));
    }
    if let Some(listener) = admin {
        let (app, stop) = (app.clone(), stop.clone());
        running.supervise("admin", move || {
            listener.clone().serve(admin::router(app.clone()), admin::FINISH_DEADLINE, stop.clone())
        });
    }
    {
        let (app, stop) = (app.clone(), stop.clone());
        running
            .supervise("wake-announcer", move || without_fail(app.wake.clone().announce(app.db.clone(), stop.clone())));
    }
    {
        let (app, stop) = (app.clone(), stop.clone());
        running.supervise("metrics-upkeep", move || {
            let upkeep = telemetry::keep_up_metrics(app.metrics.clone());
            let stop = stop.clone();
            async move { stop.run_until_cancelled(upkeep).await.unwrap_or(Ok(())) }
        });
    }
    if roles.contains(&Role::Relay) {
        running.own_relay(app.relay());
        let (watching, stopped) = (app.clone(), stop.clone());
        running.supervise("kafka-watch", move || {
            let kafka = watching.kafka_settings();
            watch_kafka(kafka, watching.command_topics(), watching.publishing.clone(), stopped.clone())
        });
    }
    if roles.contains(&Role::Sagas) {
        let settings = ConsumerSettings {
            brokers: app.config.kafka.brokers.clone(),
            group_id: app.config.kafka.group_id.clone(),
            client: app.config.kafka.client.clone(),
        };
        let (consuming, stopped) = (app.clone(), stop.clone());
        running.supervise("reply-consumer", move || {
            let sagas = consuming.sagas.clone();
            without_fail(sagas.consume(
                consuming.db.clone(),
                settings.clone(),
                consuming.replies.clone(),
                stopped.clone(),
            ))
        });
        let (app, stop) = (app.clone(), stop.clone());
        running.supervise("saga-deadlines", move || {
            without_fail(app.sagas.clone().watch_deadlines(app.db.clone(), SWEEP, stop.clone()))
        });
    }
    if roles.contains(&Role::Housekeeping) {
        let (app, stop) = (app.clone(), stop.clone());
        running.supervise("housekeeping", move || housekeeping::run(app.clone(), stop.clone()));
    }
    running.tasks.close();
    Ok(running)
}

/// A task whose only failures are an end and a panic.
async fn without_fail(task: impl Future<Output = ()>) -> Result<(), Infallible> {
    task.await;
    Ok(())
}

/// What no waiting would mend is an error of the deployment and said at once. What somebody can mend while this process
/// runs keeps it from being ready, and is said too.
async fn check_database(app: &App, roles: &BTreeSet<Role>) -> anyhow::Result<()> {
    let config = &app.config;
    let relay_connections = if roles.contains(&Role::Relay) { config.relay.pool_size } else { 0 };
    match app.health.examine(&config.database.options, config.database.pool_size + relay_connections).await {
        Ok(examination) => {
            examination.warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
            match examination.fatal.as_slice() {
                [] => Ok(()),
                fatal => anyhow::bail!("{}", fatal.join("; ")),
            }
        }
        Err(error) => {
            let options = &config.database.options;
            let place = format!("{}:{}", options.get_host(), options.get_port());
            tracing::warn!(%error, database = place, "the database can't be reached yet; not ready until it can");
            Ok(())
        }
    }
}

impl Running {
    fn supervise<T, E>(&self, name: &'static str, start: impl FnMut() -> T + Send + 'static)
    where
        T: Future<Output = Result<(), E>> + Send + 'static,
        E: fmt::Display + Send + 'static,
    {
        let (supervisor, stop) = (self.app.supervisor.clone(), self.app.shutdown.stopping.clone());
        self.tasks.spawn(async move { supervisor.run(name, stop, start).await });
    }

    /// The relay supervises its parts itself. What it refuses at its start is a fault of the settings, which no
    /// restart mends: the process ends.
    fn own_relay(&self, relay: Relay) {
        let shutdown = self.app.shutdown.clone();
        self.tasks.spawn(async move {
            if let Err(error) = relay.run(shutdown.stopping.clone()).await {
                tracing::error!(role = "relay", %error, "failed; stopping");
                shutdown.begin(Duration::ZERO).await;
            }
        });
    }

    /// Returns when a task of this process has failed for too long: what is left looks alive and is not.
    pub async fn gave_up(&self) -> GaveUp {
        self.app.supervisor.gave_up().await
    }

    /// Stops in order and waits until everything has finished, at most `patience` long.
    pub async fn stop(self, drain: Duration, patience: Duration) {
        self.app.shutdown.begin(drain).await;
        if tokio::time::timeout(patience, self.tasks.wait()).await.is_err() {
            tracing::warn!("not everything finished in time; leaving the rest to the next start");
        }
        let _ = tokio::time::timeout(patience, self.app.db.close()).await;
    }
}

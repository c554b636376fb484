//! A reference `user-service`: the other side of the registration saga, small enough to read in one
//! sitting. `dev` and `demo` run it; it also runs as a process of its own.
//!
//! What it shows, for whoever writes a real one:
//! - every command is decided once, in one transaction with its effect, and the decision is kept: a
//!   command that comes again gets the same answer again ([`profiles`]);
//! - the answer is sent after the commit, and the command's offset is stored after the answer: a
//!   crash in between makes the command come again, which is harmless ([`consumer`]);
//! - what was erased stays erased: a `user.create` that arrives behind its `user.delete` makes no
//!   profile;
//! - asked by gRPC instead of Kafka, it takes the same decision in the same place ([`grpc`]).
//!
//! It does not check that names are unique: that is auth-service's promise.

use std::{io, net::SocketAddr, time::Duration};

use outbox_relay::{Database, PoolSettings};
use rdkafka::error::KafkaError;
use secrecy::{ExposeSecret, SecretString};
use sqlx::postgres::PgConnectOptions;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use self::{consumer::CommandConsumer, grpc::Calls, profiles::HouseRules};

pub(crate) mod commands;
mod consumer;
mod grpc;
pub(crate) mod profiles;
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a test looks at the database by itself")]
mod tests;

/// Enough for one consumer and a few calls at once.
const POOL: PoolSettings = PoolSettings {
    connections: 5,
    acquire_timeout: Duration::from_secs(30),
    work_timeout: Duration::from_secs(30),
    session: &[],
};

/// A running reference user-service.
#[derive(Debug)]
pub struct UserService {
    grpc_addr: SocketAddr,
    tasks: TaskTracker,
}

/// What it needs to run.
#[derive(Debug, Clone)]
pub struct UserServiceSettings {
    /// Its database; it makes its schema, `user_service`, and its tables itself.
    pub database_url: SecretString,
    /// `host:port`, comma-separated.
    pub kafka_brokers: String,
    /// Further librdkafka properties (TLS, SASL) for both consumer and producer.
    pub kafka_client: Vec<(String, String)>,
    /// Put before every topic name, as auth-service does.
    pub topic_prefix: String,
    /// Consumer group; replicas share it.
    pub group_id: String,
    /// Port 0 takes any free one.
    pub grpc_listen: SocketAddr,
    /// It refuses usernames that begin so, in any case: a way to see a refusal.
    pub refused_prefixes: Vec<String>,
}

/// Why it did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Its database can't be used.
    #[error("the user-service can't use its database; check its URL and that the server runs")]
    Database(#[from] sqlx::Error),
    /// A Kafka client could not be made.
    #[error("the user-service can't use Kafka; check the brokers and the security settings")]
    Kafka(#[from] KafkaError),
    /// Its gRPC address can't be listened on.
    #[error("the user-service can't listen on {address}; choose another address, or port 0 for any free port")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
}

impl UserService {
    /// Starts it. It runs until `shutdown`.
    pub async fn start(settings: UserServiceSettings, shutdown: CancellationToken) -> Result<Self, StartError> {
        let db = database(&settings.database_url).await?;
        let listen = |source| StartError::Listen { address: settings.grpc_listen, source };
        let listener = TcpListener::bind(settings.grpc_listen).await.map_err(listen)?;
        let grpc_addr = listener.local_addr().map_err(listen)?;
        let rules = HouseRules { refused_prefixes: settings.refused_prefixes.clone() };
        let consumer = CommandConsumer::new(&settings, db.clone(), rules.clone())?;

        let tasks = TaskTracker::new();
        tasks.spawn(Calls::new(db, rules).serve(listener, shutdown.clone()));
        tasks.spawn(consumer.run(shutdown));
        tasks.close();
        Ok(Self { grpc_addr, tasks })
    }

    /// Where its gRPC listens.
    pub fn grpc_addr(&self) -> SocketAddr {
        self.grpc_addr
    }

    /// Waits until it has stopped, which `shutdown` asks it to.
    pub async fn stopped(self) {
        self.tasks.wait().await;
    }
}

async fn database(url: &SecretString) -> Result<Database, sqlx::Error> {
    // A schema of its own, so that it can live in a database beside others.
    let options: PgConnectOptions = url.expose_secret().parse()?;
    let options = options.options([("search_path", "user_service")]);
    let db = Database::new(options, POOL);
    profiles::create_tables(&db).await?;
    Ok(db)
}

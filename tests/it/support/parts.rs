//! PostgreSQL and Kafka, started once for all tests of the run and gone when it ends, however it
//! ends: each child watches a pipe that this process holds.

use std::{
    env,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        LazyLock,
        atomic::{AtomicU32, Ordering},
    },
};

use auth_service::{
    dev::{
        broker::EmbeddedBroker,
        postgres::{PostgresOptions, PrivateCluster},
    },
    migrations,
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
};
use secrecy::ExposeSecret;
use sqlx::{Connection, Executor, PgConnection, postgres::PgConnectOptions};

const TEMPLATE: &str = "it_template";

/// The parts of this run.
pub static PARTS: LazyLock<Parts> = LazyLock::new(|| {
    // A runtime of its own, never dropped: tests come and go with theirs.
    let (sender, receiver) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Runtime::new().expect("a runtime");
        runtime.block_on(async {
            sender.send(Parts::start().await).expect("somebody waits for the parts");
            std::future::pending::<()>().await;
        });
    });
    receiver.recv().expect("the parts start")
});

static DATABASES: AtomicU32 = AtomicU32::new(0);

pub struct Parts {
    cluster: PrivateCluster,
    kafka: Kafka,
    /// Never written to: when this process ends, however it ends, the folder of the cluster goes.
    _sweeper: ChildStdin,
}

/// Waits for the end of whoever started it, then for PostgreSQL's, and takes the folder away. Nothing here is
/// ever dropped, and the folder of one run of all tests has two gigabytes.
const SWEEPER: &str = r#"
trap '' INT TERM HUP
read -r _
tries=0
while [ "$tries" -lt 600 ] && [ -n "$(find "$0" -maxdepth 3 -name postmaster.pid)" ]; do
    sleep 0.1
    tries=$((tries + 1))
done
rm -rf "$0"
"#;

enum Kafka {
    /// Somebody else's, or the one this run started.
    Real {
        brokers: String,
        _process: Option<Child>,
    },
    Embedded(EmbeddedBroker),
}

impl Parts {
    async fn start() -> Self {
        auth_service::crypto::install_provider();
        let scratch = tempfile::tempdir().expect("a scratch folder").keep();
        let mut sweeper = Command::new("/bin/sh");
        sweeper.args(["-c", SWEEPER]).arg(&scratch).stdout(Stdio::null()).stderr(Stdio::null());
        let sweeper = sweeper.stdin(Stdio::piped()).spawn().expect("a shell").stdin.take().expect("its input");
        let options = PostgresOptions { durable: false, max_connections: 600, port: 0 };
        let cluster = PrivateCluster::start(&scratch.join("postgres"), options).await.expect("PostgreSQL starts");
        let parts = Self { cluster, kafka: Kafka::start().await, _sweeper: sweeper };
        parts.cluster.create_database(TEMPLATE).await.expect("the template");
        migrations::run(&parts.connect_options(TEMPLATE)).await.expect("the migrations");
        parts
    }

    pub fn connect_options(&self, database: &str) -> PgConnectOptions {
        self.cluster.url(database).expose_secret().parse().expect("a database URL")
    }

    pub fn database_url(&self, database: &str) -> String {
        self.cluster.url(database).expose_secret().to_owned()
    }

    /// An empty database with the schema in it.
    pub async fn database(&self) -> String {
        self.copy_of(TEMPLATE).await
    }

    /// A database with nothing in it.
    pub async fn bare_database(&self) -> String {
        self.copy_of("template1").await
    }

    async fn copy_of(&self, template: &str) -> String {
        let name = format!("it_{}", DATABASES.fetch_add(1, Ordering::Relaxed));
        let mut conn = PgConnection::connect_with(&self.connect_options("postgres")).await.expect("the cluster");
        let sql = format!("create database {name} template {template}");
        // Tests run side by side, and a template can be copied by one session at a time.
        while let Err(error) = conn.execute(sqlx::AssertSqlSafe(sql.clone())).await {
            let busy = error.as_database_error().and_then(|e| e.code()).is_some_and(|code| code == "55006");
            assert!(busy, "{error}");
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        name
    }

    pub fn brokers(&self) -> String {
        match &self.kafka {
            Kafka::Real { brokers, .. } => brokers.clone(),
            Kafka::Embedded(broker) => broker.bootstrap_servers().to_owned(),
        }
    }

    /// Whether it is the embedded broker: no admin API, no transactions, no look-up by time.
    pub fn is_embedded(&self) -> bool {
        matches!(self.kafka, Kafka::Embedded(_))
    }

    pub async fn create_topics(&self, names: &[String]) {
        match &self.kafka {
            Kafka::Real { brokers, .. } => {
                let client: AdminClient<DefaultClientContext> =
                    ClientConfig::new().set("bootstrap.servers", brokers).create().expect("an admin client");
                let topics: Vec<_> =
                    names.iter().map(|name| NewTopic::new(name, 4, TopicReplication::Fixed(1))).collect();
                for created in client.create_topics(&topics, &AdminOptions::new()).await.expect("topics") {
                    created.expect("a topic");
                }
            }
            Kafka::Embedded(broker) => {
                for name in names {
                    broker.create_topic(name).await.expect("a topic");
                }
            }
        }
    }
}

impl Kafka {
    async fn start() -> Self {
        if let Ok(brokers) = env::var("KAFKA_BROKERS") {
            say(&format!("Kafka at {brokers} (KAFKA_BROKERS)"));
            return Kafka::Real { brokers, _process: None };
        }
        let has = |program: &str| Command::new(program).arg("-version").output().is_ok();
        if has("java") && has("mvn") {
            return Self::apache();
        }
        say("the embedded broker: there is no Java or no Maven for Apache Kafka");
        Kafka::Embedded(EmbeddedBroker::start(&[]).await.expect("the embedded broker starts"))
    }

    fn apache() -> Self {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/run");
        let mut process =
            Command::new(script).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("tests/kafka/run starts");
        let output = BufReader::new(process.stdout.take().expect("its output"));
        for line in output.lines().map_while(Result::ok) {
            if let Some(version) = line.strip_prefix("KAFKA_VERSION=") {
                say(&format!("Apache Kafka {version}"));
            }
            if let Some(brokers) = line.strip_prefix("KAFKA_BROKERS=") {
                return Kafka::Real { brokers: brokers.to_owned(), _process: Some(process) };
            }
        }
        let ended = process.wait();
        panic!("Apache Kafka did not start ({ended:?}): run tests/kafka/run by hand to see why");
    }
}

/// Past the test harness, which would show it only for tests that fail.
fn say(kafka: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "these tests run against {kafka}");
}

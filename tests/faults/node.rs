//! An Apache Kafka node that may be harmed: its own process, its data kept over a restart, and every
//! client behind a wire that breaks, because the address it tells them is the wire's.

use std::{path::Path, process::Stdio, time::Duration};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, AlterConfig, NewTopic, ResourceSpecifier, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
};
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
    sync::{Mutex, MutexGuard, OnceCell},
};

use crate::proxy::{Proxy, Wire};

/// Started when the first scenario wants it; one scenario at a time has it.
static NODE: OnceCell<Mutex<Node>> = OnceCell::const_new();

/// The node, with its wire whole.
pub async fn node() -> MutexGuard<'static, Node> {
    let mut node = NODE.get_or_init(|| async { Mutex::new(Node::start().await) }).await.lock().await;
    node.wire.set(Wire::Whole);
    if node.process.is_none() {
        node.up().await;
    }
    node
}

pub struct Node {
    pub wire: Proxy,
    data: tempfile::TempDir,
    port: u16,
    process: Option<(Child, Pid)>,
}

impl Node {
    async fn start() -> Self {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|taken| taken.local_addr()).expect("a port");
        let wire = Proxy::to(free.to_string()).await;
        let mut node = Self { wire, data: tempfile::tempdir().expect("a folder"), port: free.port(), process: None };
        node.up().await;
        node
    }

    /// Where clients begin, on the other side of the wire.
    pub fn brokers(&self) -> String {
        format!("127.0.0.1:{}", self.wire.port)
    }

    /// Starts it on the data it had.
    pub async fn up(&mut self) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/run");
        let mut child = Command::new(script)
            .args(["--data".as_ref(), self.data.path().as_os_str()])
            .args(["--port", &self.port.to_string()])
            .args(["--advertise", &self.wire.port.to_string()])
            .args(["--set", "producer.id.expiration.check.interval.ms=500"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("tests/kafka/run");
        let mut lines = BufReader::new(child.stdout.take().expect("its output")).lines();
        let mut pid = None;
        while let Some(line) = lines.next_line().await.expect("its output") {
            if let Some(text) = line.strip_prefix("KAFKA_PID=") {
                pid = text.parse().ok().map(Pid::from_raw);
            }
            if line.starts_with("KAFKA_BROKERS=") {
                self.process = Some((child, pid.expect("its pid")));
                return;
            }
        }
        panic!("Apache Kafka did not start: run tests/kafka/run by hand to see why");
    }

    /// How long it remembers a producer that says nothing; none: as long as by default.
    pub async fn remember_producers(&self, length: Option<Duration>) {
        let (client, options) = admin(&self.brokers());
        let length = length.map(|length| length.as_millis().to_string());
        let broker = AlterConfig::new(ResourceSpecifier::Broker(1));
        let change = length.iter().fold(broker, |change, length| change.set("producer.id.expiration.ms", length));
        for changed in client.alter_configs([&change], &options).await.expect("an answer") {
            changed.expect("changed");
        }
    }

    /// Kills it, as a power cut would.
    pub async fn kill(&mut self) {
        let Some((mut child, pid)) = self.process.take() else { return };
        kill(pid, Signal::SIGKILL).expect("it runs");
        let _ = child.wait().await;
    }
}

/// An admin client with short patience.
fn admin(brokers: &str) -> (AdminClient<DefaultClientContext>, AdminOptions) {
    let client = ClientConfig::new().set("bootstrap.servers", brokers).create().expect("an admin client");
    (client, AdminOptions::new().operation_timeout(Some(Duration::from_secs(20))))
}

/// Makes topics of four partitions, each as often copied as the cluster does by default.
pub async fn create_topics(brokers: &str, names: &[String], settings: &[(&str, &str)]) {
    let (client, options) = admin(brokers);
    let topics: Vec<_> = names
        .iter()
        .map(|name| {
            settings
                .iter()
                .fold(NewTopic::new(name, 4, TopicReplication::Fixed(-1)), |topic, (key, value)| topic.set(key, value))
        })
        .collect();
    for created in client.create_topics(&topics, &options).await.expect("topics") {
        created.expect("a topic");
    }
}

/// Where each partition of this topic ends for consumers that read what is committed, if there is more behind it.
pub async fn open_transactions(brokers: &str, topic: &str) -> [Option<i64>; 4] {
    let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
    let ends = move |isolation: &str| {
        let client: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &brokers)
            .set("isolation.level", isolation)
            .create()
            .expect("a consumer");
        let end = |partition| client.fetch_watermarks(&topic, partition, Duration::from_secs(20)).expect("its end").1;
        [0, 1, 2, 3].map(end)
    };
    // In this order: what is committed meanwhile is no difference.
    let look = move || (ends("read_uncommitted"), ends("read_committed"));
    let (all, committed) = tokio::task::spawn_blocking(look).await.expect("it looks");
    std::array::from_fn(|n| (committed[n] < all[n]).then_some(committed[n]))
}

/// Changes a setting of a topic.
pub async fn set_of_topic(brokers: &str, topic: &str, key: &str, value: &str) {
    let (client, options) = admin(brokers);
    let change = AlterConfig::new(ResourceSpecifier::Topic(topic)).set(key, value);
    for changed in client.alter_configs([&change], &options).await.expect("an answer") {
        changed.expect("changed");
    }
}

/// Takes topics away, with all that is in them. The controller answers before the brokers have heard of it, and until
/// then they take messages that go down with the topic: so this waits for them.
pub async fn delete_topics(brokers: &str, names: &[&str]) {
    let (client, options) = admin(brokers);
    for deleted in client.delete_topics(names, &options).await.expect("topics") {
        deleted.expect("a topic");
    }
    for name in names {
        let known = || client.inner().fetch_metadata(Some(name), Duration::from_secs(20)).expect("metadata");
        while known().topics().iter().any(|topic| topic.error().is_none()) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

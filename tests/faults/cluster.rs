//! Three Apache Kafka nodes that may be harmed, each behind a wire that breaks.

use std::{collections::BTreeSet, path::Path, process::Stdio, time::Duration};

use kafka_protocol::messages::{MetadataResponse, metadata_response::MetadataResponseTopic};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewPartitions, NewTopic, TopicReplication},
    client::DefaultClientContext,
};
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::{Mutex, MutexGuard, OnceCell},
    time::{Instant, sleep},
};

use crate::{
    protocol::{self, Coordinated},
    proxy::{Proxy, Wire},
};

pub const NODES: usize = 3;
const PATIENCE: Duration = Duration::from_secs(120);

/// Started when the first scenario wants it; one scenario at a time has it.
static CLUSTER: OnceCell<Mutex<Cluster>> = OnceCell::const_new();

/// The cluster, as good as new.
pub async fn cluster() -> MutexGuard<'static, Cluster> {
    let mut cluster = CLUSTER.get_or_init(|| async { Mutex::new(Cluster::start().await) }).await.lock().await;
    cluster.make_whole().await;
    cluster
}

pub struct Cluster {
    /// Of each node, the first being node 1's.
    pub wires: Vec<Proxy>,
    ports: [u16; NODES],
    dead: BTreeSet<usize>,
    frozen: BTreeSet<usize>,
    orders: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    _script: Child,
}

impl Cluster {
    async fn start() -> Self {
        let ports: [u16; NODES] = std::array::from_fn(|_| free_port());
        let mut wires = vec![];
        for port in ports {
            wires.push(Proxy::to(format!("127.0.0.1:{port}")).await);
        }
        let list =
            |ports: &mut dyn Iterator<Item = u16>| ports.map(|port| port.to_string()).collect::<Vec<_>>().join(",");
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kafka/run");
        let mut script = Command::new(script)
            .args(["--nodes", &NODES.to_string()])
            .args(["--port", &list(&mut ports.into_iter())])
            .args(["--advertise", &list(&mut wires.iter().map(|wire| wire.port))])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("tests/kafka/run");
        let orders = script.stdin.take().expect("its input");
        let answers = BufReader::new(script.stdout.take().expect("its output")).lines();
        let (dead, frozen) = (BTreeSet::new(), BTreeSet::new());
        let mut cluster = Self { wires, ports, dead, frozen, orders, answers, _script: script };
        while !cluster.next_line().await.starts_with("KAFKA_BROKERS=") {}
        cluster
    }

    async fn next_line(&mut self) -> String {
        let line = self.answers.next_line().await.expect("its output");
        line.expect("the cluster runs: tests/kafka/run --nodes 3 shows why it does not")
    }

    /// Where clients begin, on the other side of the wires.
    pub fn brokers(&self) -> String {
        self.wires.iter().map(|wire| format!("127.0.0.1:{}", wire.port)).collect::<Vec<_>>().join(",")
    }

    /// Everything up and in sync, every wire whole, and every partition led by its first replica.
    async fn make_whole(&mut self) {
        self.wires.iter().for_each(|wire| wire.set(Wire::Whole));
        let (frozen, dead): (Vec<_>, Vec<_>) =
            (self.frozen.iter().copied().collect(), self.dead.iter().copied().collect());
        self.thaw(&frozen).await;
        self.start_again(&dead).await;
        self.until_in_sync().await;
        protocol::elect_preferred_leaders(self.live_port()).await.expect("an answer");
    }

    async fn order(&mut self, what: &str, nodes: &[usize]) {
        if nodes.is_empty() {
            return;
        }
        let names: Vec<_> = nodes.iter().map(usize::to_string).collect();
        let line = format!("{what} {}\n", names.join(" "));
        self.orders.write_all(line.as_bytes()).await.expect("its input");
        for _ in nodes {
            let answer = self.next_line().await;
            assert!(answer.starts_with("KAFKA_NODE="), "{answer}");
        }
    }

    /// `kill -9`, as a power cut would.
    pub async fn kill(&mut self, nodes: &[usize]) {
        self.dead.extend(nodes);
        self.order("kill", nodes).await;
    }

    /// Ends them in good order: they hand over what they lead.
    pub async fn stop(&mut self, nodes: &[usize]) {
        self.dead.extend(nodes);
        self.order("stop", nodes).await;
    }

    /// On the data they had.
    pub async fn start_again(&mut self, nodes: &[usize]) {
        self.order("start", nodes).await;
        self.dead.retain(|node| !nodes.contains(node));
    }

    pub async fn freeze(&mut self, nodes: &[usize]) {
        self.frozen.extend(nodes);
        self.order("freeze", nodes).await;
    }

    pub async fn thaw(&mut self, nodes: &[usize]) {
        self.order("thaw", nodes).await;
        self.frozen.retain(|node| !nodes.contains(node));
    }

    /// A broker that can be asked, on this side of its wire.
    fn live_port(&self) -> u16 {
        let lives = |node: &usize| !self.dead.contains(node) && !self.frozen.contains(node);
        self.ports[(1..=NODES).find(lives).expect("one lives") - 1]
    }

    /// The node that leads this partition.
    pub async fn leader(&self, topic: &str, partition: i32) -> usize {
        self.until("a leader", |live| async move {
            let metadata = protocol::metadata(live).await.ok()?;
            let topic = metadata
                .topics
                .into_iter()
                .find(|known| known.name.as_ref().is_some_and(|name| name.0.as_str() == topic))?;
            let leader = topic.partitions.iter().find(|known| known.partition_index == partition)?.leader_id;
            usize::try_from(leader.0).ok()
        })
        .await
    }

    pub async fn controller(&self) -> usize {
        self.until("a controller", |live| async move { protocol::controller(live).await.ok().flatten() }).await
    }

    pub async fn coordinator(&self, what: Coordinated, of: &str) -> usize {
        self.until("a coordinator", |live| async move { protocol::coordinator(live, what, of).await.ok().flatten() })
            .await
    }

    /// Every partition has all its replicas in sync.
    pub async fn until_in_sync(&self) {
        self.until_partitions("every replica in sync", |isr, replicas, _| isr == replicas).await;
    }

    /// Every partition has a leader that lives.
    pub async fn until_led(&self) {
        let gone = |node: &usize| self.dead.contains(node) || self.frozen.contains(node);
        self.until_partitions("leaders that live", |_, _, leader| leader.is_some_and(|node| !gone(&node))).await;
    }

    async fn until_partitions(&self, what: &str, good: impl Fn(usize, usize, Option<usize>) -> bool) {
        let good = &good;
        self.until(what, |live| async move {
            let metadata = protocol::metadata(live).await.ok()?;
            let brokers = metadata.brokers.len() + self.dead.len() + self.frozen.len();
            let all = metadata.topics.iter().flat_map(|topic| &topic.partitions).all(|partition| {
                let leader = usize::try_from(partition.leader_id.0).ok();
                good(partition.isr_nodes.len(), partition.replica_nodes.len(), leader)
            });
            (all && brokers >= NODES).then_some(())
        })
        .await;
    }

    async fn until<T, F>(&self, what: &str, mut look: impl FnMut(u16) -> F) -> T
    where
        F: Future<Output = Option<T>>,
    {
        let since = Instant::now();
        loop {
            if let Some(found) = look(self.live_port()).await {
                return found;
            }
            assert!(since.elapsed() < PATIENCE, "waited {PATIENCE:?} in vain for {what}");
            sleep(Duration::from_millis(100)).await;
        }
    }

    /// Moves every partition's leadership to the next node: by another order of its replicas, and an election.
    pub async fn move_leaders(&self, topic: &str, partitions: i32, first: usize) {
        let nodes = |partition: usize| (0..NODES).map(|n| (partition + first + n) % NODES + 1).collect();
        let replicas: Vec<_> = (0..partitions).map(|partition| (partition, nodes(partition as usize))).collect();
        let (port, replicas) = (self.live_port(), &replicas);
        self.until("the reassignment", |_| async move {
            protocol::reassign(port, topic, replicas).await.ok().filter(|&begun| begun).map(drop)
        })
        .await;
        protocol::elect_preferred_leaders(port).await.expect("an answer");
    }

    /// Deletes a topic and makes it again at once. Returns when every broker knows the new one: until then, some
    /// take messages that go down with the old one.
    pub async fn make_again(&self, topic: &str) {
        let id = |metadata: MetadataResponse| {
            let is_it =
                |known: &&MetadataResponseTopic| known.name.as_ref().is_some_and(|name| name.0.as_str() == topic);
            metadata.topics.iter().find(is_it).filter(|known| known.error_code == 0).map(|known| known.topic_id)
        };
        let old = id(protocol::metadata(self.live_port()).await.expect("metadata"));
        let client: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", self.brokers()).create().expect("an admin client");
        let deleted = client.delete_topics(&[topic], &AdminOptions::new()).await.expect("an answer");
        deleted.into_iter().for_each(|topic| drop(topic.expect("deleted")));
        let new = NewTopic::new(topic, 4, TopicReplication::Fixed(-1));
        // The controller may still be at it.
        while !client.create_topics([&new], &AdminOptions::new()).await.expect("an answer").iter().all(Result::is_ok) {
            sleep(Duration::from_millis(10)).await;
        }
        for port in self.ports {
            self.until("every broker to know the new topic", |_| async move {
                id(protocol::metadata(port).await.ok()?).filter(|now| Some(*now) != old).map(drop)
            })
            .await;
        }
    }

    pub async fn add_partitions(&self, topic: &str, total: usize) {
        let client: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", self.brokers()).create().expect("an admin client");
        let added = client.create_partitions(&[NewPartitions::new(topic, total)], &AdminOptions::new()).await;
        added.expect("an answer").into_iter().for_each(|topic| drop(topic.expect("added")));
    }
}

/// Below the range from which the kernel takes the ports of outgoing connections: a broker that is down for a while has to
/// find its port free again.
fn free_port() -> u16 {
    loop {
        let port = rand::random_range(20_000..32_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

//! librdkafka's own mock cluster as an embedded broker: the real protocol on 127.0.0.1, for clients
//! of any kind, with nothing to install.
//!
//! What it is not: everything in it is gone when the process ends; a partition keeps about 5 MiB
//! and silently drops what is older; there is no admin API; no guarantee of Kafka's may be measured
//! on it. Its port is any free one, because its metadata names that port to the clients: for a fixed
//! bootstrap address see [`Forwarder`](super::forward::Forwarder).

use std::{sync::mpsc, thread};

use rdkafka::{error::KafkaError, mocking::MockCluster, producer::DefaultProducerContext};
use tokio::sync::oneshot;

/// Partitions of each topic; the number topics get that a client brings into being.
const PARTITIONS: i32 = 4;

/// There is one broker; -1 means every one.
const ALL_BROKERS: i32 = -1;

/// A running embedded broker. It ends with this value; drop consumers first, since closing one
/// whose broker is gone never ends.
#[derive(Debug)]
pub struct EmbeddedBroker {
    bootstrap_servers: String,
    orders: Option<mpsc::Sender<Order>>,
    thread: Option<thread::JoinHandle<()>>,
}

/// Why the broker did not do as told.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The library refused.
    #[error("the embedded Kafka broker failed to {what}")]
    Kafka {
        /// What was asked of it.
        what: &'static str,
        /// Its answer.
        source: KafkaError,
    },
    /// Its thread could not be started, or is gone.
    #[error("the embedded Kafka broker is not running: start again")]
    Gone,
}

type Cluster = MockCluster<'static, DefaultProducerContext>;
type Job = Box<dyn FnOnce(&Cluster) -> Result<(), KafkaError> + Send>;

/// The mock cluster can't leave the thread it was made on, so the thread takes orders.
struct Order {
    what: &'static str,
    run: Job,
    done: oneshot::Sender<Result<(), BrokerError>>,
}

impl EmbeddedBroker {
    /// Starts a broker that has these topics.
    pub async fn start(topics: &[&str]) -> Result<Self, BrokerError> {
        let (orders, taken) = mpsc::channel::<Order>();
        let (started, start) = oneshot::channel();
        let thread = thread::Builder::new()
            .name("embedded-broker".to_owned())
            .spawn(move || {
                let cluster = match MockCluster::new(1) {
                    Ok(cluster) => cluster,
                    Err(source) => return drop(started.send(Err(BrokerError::Kafka { what: "start", source }))),
                };
                if started.send(Ok(cluster.bootstrap_servers())).is_err() {
                    return;
                }
                for Order { what, run, done } in taken {
                    let result = run(&cluster).map_err(|source| BrokerError::Kafka { what, source });
                    // Whoever asked may have stopped waiting.
                    let _ = done.send(result);
                }
            })
            .map_err(|_| BrokerError::Gone)?;
        let bootstrap_servers = start.await.map_err(|_| BrokerError::Gone)??;
        let broker = Self { bootstrap_servers, orders: Some(orders), thread: Some(thread) };
        for topic in topics {
            broker.create_topic(topic).await?;
        }
        Ok(broker)
    }

    /// The address clients begin with.
    pub fn bootstrap_servers(&self) -> &str {
        &self.bootstrap_servers
    }

    /// Adds a topic.
    pub async fn create_topic(&self, name: &str) -> Result<(), BrokerError> {
        let name = name.to_owned();
        self.order("create a topic", move |cluster| cluster.create_topic(&name, PARTITIONS, 1)).await
    }

    /// An outage: cuts all connections and takes no new ones. What is stored stays.
    pub async fn down(&self) -> Result<(), BrokerError> {
        self.order("go down", |cluster| cluster.broker_down(ALL_BROKERS)).await
    }

    /// The outage is over.
    pub async fn up(&self) -> Result<(), BrokerError> {
        self.order("come up", |cluster| cluster.broker_up(ALL_BROKERS)).await
    }

    async fn order(
        &self,
        what: &'static str,
        run: impl FnOnce(&Cluster) -> Result<(), KafkaError> + Send + 'static,
    ) -> Result<(), BrokerError> {
        let (done, answer) = oneshot::channel();
        let orders = self.orders.as_ref().ok_or(BrokerError::Gone)?;
        orders.send(Order { what, run: Box::new(run), done }).map_err(|_| BrokerError::Gone)?;
        answer.await.map_err(|_| BrokerError::Gone)?
    }
}

impl Drop for EmbeddedBroker {
    fn drop(&mut self) {
        drop(self.orders.take());
        // Joined, so that the library's threads are down before the process goes on to end.
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::warn!("the embedded Kafka broker's thread panicked");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rdkafka::{
        ClientConfig, Message,
        consumer::{Consumer, StreamConsumer},
        producer::{FutureProducer, FutureRecord},
    };
    use tokio::time::timeout;

    use super::*;

    fn client(broker: &EmbeddedBroker) -> ClientConfig {
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", broker.bootstrap_servers());
        client
    }

    #[tokio::test]
    async fn a_message_sent_during_an_outage_arrives_after_it() {
        let broker = EmbeddedBroker::start(&["user.create"]).await.expect("a broker");
        let producer: FutureProducer = client(&broker).create().expect("a producer");
        let send = |payload: &'static str| {
            producer.send_result(FutureRecord::to("user.create").key("1").payload(payload)).expect("queued")
        };

        send("before").await.expect("a report").expect("delivered");
        broker.down().await.expect("down");
        let during = send("during");
        broker.up().await.expect("up");
        timeout(Duration::from_secs(20), during).await.expect("in time").expect("a report").expect("delivered");

        let consumer: StreamConsumer = client(&broker)
            .set("group.id", "reader")
            .set("auto.offset.reset", "earliest")
            .create()
            .expect("a consumer");
        consumer.subscribe(&["user.create"]).expect("subscribed");
        let mut read = Vec::new();
        while read.len() < 2 {
            let message = timeout(Duration::from_secs(20), consumer.recv()).await.expect("in time").expect("a message");
            read.push(String::from_utf8_lossy(message.payload().unwrap_or_default()).into_owned());
        }
        assert_eq!(read, ["before", "during"]);
    }
}

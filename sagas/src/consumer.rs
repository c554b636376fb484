//! The reply consumer. The only file of this crate that knows rdkafka.
//!
//! At least once: an offset is stored only after the message's transaction has committed, and a
//! message that comes again is known to the inbox. One message after the other: a reply costs a
//! millisecond or two, and replicas share the partitions.

use std::{collections::BTreeMap, time::Duration};

use outbox_relay::{Database, fault_points};
use rdkafka::{
    ClientConfig, ClientContext, Message,
    config::RDKafkaLogLevel,
    consumer::{Consumer, ConsumerContext, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{BorrowedMessage, Headers},
};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use crate::{
    orchestrator::{Flows, Orchestrator, SagaError},
    reply::{Received, header_text},
};

/// How replies are read.
#[derive(Debug, Clone)]
pub struct ConsumerSettings {
    /// `host:port`, comma-separated.
    pub brokers: String,
    /// Consumer group; replicas of one system share it.
    pub group_id: String,
    /// Further librdkafka properties: TLS, SASL.
    pub client: Vec<(String, String)>,
}

const RETRY: Duration = Duration::from_millis(500);
/// Attempts at a message that fails by itself, before it is put aside.
const PATIENCE: u32 = 3;
const LEAVE: Duration = Duration::from_secs(5);
/// A missing reply topic is looked for again this often: topics may be created after us.
const TOPIC_REFRESH_MS: &str = "10000";

struct Context;
impl ClientContext for Context {
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::warn!(kafka.error = %error, "kafka consumer: {reason}");
    }
}
impl ConsumerContext for Context {}

impl<F: Flows> Orchestrator<F> {
    /// Reads replies until `shutdown`. A consumer that fails for good is replaced.
    pub async fn consume(self, db: Database, settings: ConsumerSettings, shutdown: CancellationToken) {
        while !shutdown.is_cancelled() {
            match self.consume_once(&db, &settings, &shutdown).await {
                Ok(()) => return,
                Err(error) => {
                    tracing::error!(%error, "reply consumer failed; making a new one");
                    metrics::counter!("saga_consumers_replaced_total").increment(1);
                    shutdown.run_until_cancelled(sleep(RETRY * 2)).await;
                }
            }
        }
    }

    /// All topics replies come on, with the configured prefix.
    pub fn reply_topics(&self) -> Vec<String> {
        let prefix = &self.inner.settings.topic_prefix;
        let topics = self.inner.definitions.iter().flat_map(|definition| definition.reply_topics());
        let mut topics: Vec<String> = topics.map(|topic| format!("{prefix}{topic}")).collect();
        topics.sort();
        topics.dedup();
        topics
    }

    async fn consume_once(
        &self,
        db: &Database,
        settings: &ConsumerSettings,
        shutdown: &CancellationToken,
    ) -> Result<(), KafkaError> {
        let mut config = ClientConfig::new();
        settings.client.iter().for_each(|(property, value)| {
            config.set(property, value);
        });
        let consumer: StreamConsumer<Context> = config
            .set("bootstrap.servers", &settings.brokers)
            .set("group.id", &settings.group_id)
            .set("enable.auto.commit", "true")
            .set("auto.commit.interval.ms", "1000")
            .set("enable.auto.offset.store", "false")
            // A reply that came before this group ever read is still a reply.
            .set("auto.offset.reset", "earliest")
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", "10000")
            // A database that is away for minutes holds one message up: that must not cost the
            // partitions, which would only move the wait elsewhere.
            .set("max.poll.interval.ms", "900000")
            .set("topic.metadata.refresh.interval.ms", TOPIC_REFRESH_MS)
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.keepalive.enable", "true")
            .set_log_level(RDKafkaLogLevel::Warning)
            .create_with_context(Context)?;
        let topics = self.reply_topics();
        consumer.subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())?;

        let mut cluster_id: Option<String> = None;
        let result = loop {
            let next = shutdown.run_until_cancelled(consumer.recv()).await;
            match next {
                None => break Ok(()),
                Some(Err(error)) if is_over(&error) => break Err(error),
                // Brokers that are down, topics that are not there yet: it goes on by itself.
                Some(Err(error)) => tracing::debug!(%error, "nothing to read"),
                Some(Ok(message)) => {
                    let id = match &cluster_id {
                        Some(id) => id,
                        None => {
                            let Some(id) = cluster_id_of(&consumer) else {
                                // A place in an unknown cluster is no place: ask again.
                                tracing::warn!("the Kafka cluster does not say its id; trying again");
                                break Err(KafkaError::ClientCreation("no cluster id".to_owned()));
                            };
                            cluster_id.insert(id)
                        }
                    };
                    let received = self.received(&message, id);
                    fault_points::reached("sagas::received");
                    if !self.handle(db, &received, shutdown).await {
                        break Ok(());
                    }
                    fault_points::reached("sagas::committed");
                    if let Err(error) = consumer.store_offset_from_message(&message) {
                        // The partition has moved to another replica, who reads the message again.
                        tracing::debug!(%error, "offset not stored");
                    }
                    fault_points::reached("sagas::offset_stored");
                }
            }
        };
        leave(consumer).await;
        result
    }

    /// Takes one message in, however long the database is away. `false`: told to stop before it was.
    async fn handle(&self, db: &Database, message: &Received, shutdown: &CancellationToken) -> bool {
        let mut panics = 0;
        let mut refusals = 0;
        loop {
            let (orchestrator, db_, message_) = (self.clone(), db.clone(), message.clone());
            // A task of its own: a panic ends this attempt, not the consumer.
            let attempt = tokio::spawn(async move { orchestrator.receive(&db_, &message_).await }).await;
            match attempt {
                Ok(Ok(outcome)) => {
                    tracing::debug!(
                        topic = message.topic,
                        offset = message.offset,
                        outcome = outcome.as_str(),
                        "reply taken in"
                    );
                    return true;
                }
                Ok(Err(error)) => {
                    self.explain(message, &error);
                    // The database is there and will not have it: asking again for ever would hold up
                    // everything behind it.
                    refusals += u32::from(error.is_the_messages_fault());
                    let why = format!("the database refused it {refusals} times: {error}");
                    if refusals >= PATIENCE && self.reject(db, message, &why).await.is_ok() {
                        return true;
                    }
                }
                Err(panic) => {
                    panics += 1;
                    tracing::error!(topic = message.topic, offset = message.offset, %panic, "handling a reply panicked");
                    if panics >= PATIENCE
                        && self.reject(db, message, "the handler panicked on it every time").await.is_ok()
                    {
                        return true;
                    }
                }
            }
            if shutdown.run_until_cancelled(sleep(RETRY)).await.is_none() {
                return false;
            }
        }
    }

    fn explain(&self, message: &Received, error: &SagaError) {
        metrics::counter!("saga_reply_retries_total").increment(1);
        tracing::warn!(
            topic = message.topic, partition = message.partition, offset = message.offset, %error,
            "reply not taken in yet; trying again"
        );
    }

    fn received(&self, message: &BorrowedMessage<'_>, cluster_id: &str) -> Received {
        let prefix = self.inner.settings.topic_prefix.as_str();
        let headers = message.headers().map_or_else(BTreeMap::new, |headers| {
            headers.iter().map(|header| (header.key.to_owned(), header_text(header.value))).collect()
        });
        Received {
            topic: message.topic().strip_prefix(prefix).unwrap_or(message.topic()).to_owned(),
            partition: message.partition(),
            offset: message.offset(),
            timestamp_ms: message.timestamp().to_millis().unwrap_or(0),
            cluster_id: cluster_id.to_owned(),
            key: message.key().map(<[u8]>::to_vec),
            headers,
            payload: message.payload().map(<[u8]>::to_vec),
        }
    }
}

/// Closing commits the stored offsets and leaves the group. It blocks, and with brokers that are away
/// it may never end: so it has a thread of its own, which nobody waits for for long.
async fn leave(consumer: StreamConsumer<Context>) {
    let (done, left) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        drop(consumer);
        let _ = done.send(());
    });
    if tokio::time::timeout(LEAVE, left).await.is_err() {
        tracing::warn!("the consumer group was not left in time; its partitions move when the session times out");
    }
}

/// Known to the client since its first metadata answer, so this does not wait.
fn cluster_id_of(consumer: &StreamConsumer<Context>) -> Option<String> {
    consumer.client().fetch_cluster_id(Duration::from_secs(5))
}

fn is_over(error: &KafkaError) -> bool {
    matches!(error, KafkaError::MessageConsumptionFatal(_))
        || error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal)
}

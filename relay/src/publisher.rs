//! The Kafka producer. The only file of this crate that knows rdkafka, beside the reader of `verify`.
//!
//! Messages are enqueued synchronously and in order; reports come back over a channel, in whatever
//! order the broker gives them. (The future-based producer sleeps and tries again when its queue is
//! full, and other sends overtake it meanwhile.)

use std::{borrow::Cow, fmt, time::Duration};

use rdkafka::{
    ClientConfig, ClientContext, Message,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode as Code},
    message::{DeliveryResult, Header, OwnedHeaders},
    producer::{BaseRecord, Producer, ProducerContext, PurgeConfig, ThreadedProducer},
};
use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor},
};
use tokio::{sync::mpsc, task::JoinSet};

use crate::{
    delivery::PendingRow,
    fault::Fault,
    logging::{Throttle, truncated},
    position::Position,
};

/// How a message reaches Kafka; the parts an operator may set.
#[derive(Clone)]
pub struct KafkaSettings {
    /// `host:port`, comma-separated.
    pub brokers: String,
    /// Further librdkafka properties: client.id, TLS, SASL. What this crate's guarantees rest on can't be set.
    pub client: Vec<(String, String)>,
}

/// The names of the properties alone: a value may be a password.
impl fmt::Debug for KafkaSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client: Vec<_> = self.client.iter().map(|(name, _)| name).collect();
        f.debug_struct("KafkaSettings").field("brokers", &self.brokers).field("client", &client).finish()
    }
}

/// Properties the order and durability of messages rest on.
const GUARDED: [&str; 13] = [
    "acks",
    "request.required.acks",
    "enable.idempotence",
    "partitioner",
    "max.in.flight",
    "max.in.flight.requests.per.connection",
    "message.timeout.ms",
    "delivery.timeout.ms",
    "retries",
    "message.send.max.retries",
    "queuing.strategy",
    "transactional.id",
    "transaction.timeout.ms",
];

/// A broker that has not answered a request for so long is taken for dead: the connection is closed, and the request
/// goes to whoever leads the partition by then. Shorter than [`RelaySettings::delivery_timeout`], so that a frozen
/// leader costs a wait and no duplicates: the client sends the same sequence numbers again, and the broker knows them.
///
/// [`RelaySettings::delivery_timeout`]: crate::RelaySettings
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// The client would find a topic that was deleted and made again after five minutes only.
const METADATA_REFRESH: Duration = Duration::from_secs(10);
const METADATA_TIMEOUT: Duration = Duration::from_secs(1);

/// Why there is no producer.
#[derive(Debug, thiserror::Error)]
pub enum PublisherError {
    /// A property that must not be changed was given.
    #[error("Kafka client property {0:?} can't be set: the relay's guarantees rest on it")]
    Guarded(String),
    /// librdkafka refused the configuration. The value is not shown: it may be a secret.
    #[error("Kafka client property {property:?} was refused: {reason}")]
    Refused {
        /// Its name.
        property: String,
        /// Why.
        reason: String,
    },
    /// The client could not be made.
    #[error("the Kafka client could not be started: {0}")]
    Client(String),
}

/// What became of a message that was enqueued.
#[derive(Debug)]
pub(crate) struct Report {
    pub row_id: i64,
    /// As given with the message.
    pub reign: u64,
    pub result: Result<Position, Failure>,
}

/// A failure, classified, with the client's own words.
#[derive(Debug)]
pub(crate) struct Failure {
    pub fault: Fault,
    pub reason: String,
}

impl From<&KafkaError> for Failure {
    fn from(error: &KafkaError) -> Self {
        Self { fault: classify(error), reason: error.to_string() }
    }
}

/// Why a message was not even enqueued.
#[derive(Debug)]
pub(crate) enum NotEnqueued {
    /// The queue is full: wait for reports and go on.
    QueueFull,
    /// It failed on the spot.
    Failed(Failure),
}

/// An idempotent producer with its reports.
pub(crate) struct Publisher {
    producer: ThreadedProducer<Reports>,
    reports: mpsc::UnboundedReceiver<Report>,
}

impl Publisher {
    /// The client itself tries for `delivery_timeout` to deliver one message, or to commit a transaction under the
    /// name of a `fence`.
    pub(crate) fn new(
        settings: &KafkaSettings,
        window: usize,
        delivery_timeout: Duration,
        fence: Option<&str>,
    ) -> Result<Self, PublisherError> {
        // Unbounded, yet never longer than the window: every report answers one message in it.
        let (sender, reports) = mpsc::unbounded_channel();
        let mut config = ClientConfig::new();
        for (property, value) in &settings.client {
            if GUARDED.contains(&property.as_str()) {
                return Err(PublisherError::Guarded(property.clone()));
            }
            config.set(property, value);
        }
        config
            .set("bootstrap.servers", &settings.brokers)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            // As Java and kafkajs clients spread keys, so that consumers can join by partition.
            .set("partitioner", "murmur2_random")
            // The default here differs from the Java client's: an unknown topic must not come into
            // being with default settings because of a spelling mistake.
            .set("allow.auto.create.topics", "false")
            // kafkajs reads only uncompressed and gzip batches without plug-ins.
            .set("compression.type", "none")
            .set("linger.ms", "1")
            .set("message.timeout.ms", delivery_timeout.as_millis().to_string())
            .set("socket.timeout.ms", ANSWER_TIMEOUT.as_millis().to_string())
            .set("topic.metadata.refresh.interval.ms", METADATA_REFRESH.as_millis().to_string())
            .set("topic.metadata.propagation.max.ms", "5000")
            .set("queue.buffering.max.messages", (window * 2).max(1000).to_string())
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "1000")
            .set("socket.keepalive.enable", "true")
            .set("statistics.interval.ms", "0")
            // Brokers that moved to other addresses are found by asking the configured ones again.
            .set("metadata.recovery.strategy", "rebootstrap");
        config.set_log_level(RDKafkaLogLevel::Warning);
        if let Some(name) = fence {
            config
                .set("transactional.id", name)
                .set("transaction.timeout.ms", delivery_timeout.as_millis().to_string())
                // A transaction can't begin before the broker is done with the last one, which takes it a moment.
                .set("retry.backoff.ms", "10");
        }
        let producer = config.create_with_context(Reports(sender)).map_err(refused)?;
        Ok(Self { producer, reports })
    }

    /// Hands one row to the client. Its report comes later, unless this fails.
    /// `reign` comes back with the report.
    pub(crate) fn enqueue(&self, row: &PendingRow, reign: u64) -> Result<(), NotEnqueued> {
        let headers = headers_of(row).map_err(|error| {
            NotEnqueued::Failed(Failure {
                fault: Fault::Message,
                reason: format!("its headers are not texts: {error}"),
            })
        })?;
        let record = BaseRecord::with_opaque_to(&row.topic, Box::new((row.id, reign)))
            .key(&*row.key)
            .payload(&row.payload)
            .headers(headers);
        self.producer.send(record).map_err(|(error, _)| match error {
            KafkaError::MessageProduction(Code::QueueFull) => NotEnqueued::QueueFull,
            other => NotEnqueued::Failed(Failure::from(&other)),
        })
    }

    /// Makes the broker abort whatever an earlier producer of this fence's name left open, and refuse
    /// whatever it still sends. Answers with the reason when that did not come about in time.
    pub(crate) async fn raise_fence(&self, patience: Duration) -> Result<(), String> {
        self.blocking(move |producer| producer.init_transactions(patience)).await
    }

    /// Begins a transaction.
    pub(crate) fn begin(&self) -> Result<(), String> {
        self.producer.begin_transaction().map_err(|error| error.to_string())
    }

    /// Commits the transaction. An error may tell of one that was committed all the same.
    pub(crate) async fn commit(&self, patience: Duration) -> Result<(), String> {
        self.blocking(move |producer| producer.commit_transaction(patience)).await
    }

    /// Aborts the transaction.
    pub(crate) async fn abort(&self, patience: Duration) -> Result<(), String> {
        self.blocking(move |producer| producer.abort_transaction(patience)).await
    }

    /// Ends the producer, and waits for it.
    pub(crate) async fn end(self, patience: Duration) {
        let ended = tokio::task::spawn_blocking(move || drop(self));
        if tokio::time::timeout(patience, ended).await.is_err() {
            tracing::warn!("a Kafka producer does not end; going on without it");
        }
    }

    async fn blocking(
        &self,
        call: impl FnOnce(&ThreadedProducer<Reports>) -> Result<(), KafkaError> + Send + 'static,
    ) -> Result<(), String> {
        let producer = self.producer.clone();
        let called = tokio::task::spawn_blocking(move || call(&producer)).await;
        called.map_err(|panic| panic.to_string())?.map_err(|error| error.to_string())
    }

    /// Asks the cluster about these topics, whose pause has ended. Without that the client would refuse their
    /// messages by what it remembers, although the topic was made meanwhile. No answer within a second is no
    /// harm: their next message fails, and they are paused again.
    pub(crate) async fn refresh_metadata(&self, topics: Vec<String>) {
        let mut asked = JoinSet::new();
        for topic in topics {
            let producer = self.producer.clone();
            asked.spawn_blocking(move || {
                let answer = producer.client().fetch_metadata(Some(&topic), METADATA_TIMEOUT);
                (topic, answer.err())
            });
        }
        while let Some(answer) = asked.join_next().await {
            if let Ok((topic, Some(error))) = answer {
                tracing::debug!(topic, %error, "no metadata of a paused topic");
            }
        }
    }

    /// The next report; waits for one.
    pub(crate) async fn report(&mut self) -> Option<Report> {
        self.reports.recv().await
    }

    /// The next report, if one is there.
    pub(crate) fn report_now(&mut self) -> Option<Report> {
        self.reports.try_recv().ok()
    }

    /// Gives up everything that is queued or in flight, so that a relay that has lost its lanes
    /// stops appending. What is on the wire may still arrive: a copy under a known message id.
    pub(crate) fn purge(&self) {
        self.producer.purge(PurgeConfig::default().queue().inflight());
    }
}

/// The stored headers, and those that only the database knew.
fn headers_of(row: &PendingRow) -> Result<OwnedHeaders, serde_json::Error> {
    let mut headers = stored_headers(row.headers.get())?;
    for (key, value) in row.own_headers() {
        headers = headers.insert(Header { key, value: Some(&value) });
    }
    Ok(headers)
}

/// The headers of a row as the database holds them: a JSON object of texts.
pub(crate) fn stored_headers(json: &str) -> Result<OwnedHeaders, serde_json::Error> {
    serde_json::Deserializer::from_str(json).deserialize_map(StoredHeaders)
}

/// Reads a JSON object of texts straight into the client's own form.
struct StoredHeaders;

#[derive(Deserialize)]
struct Text<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> Visitor<'de> for StoredHeaders {
    type Value = OwnedHeaders;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of texts")
    }

    fn visit_map<M: MapAccess<'de>>(self, mut map: M) -> Result<OwnedHeaders, M::Error> {
        let mut headers = OwnedHeaders::new_with_capacity(16);
        while let Some((Text(key), Text(value))) = map.next_entry()? {
            headers = headers.insert(Header { key: &key, value: Some(&*value) });
        }
        Ok(headers)
    }
}

/// Why no client could be made, without the value that was refused.
pub(crate) fn refused(error: KafkaError) -> PublisherError {
    match error {
        KafkaError::ClientConfig(_, reason, property, _) => PublisherError::Refused { property, reason },
        other => PublisherError::Client(other.to_string()),
    }
}

/// What the producers of this process say of themselves. Shared: a broker that is away is one fault, however many
/// producers notice it.
static CLIENT_LINES: Throttle<String> = Throttle::new();

/// A message got through after none did: what the client said before is over.
pub(crate) fn recovered() {
    if let Some(over) = CLIENT_LINES.recovered() {
        let (lines, seconds) = (over.occurrences, over.lasted.as_secs());
        tracing::info!(lines, seconds, "Kafka takes messages again");
    }
}

/// Passes delivery reports from the client's thread to the worker.
struct Reports(mpsc::UnboundedSender<Report>);

impl ClientContext for Reports {
    /// The client logs it too.
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(kafka.error = %error, "kafka producer: {}", truncated(reason));
    }

    /// One line a minute for each of the client's kinds of lines: without brokers it has hundreds.
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        let Some(line) = CLIENT_LINES.occurred(facility.to_owned()) else { return };
        let (text, left_out) = (truncated(text), line.left_out);
        match level {
            RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", facility, "{text}"),
            RDKafkaLogLevel::Info | RDKafkaLogLevel::Notice => {
                tracing::info!(target: "librdkafka", facility, left_out, "{text}");
            }
            _ => tracing::warn!(target: "librdkafka", facility, left_out, "{text}"),
        }
    }
}

impl ProducerContext for Reports {
    type DeliveryOpaque = Box<(i64, u64)>;

    fn delivery(&self, result: &DeliveryResult<'_>, opaque: Box<(i64, u64)>) {
        let (row_id, reign) = *opaque;
        let result = match result {
            Ok(message) => {
                let (partition, offset) = (message.partition(), message.offset());
                Position::new(partition, offset).ok_or_else(|| Failure {
                    fault: Fault::NoPosition,
                    reason: format!("reported as delivered to partition {partition} without an offset ({offset})"),
                })
            }
            Err((error, _)) => Err(Failure::from(error)),
        };
        // The receiver is gone only when the worker is: nobody is left to tell.
        let _ = self.0.send(Report { row_id, reign, result });
    }
}

/// Whose fault an error is. Whatever is not known to be the message's or the topic's own is the
/// broker's: it is tried again, and nothing is parked for a fault that may pass.
fn classify(error: &KafkaError) -> Fault {
    let Some(code) = error.rdkafka_error_code() else { return Fault::Broker };
    match code {
        Code::MessageTimedOut => Fault::TimedOut,
        Code::Fatal | Code::OutOfOrderSequenceNumber | Code::Fenced | Code::State => Fault::Producer,
        Code::MessageSizeTooLarge
        | Code::InvalidMessage
        | Code::InvalidMessageSize
        | Code::InvalidRecord
        | Code::BadMessage
        | Code::InvalidArgument => Fault::Message,
        Code::UnknownTopic
        | Code::UnknownTopicOrPartition
        | Code::UnknownPartition
        | Code::InvalidTopic
        | Code::TopicAuthorizationFailed => Fault::Topic,
        _ => Fault::Broker,
    }
}

#[cfg(test)]
mod implicit_acknowledgement;

#[cfg(test)]
mod tests {
    use rdkafka::{mocking::MockCluster, types::RDKafkaRespErr};
    use serde_json::value::RawValue;
    use sqlx::types::Json;

    use super::*;

    fn fault_of(code: Code) -> Fault {
        classify(&KafkaError::MessageProduction(code))
    }

    #[test]
    fn only_a_message_of_its_own_fault_is_parked() {
        assert_eq!(fault_of(Code::MessageSizeTooLarge), Fault::Message);
        assert_eq!(fault_of(Code::InvalidRecord), Fault::Message);
        for passing in [
            Code::BrokerTransportFailure,
            Code::AllBrokersDown,
            Code::NotEnoughReplicas,
            Code::NotLeaderForPartition,
            Code::PurgeQueue,
            Code::ClusterAuthorizationFailed,
        ] {
            assert_eq!(fault_of(passing), Fault::Broker, "{passing:?}");
        }
        assert_eq!(fault_of(Code::MessageTimedOut), Fault::TimedOut);
    }

    #[test]
    fn a_missing_topic_is_not_the_messages_fault() {
        assert_eq!(fault_of(Code::UnknownTopicOrPartition), Fault::Topic);
        assert_eq!(fault_of(Code::TopicAuthorizationFailed), Fault::Topic);
    }

    /// What the client remembers of a topic must not outlive the topic's absence by minutes.
    #[tokio::test(flavor = "multi_thread")]
    async fn a_topic_that_is_made_again_takes_messages_as_soon_as_the_cluster_was_asked() {
        let cluster = MockCluster::new(1).expect("the mock cluster starts");
        cluster.create_topic("t", 1, 1).expect("a topic");
        let missing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
        cluster.topic_error("t", missing).expect("the topic is hidden");
        let settings = KafkaSettings { brokers: cluster.bootstrap_servers(), client: vec![] };
        let mut publisher = Publisher::new(&settings, 10, Duration::from_secs(60), None).expect("a producer");
        let row = PendingRow {
            id: 1,
            lane: 0,
            key: "k".into(),
            seq: 1,
            topic: "t".into(),
            payload: vec![],
            headers: Json(RawValue::from_string("{}".to_owned()).expect("an object")),
            replay_of: None,
            created_at: chrono::DateTime::UNIX_EPOCH,
            published_seq: 0,
            blocked: false,
        };
        publisher.enqueue(&row, 0).expect("the client waits a while for the topic");
        let report = publisher.report().await.expect("a report");
        assert_eq!(report.result.expect_err("there is no topic").fault, Fault::Topic);
        cluster.topic_error("t", RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR).expect("the topic is there");
        assert!(matches!(publisher.enqueue(&row, 0), Err(NotEnqueued::Failed(_))), "the client remembers its absence");
        publisher.refresh_metadata(vec!["t".to_owned()]).await;
        publisher.enqueue(&row, 0).expect("the client knows the topic");
        assert!(publisher.report().await.expect("a report").result.is_ok());
    }

    #[test]
    fn settings_that_would_break_the_promises_are_refused() {
        let dangerous = [
            ["acks", "enable.idempotence", "partitioner", "retries"],
            ["max.in.flight", "message.timeout.ms", "queuing.strategy", "transactional.id"],
        ];
        for property in dangerous.into_iter().flatten().chain(GUARDED) {
            let settings = KafkaSettings { brokers: "127.0.0.1:1".into(), client: vec![(property.into(), "0".into())] };
            assert!(matches!(
                Publisher::new(&settings, 10, Duration::from_secs(1), None),
                Err(PublisherError::Guarded(_))
            ));
        }
    }

    #[test]
    fn a_refused_property_does_not_show_its_value() {
        let settings = KafkaSettings {
            brokers: "127.0.0.1:1".into(),
            client: vec![("sasl.mechanism.typo".into(), "hunter2".into())],
        };
        let error = Publisher::new(&settings, 10, Duration::from_secs(1), None).err().map(|e| e.to_string());
        let error = error.unwrap_or_default();
        assert!(error.contains("sasl.mechanism.typo") && !error.contains("hunter2"), "{error}");
    }
}

//! The Kafka client: its settings, what it says of itself, and how it is let go.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use outbox_relay::logging::{Throttle, truncated};
use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    consumer::{ConsumerContext, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode as Code},
};
use serde::Deserialize;
use tokio::sync::{Notify, oneshot};

use super::{
    ConsumerSettings,
    status::{ConsumerStatus, Trouble},
};

/// How often the client tells how it is.
const STATISTICS_MS: &str = "2000";
/// Connecting and joining take this long at most when all is well: the brokers hold a new group back for
/// three seconds, and a member that is busy for as long as a reply may take.
const CONNECTING: Duration = Duration::from_secs(5);
const JOINING: Duration = Duration::from_secs(20);
/// A message that can't be fetched is asked for again sooner than this.
const FETCHING: Duration = Duration::from_secs(30);
/// A missing reply topic is looked for again this often: topics may be created after us.
const TOPIC_REFRESH_MS: &str = "10000";
const LEAVE: Duration = Duration::from_secs(5);

/// Makes the client. It connects by itself, and as often as it takes: DNS names in `brokers` are resolved
/// anew at every attempt (`broker.address.ttl`), and when all brokers it has learnt of are gone it begins
/// again with the addresses in `brokers` (`metadata.recovery.strategy`).
pub(super) fn consumer(settings: &ConsumerSettings, status: ConsumerStatus) -> Result<Member, KafkaError> {
    let mut config = ClientConfig::new();
    settings.client.iter().for_each(|(property, value)| {
        config.set(property, value);
    });
    let consumer: StreamConsumer<Context> = config
        .set("bootstrap.servers", &settings.brokers)
        .set("metadata.recovery.strategy", "rebootstrap")
        .set("group.id", &settings.group_id)
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", "1000")
        .set("enable.auto.offset.store", "false")
        // A reply that came before this group ever read is still a reply.
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "false")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", "10000")
        // A message is held up for GIVE_UP at most, then the group is left.
        .set("max.poll.interval.ms", "300000")
        .set("topic.metadata.refresh.interval.ms", TOPIC_REFRESH_MS)
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.keepalive.enable", "true")
        .set("statistics.interval.ms", STATISTICS_MS)
        .set_log_level(RDKafkaLogLevel::Warning)
        .create_with_context(Context::new(status))?;
    Ok(Member(Some(Arc::new(consumer))))
}

/// A consumer that never closes on a thread of the runtime. Closing commits the stored offsets and leaves the
/// group. It blocks, and with brokers that are away it may never end.
pub(super) struct Member(Option<Arc<StreamConsumer<Context>>>);

impl Member {
    pub fn consumer(&self) -> &Arc<StreamConsumer<Context>> {
        self.0.as_ref().expect("only leaving takes it")
    }

    /// Leaves the group in good order, if that takes no longer than it should.
    pub async fn leave(mut self) {
        let Some(left) = self.close() else { return };
        if tokio::time::timeout(LEAVE, left).await.is_err() {
            tracing::warn!("the consumer group was not left in time; its partitions move when the session times out");
        }
    }

    fn close(&mut self) -> Option<oneshot::Receiver<()>> {
        let consumer = self.0.take()?;
        let (done, left) = oneshot::channel();
        std::thread::spawn(move || {
            // A question about topics may be under way. Whoever has it last closes it, and that is for here.
            let closing = Instant::now();
            while Arc::strong_count(&consumer) > 1 && closing.elapsed() < LEAVE {
                std::thread::sleep(Duration::from_millis(10));
            }
            drop(consumer);
            let _ = done.send(());
        });
        Some(left)
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.close();
    }
}

/// Hears what the client says of itself.
pub(super) struct Context {
    status: ConsumerStatus,
    /// Something was said about topics: look at them now.
    pub topics_in_doubt: Notify,
    heard: Mutex<Heard>,
    lines: Throttle<String>,
}

#[derive(Debug)]
struct Heard {
    connected: Instant,
    steady: Instant,
    /// The last errors about brokers and about the group, by name: no addresses.
    broker_error: Option<Code>,
    group_error: Option<Code>,
    fetch_failed: Option<Instant>,
}

/// The part of the client's statistics that is of use here.
#[derive(Debug, Deserialize)]
struct Statistics {
    brokers: HashMap<String, BrokerStatistics>,
    cgrp: Option<GroupStatistics>,
}

#[derive(Debug, Deserialize)]
struct BrokerStatistics {
    state: String,
}

#[derive(Debug, Deserialize)]
struct GroupStatistics {
    state: String,
    join_state: String,
}

impl Context {
    fn new(status: ConsumerStatus) -> Self {
        let now = Instant::now();
        let heard = Heard { connected: now, steady: now, broker_error: None, group_error: None, fetch_failed: None };
        Self { status, topics_in_doubt: Notify::new(), heard: Mutex::new(heard), lines: Throttle::new() }
    }

    /// An error that reading met.
    pub fn met(&self, error: &KafkaError) {
        let Some(code) = error.rdkafka_error_code() else { return };
        match code {
            Code::UnknownTopic | Code::UnknownTopicOrPartition | Code::UnknownPartition => {
                self.topics_in_doubt.notify_one();
            }
            Code::TopicAuthorizationFailed => self.topics_in_doubt.notify_one(),
            Code::BadMessage
            | Code::BadCompression
            | Code::InvalidMessage
            | Code::MessageSizeTooLarge
            | Code::NotImplemented
            | Code::Underflow => {
                self.heard().fetch_failed = Some(Instant::now());
                self.status.begin(Trouble::FetchFailed, format!("a message can't be fetched or decoded ({code})"));
            }
            Code::BrokerTransportFailure
            | Code::AllBrokersDown
            | Code::Resolve
            | Code::SSL
            | Code::Authentication
            | Code::SaslAuthenticationFailed
            | Code::OperationTimedOut => self.heard().broker_error = Some(code),
            Code::GroupAuthorizationFailed => {
                self.heard().group_error = Some(code);
                self.status.begin(Trouble::GroupNotJoined, not_joined(Some(code), "refused"));
            }
            code => self.heard().group_error = Some(code),
        }
    }

    fn judge(&self, statistics: &Statistics) {
        let mut heard = self.heard();
        let now = Instant::now();
        if statistics.brokers.values().any(|broker| broker.state == "UP") {
            heard.connected = now;
            heard.broker_error = None;
            self.status.end(Trouble::BrokersAway);
            if let Some(over) = self.lines.recovered() {
                tracing::info!(lines = over.occurrences, "the Kafka client has a broker again");
            }
        } else if heard.connected.elapsed() > CONNECTING {
            let why = heard.broker_error.map(|code| format!(" ({code})")).unwrap_or_default();
            self.status.begin(Trouble::BrokersAway, format!("none of the brokers in KAFKA_BROKERS answers{why}"));
            // Nobody can join a group that has no brokers: one trouble, one line.
            heard.steady = now;
            return;
        }
        if heard.fetch_failed.is_some_and(|at| at.elapsed() > FETCHING) {
            heard.fetch_failed = None;
            self.status.end(Trouble::FetchFailed);
        }
        let Some(group) = &statistics.cgrp else { return };
        if group.join_state == "steady" {
            heard.steady = now;
            heard.group_error = None;
            self.status.end(Trouble::GroupNotJoined);
            self.status.end(Trouble::ConsumerFailed);
        } else if heard.steady.elapsed() > JOINING {
            let state = if group.state == "up" { &group.join_state } else { &group.state };
            self.status.begin(Trouble::GroupNotJoined, not_joined(heard.group_error, state));
        }
    }

    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.heard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn not_joined(error: Option<Code>, state: &str) -> String {
    let why = error.map(|code| format!(": {code}")).unwrap_or_default();
    format!("the consumer group (KAFKA_GROUP_ID) can't be joined (it is at {state:?}){why}")
}

impl ClientContext for Context {
    fn stats_raw(&self, statistics: &[u8]) {
        match serde_json::from_slice(statistics) {
            Ok(statistics) => self.judge(&statistics),
            Err(error) => tracing::debug!(%error, "the Kafka client's statistics can't be read"),
        }
    }

    /// Comes once more from reading, with its code; see [`Context::met`].
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(kafka.error = %error, "kafka consumer: {}", truncated(reason));
    }

    /// One line a minute for each of the client's kinds of lines: with brokers away it has hundreds.
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        let Some(line) = self.lines.occurred(facility.to_owned()) else { return };
        let (text, left_out) = (truncated(text), line.left_out);
        match level {
            RDKafkaLogLevel::Info | RDKafkaLogLevel::Notice => {
                tracing::info!(target: "librdkafka", facility, left_out, "{text}");
            }
            RDKafkaLogLevel::Debug => tracing::debug!(target: "librdkafka", facility, "{text}"),
            _ => tracing::warn!(target: "librdkafka", facility, left_out, "{text}"),
        }
    }
}

impl ConsumerContext for Context {}

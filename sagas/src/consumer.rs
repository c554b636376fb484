//! The reply consumer. With the files below it, the only part of this crate that knows rdkafka.
//!
//! At least once: an offset is stored only after the message's transaction has committed, and a
//! message that comes again is known to the inbox. One message after the other: a reply costs a
//! millisecond or two, and replicas share the partitions.
//!
//! No message ends it. What can't be read is kept in the inbox with its place. What panics, or what the
//! database refuses, is tried a few times, then kept as rejected. While the database does not answer, the
//! message is tried again for [`GIVE_UP`]; then the group is left, so that a replica whose database answers
//! can take the partitions, and joined again when it does.

mod client;
mod start;
mod status;
mod topics;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
    time::{Duration, Instant},
};

use chrono::{DateTime, TimeZone, Utc};
use outbox_relay::{Database, fault_points, headers::MessageHeaders, inbox::Bytes};
use rdkafka::{
    Message,
    consumer::{Consumer, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::BorrowedMessage,
};
use tokio::time::sleep;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use self::client::Context;
pub use self::status::{ConsumerStatus, Trouble};
use crate::{
    orchestrator::{Flows, Orchestrator, SagaError},
    reply::Received,
};

/// How replies are read.
#[derive(Clone)]
pub struct ConsumerSettings {
    /// `host:port`, comma-separated.
    pub brokers: String,
    /// Consumer group; replicas of one system share it.
    pub group_id: String,
    /// Further librdkafka properties: TLS, SASL.
    pub client: Vec<(String, String)>,
}

/// The names of the properties alone: a value may be a password.
impl fmt::Debug for ConsumerSettings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client: Vec<_> = self.client.iter().map(|(name, _)| name).collect();
        f.debug_struct("ConsumerSettings")
            .field("brokers", &self.brokers)
            .field("group_id", &self.group_id)
            .field("client", &client)
            .finish()
    }
}

const RETRY: Duration = Duration::from_millis(500);
/// Attempts at a message that fails by itself, before it is put aside.
const PATIENCE: u32 = 3;
/// How long a message is held while the database does not take it, before the group is left.
const GIVE_UP: Duration = Duration::from_secs(60);
/// The pause before a consumer that failed is replaced doubles from one to the other.
const REPLACE: Duration = Duration::from_secs(1);
const LONGEST_REPLACE: Duration = Duration::from_secs(30);

/// Why a consumer ended before it was told to.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error(transparent)]
    Kafka(#[from] KafkaError),
    #[error("the Kafka cluster does not say its id")]
    NoClusterId,
    /// The group was left because a message can't be taken in.
    #[error("the database does not take replies in")]
    DatabaseAway,
}

/// What came of holding a message.
enum Handled {
    TakenIn,
    Stopped,
    GivenUp,
}

impl<F: Flows> Orchestrator<F> {
    /// Reads replies until `shutdown`, and tells `status` how that goes. A consumer that fails or panics is
    /// replaced.
    pub async fn consume(
        self,
        db: Database,
        settings: ConsumerSettings,
        status: ConsumerStatus,
        shutdown: CancellationToken,
    ) {
        status.describe();
        let settings = Arc::new(settings);
        let mut pause = REPLACE;
        while !shutdown.is_cancelled() {
            let began = Instant::now();
            // A task of its own: a panic ends this consumer, not the reading.
            let consuming = AbortOnDropHandle::new(tokio::spawn(self.clone().consume_once(
                db.clone(),
                settings.clone(),
                status.clone(),
                shutdown.clone(),
            )));
            let why = match consuming.await {
                Ok(Ok(())) => return,
                Ok(Err(Ended::DatabaseAway)) => {
                    shutdown.run_until_cancelled(database_answers(&db)).await;
                    continue;
                }
                Ok(Err(ended)) => ended.to_string(),
                Err(panic) => format!("it panicked: {panic}"),
            };
            status.begin(Trouble::ConsumerFailed, format!("the reply consumer failed and is replaced: {why}"));
            metrics::counter!("saga_consumers_replaced_total").increment(1);
            pause = if began.elapsed() > LONGEST_REPLACE { REPLACE } else { (pause * 2).min(LONGEST_REPLACE) };
            shutdown.run_until_cancelled(sleep(pause)).await;
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
        self,
        db: Database,
        settings: Arc<ConsumerSettings>,
        status: ConsumerStatus,
        shutdown: CancellationToken,
    ) -> Result<(), Ended> {
        let member = client::consumer(&settings, status.clone())?;
        let topics = self.reply_topics();
        let started = self.start_group(member.consumer(), &topics, &db, &status);
        if shutdown.run_until_cancelled(served(member.consumer(), started)).await.is_none() {
            member.leave().await;
            return Ok(());
        }
        member.consumer().subscribe(&topics.iter().map(String::as_str).collect::<Vec<_>>())?;
        let watching = topics::watch(member.consumer().clone(), topics, status.clone());
        let watching = AbortOnDropHandle::new(tokio::spawn(watching));
        let ended = self.read(member.consumer(), &db, &status, &shutdown).await;
        drop(watching);
        member.leave().await;
        ended
    }

    async fn read(
        &self,
        consumer: &StreamConsumer<Context>,
        db: &Database,
        status: &ConsumerStatus,
        shutdown: &CancellationToken,
    ) -> Result<(), Ended> {
        let mut cluster_id: Option<String> = None;
        while let Some(next) = shutdown.run_until_cancelled(consumer.recv()).await {
            let message = match next {
                Ok(message) => message,
                Err(error) if is_over(&error) => return Err(error.into()),
                // Brokers that are down, topics that are not there yet: it goes on by itself.
                Err(error) => {
                    consumer.context().met(&error);
                    continue;
                }
            };
            let id = match &cluster_id {
                Some(id) => id,
                // A place in an unknown cluster is no place: ask again, with a new client.
                None => cluster_id.insert(cluster_id_of(consumer).ok_or(Ended::NoClusterId)?),
            };
            let (received, readable) = self.received(&message, id);
            fault_points::reached("sagas::received");
            match self.handle(db, &received, readable, status, shutdown).await {
                Handled::TakenIn => {}
                Handled::Stopped => return Ok(()),
                Handled::GivenUp => return Err(Ended::DatabaseAway),
            }
            fault_points::reached("sagas::committed");
            if let Err(error) = consumer.store_offset_from_message(&message) {
                // The partition has moved to another replica, who reads the message again.
                tracing::debug!(%error, "offset not stored");
            }
            fault_points::reached("sagas::offset_stored");
        }
        Ok(())
    }

    /// Holds a message until it is taken in or put aside.
    async fn handle(
        &self,
        db: &Database,
        message: &Received,
        readable: bool,
        status: &ConsumerStatus,
        shutdown: &CancellationToken,
    ) -> Handled {
        let began = Instant::now();
        let (mut panics, mut refusals) = (0, 0);
        loop {
            let attempt = match readable {
                true => self.attempt(db, message).await,
                false => self.attempt_to_reject(db, message, "it could not be read: reading it panics").await,
            };
            let why = match attempt {
                Attempt::TakenIn => {
                    status.end(Trouble::ReplyWaits);
                    return Handled::TakenIn;
                }
                Attempt::Failed(why) => why,
                // The database is there and will not have it: asking again for ever would hold up
                // everything behind it.
                Attempt::Refused(why) => {
                    refusals += 1;
                    why
                }
                Attempt::Panicked(why) => {
                    panics += 1;
                    why
                }
            };
            explain(message, &why);
            let hopeless = if refusals >= PATIENCE {
                Some(format!("the database refused it {refusals} times: {why}"))
            } else {
                (panics >= PATIENCE).then(|| format!("the handler panicked on it {panics} times"))
            };
            if let Some(hopeless) = hopeless
                && let Attempt::TakenIn = self.attempt_to_reject(db, message, &hopeless).await
            {
                status.end(Trouble::ReplyWaits);
                return Handled::TakenIn;
            }
            let (topic, partition, offset) = (&message.topic, message.partition, message.offset);
            let place = format!("{topic} partition {partition} offset {offset}");
            status.begin(Trouble::ReplyWaits, format!("the reply at {place} can't be taken in: {why}"));
            if began.elapsed() >= GIVE_UP {
                return Handled::GivenUp;
            }
            if shutdown.run_until_cancelled(sleep(RETRY)).await.is_none() {
                return Handled::Stopped;
            }
        }
    }

    async fn attempt(&self, db: &Database, message: &Received) -> Attempt {
        let (orchestrator, db, message) = (self.clone(), db.clone(), message.clone());
        Attempt::at(async move { orchestrator.receive(&db, &message).await.map(drop) }).await
    }

    async fn attempt_to_reject(&self, db: &Database, message: &Received, why: &str) -> Attempt {
        let (orchestrator, db, message, why) = (self.clone(), db.clone(), message.clone(), why.to_owned());
        Attempt::at(async move { orchestrator.reject(&db, &message, &why).await }).await
    }

    /// The message, and whether it could be read: of one that makes its reader panic there is the place alone.
    fn received(&self, message: &BorrowedMessage<'_>, cluster_id: &str) -> (Received, bool) {
        let prefix = self.inner.settings.topic_prefix.as_str();
        let place = Received {
            topic: message.topic().strip_prefix(prefix).unwrap_or(message.topic()).to_owned(),
            partition: message.partition(),
            offset: message.offset(),
            kafka_at: None,
            cluster_id: cluster_id.to_owned(),
            bytes: Bytes::default(),
        };
        let read = catch_unwind(AssertUnwindSafe(|| {
            let headers = MessageHeaders::read(message.headers());
            let kept = headers.readable.iter().map(|(name, value)| ((*name).to_owned(), value.map(<[u8]>::to_vec)));
            let bytes = Bytes {
                key: message.key().map(<[u8]>::to_vec),
                headers: kept.collect(),
                unreadable_headers: headers.unreadable,
                payload: message.payload().map(<[u8]>::to_vec),
            };
            (message.timestamp().to_millis().and_then(plausible), bytes)
        }));
        match read {
            Ok((kafka_at, bytes)) => (Received { kafka_at, bytes, ..place }, true),
            Err(_) => (place, false),
        }
    }
}

/// Waits for `work`, and lets the client tell how it is meanwhile. It is subscribed to nothing yet, so it gets no
/// message.
async fn served(consumer: &StreamConsumer<Context>, work: impl Future<Output = ()>) {
    let mut work = std::pin::pin!(work);
    loop {
        tokio::select! {
            () = &mut work => return,
            told = consumer.recv() => {
                if let Err(error) = told {
                    consumer.context().met(&error);
                }
            }
        }
    }
}

/// What came of trying to take a message in.
enum Attempt {
    TakenIn,
    /// The database did not answer, or is not well.
    Failed(String),
    /// The database answered, and refused the message.
    Refused(String),
    Panicked(String),
}

impl Attempt {
    /// In a task of its own: a panic ends this attempt, not the consumer. [`Database`] gives it its deadline.
    async fn at(work: impl Future<Output = Result<(), SagaError>> + Send + 'static) -> Self {
        match AbortOnDropHandle::new(tokio::spawn(work)).await {
            Ok(Ok(())) => Attempt::TakenIn,
            Ok(Err(error)) if error.is_the_messages_fault() => Attempt::Refused(error.to_string()),
            Ok(Err(error)) => Attempt::Failed(error.to_string()),
            Err(panic) => Attempt::Panicked(format!("handling it panicked: {panic}")),
        }
    }
}

/// [`ConsumerStatus`] has the line for people; here is every attempt.
fn explain(message: &Received, error: &str) {
    metrics::counter!("saga_reply_retries_total").increment(1);
    tracing::debug!(
        topic = message.topic,
        partition = message.partition,
        offset = message.offset,
        error,
        "reply not taken in yet; trying again"
    );
}

/// Returns when the database answers again.
async fn database_answers(db: &Database) {
    let ask = || db.run(|conn| Box::pin(async move { sqlx::query("select 1").execute(conn).await }));
    while ask().await.is_err() {
        sleep(RETRY).await;
    }
}

/// A time that a database and a person can make something of: senders write what they like.
fn plausible(millis: i64) -> Option<DateTime<Utc>> {
    const YEAR_10000: i64 = 253_402_300_800_000;
    (0..YEAR_10000).contains(&millis).then(|| Utc.timestamp_millis_opt(millis).single()).flatten()
}

/// Known to the client since its first metadata answer, so this does not wait.
fn cluster_id_of(consumer: &StreamConsumer<Context>) -> Option<String> {
    consumer.client().fetch_cluster_id(Duration::from_secs(5))
}

fn is_over(error: &KafkaError) -> bool {
    matches!(error, KafkaError::MessageConsumptionFatal(_))
        || error.rdkafka_error_code() == Some(RDKafkaErrorCode::Fatal)
}

//! Reading what stands in Kafka. Beside the publisher the only file of this crate that knows rdkafka,
//! and apart from it because it must not be able to write: a consumer that is handed its partitions,
//! joins no group and commits nothing.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    consumer::{Consumer, ConsumerContext, StreamConsumer},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code},
};
use sha2::{Digest, Sha256};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::comparison::{Compaction, Logged};
use crate::{
    headers::MessageHeaders,
    publisher::{KafkaSettings, PublisherError, refused},
};

/// Why Kafka could not be read.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// No client could be made.
    #[error(transparent)]
    Client(#[from] PublisherError),
    /// No answer, or one that says no.
    #[error("Kafka at {brokers} did not tell {what}: {reason}")]
    NoAnswer {
        /// Who was asked.
        brokers: String,
        /// What for.
        what: String,
        /// The client's words.
        reason: String,
    },
    /// It fell silent while a partition was read.
    #[error("Kafka sent nothing of {topic} partition {partition} from offset {offset} for {seconds} s{reason}")]
    Silent {
        /// Topic.
        topic: String,
        /// Partition.
        partition: i32,
        /// Where reading stopped.
        offset: i64,
        /// For how long.
        seconds: u64,
        /// The client's last complaint.
        reason: String,
    },
}

/// How long a question may take, and how long a partition may keep silent.
const ANSWER: Duration = Duration::from_secs(15);
const SILENCE: Duration = Duration::from_secs(60);
const BEHIND: Duration = Duration::from_millis(500);

/// A stretch of a partition: from the first offset to before the last.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stretch<'t> {
    pub topic: &'t str,
    pub partition: i32,
    pub from: i64,
    pub to: i64,
}

/// Reads partitions, one after the other.
#[derive(Clone)]
pub(crate) struct LogReader {
    consumer: Arc<StreamConsumer<Complaints>>,
    settings: KafkaSettings,
}

impl LogReader {
    pub(crate) fn new(settings: &KafkaSettings) -> Result<Self, LogError> {
        let consumer = Arc::new(consumer(settings, "read_committed")?);
        Ok(Self { consumer, settings: settings.clone() })
    }

    /// The cluster's own id. Fails when no broker answers.
    pub(crate) async fn cluster_id(&self) -> Result<String, LogError> {
        let question = |consumer: &StreamConsumer<Complaints>| {
            // The client knows the id from any answer about topics, and does not ask by itself.
            consumer.fetch_metadata(None, ANSWER)?;
            Ok(consumer.client().fetch_cluster_id(ANSWER))
        };
        let id = self.ask("its id", question).await?;
        id.ok_or_else(|| self.no_answer("its id", &KafkaError::MetadataFetch(Code::OperationTimedOut)))
    }

    /// The partitions of a topic; none when there is no such topic.
    pub(crate) async fn partitions(&self, topic: &str) -> Result<Vec<i32>, LogError> {
        let name = topic.to_owned();
        self.ask(&format!("the partitions of {topic}"), move |consumer| {
            let metadata = consumer.fetch_metadata(Some(&name), ANSWER)?;
            let Some(found) = metadata.topics().first() else { return Ok(Vec::new()) };
            match found.error().map(Code::from) {
                None => Ok(found.partitions().iter().map(|partition| partition.id()).collect()),
                Some(Code::UnknownTopicOrPartition | Code::UnknownTopic) => Ok(Vec::new()),
                Some(code) => Err(KafkaError::MetadataFetch(code)),
            }
        })
        .await
    }

    /// First offset kept, and end of what is readable: the first open transaction, if there is one.
    pub(crate) async fn bounds(&self, topic: &str, partition: i32) -> Result<(i64, i64), LogError> {
        let (what, name) = (format!("the bounds of {topic} partition {partition}"), topic.to_owned());
        self.ask(&what, move |consumer| consumer.fetch_watermarks(&name, partition, ANSWER)).await
    }

    /// End of what is there, readable or not.
    pub(crate) async fn end(&self, topic: &str, partition: i32) -> Result<i64, LogError> {
        let uncommitted = Arc::new(consumer(&self.settings, "read_uncommitted")?);
        let reader = Self { consumer: uncommitted, settings: self.settings.clone() };
        Ok(reader.bounds(topic, partition).await?.1)
    }

    /// Offset of the first message of that time (milliseconds since 1970) or later; `None` when all are
    /// older.
    pub(crate) async fn offset_at(&self, topic: &str, partition: i32, time: i64) -> Result<Option<i64>, LogError> {
        let (what, name) = (format!("an offset by time in {topic} partition {partition}"), topic.to_owned());
        self.ask(&what, move |consumer| {
            let mut times = TopicPartitionList::new();
            times.add_partition_offset(&name, partition, Offset::Offset(time.max(0)))?;
            let found = consumer.offsets_for_times(times, ANSWER)?;
            let Some(found) = found.find_partition(&name, partition) else { return Ok(None) };
            found.error()?;
            Ok(match found.offset() {
                Offset::Offset(offset) => Some(offset),
                _ => None,
            })
        })
        .await
    }

    /// Whether the topic is compacted.
    pub(crate) async fn compaction(&self, topic: &str) -> Compaction {
        let client: AdminClient<Complaints> =
            match client(&self.settings).create_with_context(Complaints::default()).map_err(refused) {
                Ok(client) => client,
                Err(error) => return Compaction::Unknown(error.to_string()),
            };
        let options = AdminOptions::new().request_timeout(Some(ANSWER));
        let asked = [&ResourceSpecifier::Topic(topic)];
        let answer = timeout(ANSWER * 2, client.describe_configs(asked, &options)).await;
        let answer = answer.map_err(|_| "no answer".to_owned()).and_then(|answer| answer.map_err(|e| e.to_string()));
        let described = answer.and_then(|mut topics| {
            let topic = topics.pop().ok_or("no answer")?.map_err(|code| code.to_string())?;
            topic.get("cleanup.policy").and_then(|policy| policy.value.clone()).ok_or_else(|| "no answer".to_owned())
        });
        match described {
            Ok(policy) => {
                let _ = tokio::task::spawn_blocking(move || drop(client)).await;
                match policy.split(',').any(|policy| policy.trim() == "compact") {
                    true => Compaction::On,
                    false => Compaction::Off,
                }
            }
            Err(reason) => {
                // Dropping an admin client with a request that was not answered has aborted the process.
                std::mem::forget(client);
                Compaction::Unknown(reason)
            }
        }
    }

    /// Turns to a stretch.
    pub(crate) fn read<'r>(&'r self, stretch: Stretch<'r>) -> Result<Reading<'r>, LogError> {
        self.turn_to(&stretch, stretch.from)?;
        Ok(Reading { log: self, stretch, next: stretch.from, ended_before: None })
    }

    fn turn_to(&self, stretch: &Stretch<'_>, offset: i64) -> Result<(), LogError> {
        let mut list = TopicPartitionList::new();
        list.add_partition_offset(stretch.topic, stretch.partition, Offset::Offset(offset))
            .and_then(|()| self.consumer.assign(&list))
            .map_err(|error| self.no_answer(&format!("{} partition {}", stretch.topic, stretch.partition), &error))
    }

    /// The client's questions block.
    async fn ask<T: Send + 'static>(
        &self,
        what: &str,
        question: impl FnOnce(&StreamConsumer<Complaints>) -> KafkaResult<T> + Send + 'static,
    ) -> Result<T, LogError> {
        let consumer = self.consumer.clone();
        match tokio::task::spawn_blocking(move || question(&consumer)).await {
            Ok(answer) => answer.map_err(|error| self.no_answer(what, &error)),
            Err(error) => Err(self.no_answer(what, &error)),
        }
    }

    fn no_answer(&self, what: &str, error: &dyn std::error::Error) -> LogError {
        let reason = self.consumer.context().last().unwrap_or_else(|| error.to_string());
        LogError::NoAnswer { brokers: self.settings.brokers.clone(), what: what.to_owned(), reason }
    }
}

/// A stretch that is being read.
pub(crate) struct Reading<'r> {
    log: &'r LogReader,
    stretch: Stretch<'r>,
    next: i64,
    ended_before: Option<i64>,
}

impl Reading<'_> {
    /// The next message; `None` at the end. Offsets may have gaps: markers of transactions, compaction.
    pub(crate) async fn next(&mut self) -> Result<Option<Logged>, LogError> {
        let deadline = Instant::now() + SILENCE;
        while self.next < self.stretch.to {
            match timeout_at(deadline, self.log.consumer.recv()).await {
                Err(_) => return Err(self.silent()),
                Ok(Ok(message)) if message.offset() >= self.stretch.to => return Ok(None),
                // What was asked for is gone, and the client has begun anew at the first offset kept.
                Ok(Ok(message)) if message.offset() < self.next => {}
                Ok(Ok(message)) => {
                    self.next = message.offset() + 1;
                    return Ok(Some(logged(&message)));
                }
                Ok(Err(KafkaError::PartitionEOF(_))) if self.has_ended().await? => return Ok(None),
                // A broker that is away for a moment; the client goes on by itself.
                Ok(Err(_)) => {}
            }
        }
        Ok(None)
    }

    /// Whether the end of the partition is the end of the stretch. The rest can be nothing but markers
    /// of transactions; or a leader has been elected that does not have all of it yet. So the end has
    /// to be met twice, with nothing in between and the partition as long as it was.
    async fn has_ended(&mut self) -> Result<bool, LogError> {
        let (_, readable) = self.log.bounds(self.stretch.topic, self.stretch.partition).await?;
        if readable >= self.stretch.to && self.ended_before.replace(self.next) == Some(self.next) {
            return Ok(true);
        }
        if readable < self.stretch.to {
            sleep(BEHIND).await;
        }
        self.log.turn_to(&self.stretch, self.next)?;
        Ok(false)
    }

    fn silent(&self) -> LogError {
        LogError::Silent {
            topic: self.stretch.topic.to_owned(),
            partition: self.stretch.partition,
            offset: self.next,
            seconds: SILENCE.as_secs(),
            reason: self.log.consumer.context().last().map(|last| format!(" ({last})")).unwrap_or_default(),
        }
    }
}

fn client(settings: &KafkaSettings) -> ClientConfig {
    let mut config = ClientConfig::new();
    settings.client.iter().for_each(|(property, value)| {
        config.set(property, value);
    });
    config
        .set("bootstrap.servers", &settings.brokers)
        .set("reconnect.backoff.max.ms", "1000")
        .set("socket.keepalive.enable", "true");
    config
}

fn consumer(settings: &KafkaSettings, isolation: &str) -> Result<StreamConsumer<Complaints>, PublisherError> {
    client(settings)
        // The client wants a name even where no group is joined.
        .set("group.id", "outbox-verify")
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("isolation.level", isolation)
        .set("check.crcs", "true")
        .set("enable.partition.eof", "true")
        .set("allow.auto.create.topics", "false")
        .set("queued.max.messages.kbytes", "16384")
        .create_with_context(Complaints::default())
        .map_err(refused)
}

/// What is read of a message, whoever wrote it.
pub(crate) fn logged(message: &impl Message) -> Logged {
    let headers = MessageHeaders::read(message.headers());
    let header = |name| headers.text(name);
    Logged {
        offset: message.offset(),
        timestamp: message.timestamp().to_millis(),
        source: header("ce_source").map(str::to_owned),
        message_id: header("ce_id").and_then(|id| id.parse().ok()),
        key: message.key().and_then(|key| std::str::from_utf8(key).ok()).map(str::to_owned),
        seq: header("aggregate-seq").and_then(|seq| seq.parse().ok()),
        replay_of: header("replay-of").and_then(|row| row.parse().ok()),
        value_hash: message.payload().map(|value| Sha256::digest(value).to_vec()),
    }
}

/// What the client last complained of: its errors alone say "timed out", this says why.
#[derive(Default)]
struct Complaints(Mutex<Option<String>>);

impl Complaints {
    fn last(&self) -> Option<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl ClientContext for Complaints {
    fn error(&self, _error: KafkaError, reason: &str) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(reason.to_owned());
    }
}

impl ConsumerContext for Complaints {}

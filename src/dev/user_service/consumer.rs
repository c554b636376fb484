//! Commands from Kafka, one after the other: decide, answer, and only then let go of the command.

use std::{collections::BTreeMap, thread, time::Duration};

use outbox_relay::{Database, headers::MessageHeaders};
use rdkafka::{
    ClientConfig, Message,
    consumer::{Consumer, StreamConsumer},
    error::KafkaError,
    message::{BorrowedMessage, Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;

use super::{
    UserServiceSettings,
    commands::{Answer, Command, Order, TOPICS},
    profiles::{self, HouseRules},
};

/// Between two tries while PostgreSQL or Kafka is away.
const RETRY: Duration = Duration::from_millis(500);

/// Leaving the group in good order may take this long.
const FAREWELL: Duration = Duration::from_secs(5);

/// Reads commands and answers them.
pub(super) struct CommandConsumer {
    consumer: StreamConsumer,
    producer: FutureProducer,
    db: Database,
    rules: HouseRules,
    topic_prefix: String,
}

/// Why a command is still unanswered. It is tried again.
#[derive(Debug, thiserror::Error)]
enum Unanswered {
    #[error("the database failed: {0}")]
    Database(#[from] sqlx::Error),
    #[error("the answer could not be sent: {0}")]
    Kafka(#[from] KafkaError),
}

impl CommandConsumer {
    pub fn new(settings: &UserServiceSettings, db: Database, rules: HouseRules) -> Result<Self, KafkaError> {
        let mut client = ClientConfig::new();
        client.extend(settings.kafka_client.iter().cloned());
        client.set("bootstrap.servers", &settings.kafka_brokers).set("client.id", "user-service");
        // The usual 10 s would be most of the time to recovery after a short outage.
        client.set("reconnect.backoff.max.ms", "1000");

        // An offset is stored when its command has been answered, and committed some time after.
        let consumer: StreamConsumer = client
            .clone()
            .set("group.id", &settings.group_id)
            .set("auto.offset.reset", "earliest")
            .set("enable.auto.offset.store", "false")
            .set("auto.commit.interval.ms", "1000")
            // Topics made after us are seen this soon.
            .set("topic.metadata.refresh.interval.ms", "10000")
            .create()?;
        let topics = TOPICS.map(|topic| format!("{}{topic}", settings.topic_prefix));
        consumer.subscribe(&topics.each_ref().map(String::as_str))?;

        // One answer at a time, each awaited: order needs nothing more.
        let producer = client
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("message.timeout.ms", "10000")
            .create()?;
        Ok(Self { consumer, producer, db, rules, topic_prefix: settings.topic_prefix.clone() })
    }

    pub async fn run(self, shutdown: CancellationToken) {
        while let Some(received) = shutdown.run_until_cancelled(self.consumer.recv()).await {
            match received {
                Ok(message) => {
                    if shutdown.run_until_cancelled(self.settle(&message)).await.is_none() {
                        break;
                    }
                }
                // Among them: a topic that is not there yet, a broker that is away.
                Err(error) => {
                    tracing::warn!(%error, "user-service: no command could be read");
                    shutdown.run_until_cancelled(sleep(RETRY)).await;
                }
            }
        }
        leave(self.consumer).await;
    }

    /// Ends when the command is answered, or can't be understood. Interrupted, the command comes
    /// again.
    async fn settle(&self, message: &BorrowedMessage<'_>) {
        match self.read(message) {
            Ok(command) => {
                while let Err(error) = self.answer(&command).await {
                    tracing::warn!(%error, saga.id = %command.saga_id, "user-service: command not answered yet");
                    sleep(RETRY).await;
                }
            }
            Err(problem) => tracing::warn!(
                kafka.topic = message.topic(),
                kafka.partition = message.partition(),
                kafka.offset = message.offset(),
                "user-service: a message is no command and is passed over: {problem}"
            ),
        }
        // Refused when the partition has just been given to another replica, which will answer too.
        if let Err(error) = self.consumer.store_offset_from_message(message) {
            tracing::debug!(%error, "user-service: offset not stored");
        }
    }

    fn read(&self, message: &BorrowedMessage<'_>) -> Result<Command, String> {
        let headers: BTreeMap<String, String> = MessageHeaders::read(message.headers())
            .readable
            .into_iter()
            .filter_map(|(name, value)| Some((name.to_owned(), std::str::from_utf8(value?).ok()?.to_owned())))
            .collect();
        let topic = message.topic().strip_prefix(&self.topic_prefix).unwrap_or(message.topic());
        Command::read(topic, &headers, message.payload())
    }

    async fn answer(&self, command: &Command) -> Result<(), Unanswered> {
        let decided = match &command.order {
            Order::Create(profile) => profiles::create(&self.db, command.saga_id, profile.clone(), &self.rules).await?,
            Order::Erase => profiles::erase(&self.db, command.saga_id, command.user_id).await?,
        };
        let answer = Answer::to(command, &decided);
        let headers = answer
            .headers
            .iter()
            .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(value) }));
        let topic = format!("{}{}", self.topic_prefix, answer.topic);
        let record = FutureRecord::to(&topic).key(&answer.key).payload(&answer.payload).headers(headers);
        self.producer.send(record, RETRY).await.map_err(|(error, _)| error)?;
        tracing::debug!(saga.id = %command.saga_id, user.id = command.user_id, "user-service: {}", answer.topic);
        Ok(())
    }
}

/// Closing a consumer whose broker is gone can take for ever. On a thread of its own it holds up
/// neither us nor the runtime's end.
async fn leave(consumer: StreamConsumer) {
    let (left, gone) = oneshot::channel();
    let leaving = thread::Builder::new().name("leave-group".to_owned()).spawn(move || {
        drop(consumer);
        let _ = left.send(());
    });
    if leaving.is_err() || timeout(FAREWELL, gone).await.is_err() {
        tracing::warn!("user-service: the consumer group was not left in good order; its broker may be gone");
    }
}

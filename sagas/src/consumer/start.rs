//! Where a group begins that never read.
//!
//! Not at the beginning: a topic may be full of replies to sagas of a database that was here before this one, or
//! hold a year of answers nobody needs. It begins at the oldest saga that still awaits something, less the
//! tolerance of the clocks; at the end when there is none. That is committed at once, before anybody joins.

use std::{sync::Arc, time::Duration};

use chrono::{DateTime, Utc};
use outbox_relay::Database;
use rdkafka::{
    Offset, TopicPartitionList,
    consumer::{CommitMode, Consumer, StreamConsumer},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode as Code},
};
use tokio::{task::spawn_blocking, time::sleep};

use super::{
    RETRY,
    client::Context,
    status::{ConsumerStatus, Trouble},
};
use crate::{
    orchestrator::{Flows, Orchestrator},
    store,
};

const ANSWER: Duration = Duration::from_secs(10);

/// A partition, and what it holds: its first offset and the one after its last.
struct Bounds {
    topic: String,
    partition: i32,
    low: i64,
    high: i64,
}

impl<F: Flows> Orchestrator<F> {
    /// Sets the group's offsets, if it has none. Returns when they are set, however long Kafka or the database is
    /// away: a group that has joined would begin at the beginning.
    pub(super) async fn start_group(
        &self,
        consumer: &Arc<StreamConsumer<Context>>,
        topics: &[String],
        db: &Database,
        status: &ConsumerStatus,
    ) {
        // In this order: a saga that starts after the question to the database is answered behind these ends.
        let bounds = loop {
            let topics = topics.to_vec();
            match blocking(consumer, move |consumer| bounds_of_new_group(consumer, &topics)).await {
                Ok(Some(bounds)) => break bounds,
                Ok(None) => return,
                Err(error) => {
                    consumer.context().met(&error);
                    tracing::debug!(%error, "where the consumer group stands can't be told yet");
                    sleep(RETRY).await;
                }
            }
        };
        let oldest = loop {
            match db.run(|conn| Box::pin(store::oldest_open(conn))).await {
                Ok(oldest) => break oldest,
                Err(error) => {
                    let detail = format!("the database does not say where a new consumer group begins: {error}");
                    status.begin(Trouble::ReplyWaits, detail);
                    sleep(RETRY).await;
                }
            }
        };
        status.end(Trouble::ReplyWaits);
        let tolerance = self.inner.settings.reply_clock_tolerance;
        let from = oldest.map(|oldest| oldest - tolerance);
        match blocking(consumer, move |consumer| commit_start(consumer, &bounds, from)).await {
            Ok(()) => {
                tracing::info!(from = ?from, "a new consumer group begins at its oldest open saga, or at the end")
            }
            // Somebody else has begun and joined meanwhile, or the broker can't look up by time.
            Err(error) => tracing::debug!(%error, "a new consumer group begins where it is left"),
        }
    }
}

/// The partitions of the topics that exist; `None` when the group has an offset in any of them.
fn bounds_of_new_group(consumer: &StreamConsumer<Context>, topics: &[String]) -> KafkaResult<Option<Vec<Bounds>>> {
    let mut list = TopicPartitionList::new();
    for topic in topics {
        let metadata = consumer.fetch_metadata(Some(topic), ANSWER)?;
        for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
            list.add_partition(topic, partition.id());
        }
    }
    if list.count() == 0 {
        return Ok(None);
    }
    let committed = match consumer.committed_offsets(list, ANSWER) {
        // Joining meets the same, and says so.
        Err(error) if error.rdkafka_error_code() == Some(Code::GroupAuthorizationFailed) => return Ok(None),
        committed => committed?,
    };
    if committed.elements().iter().any(|place| matches!(place.offset(), Offset::Offset(_))) {
        return Ok(None);
    }
    let mut bounds = vec![];
    for place in committed.elements() {
        let (low, high) = consumer.fetch_watermarks(place.topic(), place.partition(), ANSWER)?;
        bounds.push(Bounds { topic: place.topic().to_owned(), partition: place.partition(), low, high });
    }
    Ok(Some(bounds))
}

fn commit_start(consumer: &StreamConsumer<Context>, bounds: &[Bounds], from: Option<DateTime<Utc>>) -> KafkaResult<()> {
    let mut start = TopicPartitionList::new();
    for Bounds { topic, partition, low, high } in bounds {
        let offset = match from {
            None => *high,
            Some(_) if low == high => *high,
            Some(from) => first_since(consumer, topic, *partition, from.timestamp_millis())?.map_or_else(
                // Some brokers find nothing by time, and say so as if everything were older.
                || match first_since(consumer, topic, *partition, 0)? {
                    Some(_) => Ok(*high),
                    None => Ok(*low),
                },
                Ok::<i64, KafkaError>,
            )?,
        };
        start.add_partition_offset(topic, *partition, Offset::Offset(offset))?;
    }
    consumer.commit(&start, CommitMode::Sync)
}

/// The offset of the first message of that time or later; `None`: all are older.
fn first_since(
    consumer: &StreamConsumer<Context>,
    topic: &str,
    partition: i32,
    millis: i64,
) -> KafkaResult<Option<i64>> {
    let mut times = TopicPartitionList::new();
    times.add_partition_offset(topic, partition, Offset::Offset(millis.max(0)))?;
    let found = consumer.offsets_for_times(times, ANSWER)?;
    let Some(found) = found.find_partition(topic, partition) else { return Ok(None) };
    found.error()?;
    Ok(match found.offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    })
}

/// The client's questions block.
async fn blocking<T: Send + 'static>(
    consumer: &Arc<StreamConsumer<Context>>,
    question: impl FnOnce(&StreamConsumer<Context>) -> KafkaResult<T> + Send + 'static,
) -> KafkaResult<T> {
    let consumer = consumer.clone();
    let asked = spawn_blocking(move || question(&consumer)).await;
    asked.unwrap_or_else(|failure| Err(KafkaError::ClientCreation(failure.to_string())))
}

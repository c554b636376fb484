//! A consumer that reads along and keeps count: the independent witness of the demo.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use outbox_relay::headers::MessageHeaders;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::KafkaError,
    message::BorrowedMessage,
};
use tokio_util::sync::CancellationToken;

/// What was seen in Kafka so far.
#[derive(Debug, Clone, Default)]
pub struct Seen {
    /// Sagas whose `user.create` is there.
    pub created: BTreeSet<String>,
    /// Users whose `user.delete` is there.
    pub deleted: BTreeSet<String>,
    /// Distinct messages.
    pub messages: u64,
    /// Copies of messages that had been there already.
    pub duplicated: u64,
    /// First occurrences that stand before an earlier message of their key.
    pub out_of_order: u64,
    ids: BTreeSet<String>,
    last_seq: BTreeMap<String, i64>,
}

impl Seen {
    fn note(&mut self, topic: &str, key: &str, header: impl Fn(&str) -> String) {
        if !self.ids.insert(header("ce_id")) {
            self.duplicated += 1;
            return;
        }
        self.messages += 1;
        let seq = header("aggregate-seq").parse().unwrap_or(0);
        let last = self.last_seq.insert(key.to_owned(), seq).unwrap_or(0);
        // The numbers of a key have no gap: anything but the next one is out of order.
        self.out_of_order += u64::from(seq != last + 1);
        match topic {
            "user.create" => self.created.insert(header("saga-id")),
            _ => self.deleted.insert(key.to_owned()),
        };
    }
}

/// Reads `user.create` and `user.delete` from their beginning until it is dropped.
pub struct Ledger {
    seen: Arc<Mutex<Seen>>,
    stop: CancellationToken,
}

impl Drop for Ledger {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

impl Ledger {
    /// Starts reading.
    pub fn start(brokers: &str) -> Result<Self, KafkaError> {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("group.id", "demo-ledger")
            .set("enable.auto.commit", "false")
            .set("reconnect.backoff.max.ms", "1000")
            .create()?;
        // By assignment, not by group: nobody else's rebalance can make it miss or repeat anything.
        let mut all = TopicPartitionList::new();
        for topic in ["user.create", "user.delete"] {
            let metadata = consumer.fetch_metadata(Some(topic), Duration::from_secs(10))?;
            for partition in metadata.topics().iter().flat_map(|topic| topic.partitions()) {
                all.add_partition_offset(topic, partition.id(), Offset::Beginning)?;
            }
        }
        consumer.assign(&all)?;
        let (seen, stop) = (Arc::new(Mutex::new(Seen::default())), CancellationToken::new());
        let (writing, stopping) = (seen.clone(), stop.clone());
        std::thread::spawn(move || {
            while !stopping.is_cancelled() {
                if let Some(Ok(message)) = consumer.poll(Duration::from_millis(100)) {
                    note(&mut writing.lock().unwrap_or_else(PoisonError::into_inner), &message);
                }
            }
        });
        Ok(Self { seen, stop })
    }

    /// What was seen so far.
    pub fn seen(&self) -> Seen {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

fn note(seen: &mut Seen, message: &BorrowedMessage<'_>) {
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    let headers = MessageHeaders::read(message.headers());
    let header = |name: &str| text(headers.get(name));
    seen.note(message.topic(), &text(message.key()), header);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_are_counted_and_do_not_count_as_disorder() {
        let mut seen = Seen::default();
        let message = |id: &str, seq: &str| {
            let (id, seq) = (id.to_owned(), seq.to_owned());
            move |name: &str| match name {
                "ce_id" => id.clone(),
                "aggregate-seq" => seq.clone(),
                _ => String::new(),
            }
        };
        seen.note("user.create", "1", message("a", "1"));
        seen.note("user.create", "1", message("a", "1"));
        seen.note("user.delete", "1", message("b", "2"));
        assert_eq!((seen.messages, seen.duplicated, seen.out_of_order), (2, 1, 0));
        seen.note("user.delete", "2", message("d", "2"));
        seen.note("user.create", "2", message("c", "1"));
        assert_eq!(seen.out_of_order, 2, "both stand where the other belongs");
    }
}

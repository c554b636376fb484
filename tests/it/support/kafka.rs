//! The other side of Kafka: reading what the service says, answering as another service would.

use std::{collections::BTreeMap, time::Duration};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, KafkaResult},
    message::{Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde_json::Value;

use super::eventually;

/// A message as it stands in Kafka.
#[derive(Debug, Clone)]
pub struct Seen {
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub key: String,
    pub headers: BTreeMap<String, String>,
    pub value: Value,
}

impl Seen {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

/// Everything that stands in these topics now, topic by topic, in order of partition and offset.
pub async fn read_all(brokers: &str, topics: &[String]) -> Vec<Seen> {
    // A topic made a moment ago has partitions without a leader.
    eventually("the topics can be read", || async {
        let (brokers, topics) = (brokers.to_owned(), topics.to_owned());
        let read = tokio::task::spawn_blocking(move || read_blocking(&brokers, &topics));
        read.await.expect("the reader").inspect_err(|error| println!("{error}")).ok()
    })
    .await
}

fn read_blocking(brokers: &str, topics: &[String]) -> KafkaResult<Vec<Seen>> {
    let reader = |isolation: &str| -> KafkaResult<BaseConsumer> {
        ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("group.id", "reader")
            .set("enable.auto.commit", "false")
            .set("enable.partition.eof", "true")
            .set("isolation.level", isolation)
            .create()
    };
    let (committed, everything) = (reader("read_committed")?, reader("read_uncommitted")?);
    let wait = Duration::from_secs(10);
    let mut list = TopicPartitionList::new();
    for topic in topics {
        let metadata = committed.fetch_metadata(Some(topic), wait)?;
        for partition in metadata.topics()[0].partitions() {
            let (_, end) = committed.fetch_watermarks(topic, partition.id(), wait)?;
            let (_, whole_end) = everything.fetch_watermarks(topic, partition.id(), wait)?;
            if end < whole_end {
                // Behind a transaction that is still open there may be others that are committed.
                return Err(KafkaError::ClientCreation(format!("{topic}: a transaction is open at {end}")));
            }
            list.add_partition_offset(topic, partition.id(), Offset::Beginning).expect("an offset");
        }
    }
    committed.assign(&list).expect("an assignment");
    let (mut seen, mut open) = (vec![], list.count());
    while open > 0 {
        match committed.poll(wait) {
            Some(Ok(message)) => seen.push(to_seen(&message)),
            Some(Err(KafkaError::PartitionEOF(_))) => open -= 1,
            Some(Err(error)) => panic!("the topics can't be read: {error}"),
            None => panic!("{open} partitions can't be read to their end"),
        }
    }
    seen.sort_by(|a, b| (&a.topic, a.partition, a.offset).cmp(&(&b.topic, b.partition, b.offset)));
    Ok(seen)
}

fn to_seen<M: Message>(message: &M) -> Seen {
    let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
    Seen {
        topic: message.topic().to_owned(),
        partition: message.partition(),
        offset: message.offset(),
        key: text(message.key()),
        headers: message
            .headers()
            .map(|headers| headers.iter().map(|h| (h.key.to_owned(), text(h.value))).collect())
            .unwrap_or_default(),
        value: serde_json::from_slice(message.payload().unwrap_or_default()).unwrap_or(Value::Null),
    }
}

/// Sends one message as another service would.
pub async fn send(brokers: &str, topic: &str, key: &str, headers: &[(&str, &str)], payload: &[u8]) {
    send_record(brokers, FutureRecord::to(topic).key(key).payload(payload), headers).await;
}

/// Sends one message to a partition. Answers with its offset.
pub async fn send_to(
    brokers: &str,
    (topic, partition): (&str, i32),
    key: &str,
    headers: &[(&str, &str)],
    payload: &[u8],
) -> i64 {
    send_record(brokers, FutureRecord::to(topic).partition(partition).key(key).payload(payload), headers).await
}

async fn send_record(brokers: &str, record: FutureRecord<'_, str, [u8]>, headers: &[(&str, &str)]) -> i64 {
    let producer: FutureProducer = ClientConfig::new().set("bootstrap.servers", brokers).create().expect("a producer");
    let headers = headers
        .iter()
        .fold(OwnedHeaders::new(), |headers, (key, value)| headers.insert(Header { key, value: Some(*value) }));
    let sent = producer.send(record.headers(headers), Duration::from_secs(10)).await;
    sent.expect("the message is sent").offset
}

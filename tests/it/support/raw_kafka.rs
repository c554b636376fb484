//! Records that no client library would write: a Produce request made by hand.

use std::time::Duration;

use rdkafka::{
    ClientConfig,
    consumer::{BaseConsumer, Consumer},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use super::eventually;

/// A record. Its parts are any bytes.
#[derive(Clone, Default)]
pub struct RawRecord<'a> {
    pub key: Option<&'a [u8]>,
    pub value: Option<&'a [u8]>,
    pub headers: Vec<(&'a [u8], Option<&'a [u8]>)>,
    /// Milliseconds of Unix time; -1 is none.
    pub timestamp: i64,
}

/// Writes to partition 0 of a topic.
pub struct RawProducer {
    stream: TcpStream,
    topic: String,
}

impl RawProducer {
    pub async fn connect(brokers: &str, topic: &str) -> Self {
        let stream = TcpStream::connect(leader(brokers, topic).await).await.expect("the partition's leader");
        Self { stream, topic: topic.to_owned() }
    }

    /// Writes a record. Answers with its offset.
    pub async fn send(&mut self, record: &RawRecord<'_>) -> i64 {
        self.stream.write_all(&request(&self.topic, &batch(record))).await.expect("the request is sent");
        let length = self.stream.read_i32().await.expect("an answer");
        let mut answer = vec![0; length as usize];
        self.stream.read_exact(&mut answer).await.expect("the whole answer");
        // Correlation id, one topic, its name, one partition, its index; then what matters.
        let at = 4 + 4 + 2 + self.topic.len() + 4 + 4;
        let error = i16::from_be_bytes(answer[at..at + 2].try_into().unwrap());
        assert_eq!(error, 0, "the broker refused the record");
        i64::from_be_bytes(answer[at + 2..at + 10].try_into().unwrap())
    }
}

async fn leader(brokers: &str, topic: &str) -> String {
    eventually("the partition has a leader", || async {
        let (brokers, topic) = (brokers.to_owned(), topic.to_owned());
        let asked = tokio::task::spawn_blocking(move || {
            let client: BaseConsumer = ClientConfig::new().set("bootstrap.servers", &brokers).create().unwrap();
            let metadata = client.fetch_metadata(Some(&topic), Duration::from_secs(10)).ok()?;
            let partition = metadata.topics()[0].partitions().iter().find(|partition| partition.id() == 0)?;
            let broker = metadata.brokers().iter().find(|broker| broker.id() == partition.leader())?;
            Some(format!("{}:{}", broker.host(), broker.port()))
        });
        asked.await.expect("the question")
    })
    .await
}

/// Produce, version 7.
fn request(topic: &str, batch: &[u8]) -> Vec<u8> {
    let mut body = vec![];
    body.extend(0_i16.to_be_bytes());
    body.extend(7_i16.to_be_bytes());
    body.extend(1_i32.to_be_bytes());
    // No client id, no transactional id; acks of all; thirty seconds.
    body.extend((-1_i16).to_be_bytes());
    body.extend((-1_i16).to_be_bytes());
    body.extend((-1_i16).to_be_bytes());
    body.extend(30_000_i32.to_be_bytes());
    body.extend(1_i32.to_be_bytes());
    body.extend((topic.len() as i16).to_be_bytes());
    body.extend(topic.as_bytes());
    body.extend(1_i32.to_be_bytes());
    body.extend(0_i32.to_be_bytes());
    body.extend((batch.len() as i32).to_be_bytes());
    body.extend(batch);
    [&(body.len() as i32).to_be_bytes(), body.as_slice()].concat()
}

/// A record batch, version 2, not compressed.
fn batch(record: &RawRecord<'_>) -> Vec<u8> {
    let mut fields = vec![0];
    varint(&mut fields, 0);
    varint(&mut fields, 0);
    bytes(&mut fields, record.key);
    bytes(&mut fields, record.value);
    varint(&mut fields, record.headers.len() as i64);
    for (name, value) in &record.headers {
        bytes(&mut fields, Some(name));
        bytes(&mut fields, *value);
    }
    // From the attributes on: what the checksum covers.
    let mut covered = vec![];
    covered.extend(0_i16.to_be_bytes());
    covered.extend(0_i32.to_be_bytes());
    covered.extend(record.timestamp.to_be_bytes());
    covered.extend(record.timestamp.to_be_bytes());
    covered.extend((-1_i64).to_be_bytes());
    covered.extend((-1_i16).to_be_bytes());
    covered.extend((-1_i32).to_be_bytes());
    covered.extend(1_i32.to_be_bytes());
    varint(&mut covered, fields.len() as i64);
    covered.extend(fields);
    let mut batch = vec![];
    batch.extend(0_i64.to_be_bytes());
    batch.extend((covered.len() as i32 + 9).to_be_bytes());
    batch.extend((-1_i32).to_be_bytes());
    batch.push(2);
    batch.extend(crc32c(&covered).to_be_bytes());
    batch.extend(covered);
    batch
}

fn bytes(to: &mut Vec<u8>, bytes: Option<&[u8]>) {
    varint(to, bytes.map_or(-1, |bytes| bytes.len() as i64));
    to.extend(bytes.unwrap_or_default());
}

/// Zigzag, seven bits at a time.
fn varint(to: &mut Vec<u8>, number: i64) {
    let mut rest = (number << 1 ^ number >> 63) as u64;
    while rest > 0x7f {
        to.push(rest as u8 | 0x80);
        rest >>= 7;
    }
    to.push(rest as u8);
}

fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| crc >> 1 ^ if crc & 1 == 1 { 0x82f6_3b78 } else { 0 })
    })
}

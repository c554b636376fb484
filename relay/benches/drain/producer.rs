//! What an idempotent producer reaches that only sends: the limit.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, ClientContext,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    message::{Header, OwnedHeaders},
    producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer},
};
use uuid::Uuid;

use crate::{KEYS, PAYLOAD, Result};

/// Of every topic here.
pub const PARTITIONS: i32 = 4;

struct Count(Arc<AtomicU64>);

impl ClientContext for Count {}

impl ProducerContext for Count {
    type DeliveryOpaque = ();

    fn delivery(&self, result: &DeliveryResult<'_>, _: ()) {
        self.0.fetch_add(u64::from(result.is_ok()), Ordering::Relaxed);
    }
}

/// Messages a second: the keys, values and headers that the relay sends.
pub async fn rate(brokers: &str, messages: usize) -> Result<f64> {
    let topic = topic(brokers).await?;
    let acknowledged = Arc::new(AtomicU64::new(0));
    let producer: ThreadedProducer<Count> = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("enable.idempotence", "true")
        .set("acks", "all")
        .set("partitioner", "murmur2_random")
        .set("linger.ms", "5")
        .create_with_context(Count(acknowledged.clone()))?;
    let took = tokio::task::spawn_blocking(move || send(&producer, &topic, messages)).await??;
    assert_eq!(acknowledged.load(Ordering::Relaxed), messages as u64);
    Ok(messages as f64 / took.as_secs_f64())
}

fn send(producer: &ThreadedProducer<Count>, topic: &str, messages: usize) -> Result<Duration> {
    let payload = vec![b'x'; PAYLOAD];
    let id = Uuid::new_v4().to_string();
    let since = Instant::now();
    for n in 0..messages {
        let key = (n % KEYS).to_string();
        let mut record = BaseRecord::to(topic).key(&key).payload(&payload).headers(headers(topic, &key, &id));
        while let Err((error, back)) = producer.send(record) {
            if !matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) {
                return Err(error.into());
            }
            record = back;
            thread::sleep(Duration::from_millis(1));
        }
    }
    producer.flush(Duration::from_secs(60))?;
    Ok(since.elapsed())
}

/// As many bytes in as many headers as the outbox's rows have.
fn headers(topic: &str, key: &str, id: &str) -> OwnedHeaders {
    let values = [
        ("ce_specversion", "1.0"),
        ("ce_id", id),
        ("ce_source", "auth-service"),
        ("ce_type", topic),
        ("ce_subject", key),
        ("content-type", "application/json"),
        ("correlationId", id),
        ("sender", "auth-service"),
        ("saga-id", id),
        ("causation-id", id),
        ("ce_time", "2026-01-01T00:00:00.000000Z"),
        ("aggregate-seq", "1"),
    ];
    values.iter().fold(OwnedHeaders::new_with_capacity(values.len()), |headers, (key, value)| {
        headers.insert(Header { key, value: Some(*value) })
    })
}

/// How many offsets of a topic are taken. Asking the broker costs the database nothing.
pub async fn offsets(brokers: &str, topic: &str) -> Result<i64> {
    let consumer: BaseConsumer = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let topic = topic.to_owned();
    tokio::task::spawn_blocking(move || {
        let ends =
            (0..PARTITIONS).map(|partition| consumer.fetch_watermarks(&topic, partition, Duration::from_secs(10)));
        Ok(ends.collect::<std::result::Result<Vec<_>, _>>()?.iter().map(|(_, end)| end).sum())
    })
    .await?
}

/// A topic of four partitions.
pub async fn topic(brokers: &str) -> Result<String> {
    let name = format!("bench.{}", Uuid::new_v4().simple());
    let client: AdminClient<DefaultClientContext> = ClientConfig::new().set("bootstrap.servers", brokers).create()?;
    let topic = NewTopic::new(&name, PARTITIONS, TopicReplication::Fixed(1));
    for created in client.create_topics([&topic], &AdminOptions::new()).await? {
        created.map_err(|(name, code)| format!("{name}: {code}"))?;
    }
    Ok(name)
}

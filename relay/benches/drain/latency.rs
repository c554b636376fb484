//! From the return of a COMMIT to a consumer.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_relay::{NewMessage, Wake, append};
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};
use uuid::Uuid;

use crate::{KEYS, PAYLOAD, Result, outbox::Outbox, producer};

/// Connections and first plans are made in these seconds, and not counted.
const WARM_UP_SECONDS: usize = 3;

/// Milliseconds.
pub struct Latency {
    p50: f64,
    p99: f64,
    longest: f64,
}

impl fmt::Display for Latency {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "p50 {:.1} ms, p99 {:.1} ms, longest {:.1} ms", self.p50, self.p99, self.longest)
    }
}

/// Commits at a steady rate, one transaction an event, and measures until a consumer has it.
pub async fn measure(outbox: &Outbox, rate: usize, length: Duration) -> Result<Latency> {
    let topic = producer::topic(&outbox.brokers).await?;
    let total = rate * length.as_secs() as usize;
    let wake = Wake::default();
    let relay = outbox.relay(wake.clone());
    let committed: Arc<Vec<AtomicU64>> = Arc::new((0..total).map(|_| AtomicU64::new(0)).collect());
    let began = Instant::now();
    let reader = tokio::task::spawn_blocking({
        let (brokers, topic, committed) = (outbox.brokers.clone(), topic.clone(), committed.clone());
        move || read(&brokers, &topic, began, &committed)
    });
    let writers = outbox.writers().await?;
    outbox.until_owned().await?;
    let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / rate as f64));
    for n in 0..total {
        tick.tick().await;
        let (pool, wake, topic, committed) = (writers.clone(), wake.clone(), topic.clone(), committed.clone());
        tokio::spawn(async move {
            let mut tx = pool.begin().await?;
            append(&mut tx, &message(&topic, n)).await?;
            tx.commit().await?;
            committed[n].store(began.elapsed().as_micros() as u64, Ordering::Relaxed);
            wake.notify();
            Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
        });
    }
    let mut latencies = reader.await??.split_off(rate * WARM_UP_SECONDS);
    relay.stop().await?;
    latencies.sort_unstable_by(f64::total_cmp);
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
    Ok(Latency { p50: at(0.5), p99: at(0.99), longest: at(1.0) })
}

fn message(topic: &str, n: usize) -> NewMessage {
    let mut payload = n.to_string().into_bytes();
    payload.resize(PAYLOAD, b' ');
    NewMessage {
        id: Uuid::now_v7(),
        topic: topic.to_owned(),
        key: (n % KEYS).to_string(),
        source: "bench".into(),
        payload,
        content_type: "text/plain",
        headers: Default::default(),
        saga_id: None,
    }
}

/// Milliseconds from the return of each COMMIT to the message's arrival.
fn read(brokers: &str, topic: &str, began: Instant, committed: &[AtomicU64]) -> Result<Vec<f64>> {
    let total = committed.len();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "bench")
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "5")
        .create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..producer::PARTITIONS {
        all.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&all)?;
    let mut latencies = Vec::with_capacity(total);
    while latencies.len() < total {
        let Some(message) = consumer.poll(Duration::from_secs(30)) else {
            return Err(format!("only {} of {total} messages came", latencies.len()).into());
        };
        let now = began.elapsed().as_micros() as u64;
        let n: usize = std::str::from_utf8(message?.payload().unwrap_or_default())?.trim().parse()?;
        // A message can arrive before its writer has heard of its own commit.
        let committed = match committed[n].load(Ordering::Relaxed) {
            0 => now,
            at => at,
        };
        latencies.push(now.saturating_sub(committed) as f64 / 1000.0);
    }
    Ok(latencies)
}

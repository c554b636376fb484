//! A plain producer beside the service: what any client would have had to wait for in the same trouble.

use std::{
    fmt,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    producer::{FutureProducer, FutureRecord},
};
use tokio::{task::JoinSet, time::sleep};
use tokio_util::sync::CancellationToken;

const PARTITIONS: i32 = 4;

/// Sends to each partition, one message after the other, until it is told to end.
pub struct Control {
    stop: CancellationToken,
    sending: JoinSet<Sent>,
}

/// What became of it.
#[derive(Debug, Default)]
pub struct Sent {
    pub acknowledged: u64,
    pub failed: u64,
    /// The longest that a message waited for its acknowledgement.
    pub longest: Duration,
}

impl Control {
    pub fn start(brokers: &str, topic: &str) -> Self {
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", brokers)
            .set("acks", "all")
            .set("linger.ms", "1")
            .create()
            .expect("a producer");
        let stop = CancellationToken::new();
        let mut sending = JoinSet::new();
        for partition in 0..PARTITIONS {
            let (producer, topic, stop) = (producer.clone(), topic.to_owned(), stop.clone());
            sending.spawn(async move {
                let mut sent = Sent::default();
                while !stop.is_cancelled() {
                    let since = Instant::now();
                    let record: FutureRecord<'_, str, str> = FutureRecord::to(&topic).partition(partition).payload("x");
                    match producer.send(record, Duration::from_secs(60)).await {
                        Ok(_) => sent.acknowledged += 1,
                        Err(_) => sent.failed += 1,
                    }
                    sent.longest = sent.longest.max(since.elapsed());
                    sleep(Duration::from_millis(50)).await;
                }
                sent
            });
        }
        Self { stop, sending }
    }

    pub async fn end(self) -> Sent {
        self.stop.cancel();
        let all = self.sending.join_all().await;
        all.into_iter().fold(Sent::default(), |sum, one| Sent {
            acknowledged: sum.acknowledged + one.acknowledged,
            failed: sum.failed + one.failed,
            longest: sum.longest.max(one.longest),
        })
    }
}

impl fmt::Display for Sent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "control {:.1} s", self.longest.as_secs_f64())?;
        if self.failed > 0 {
            write!(f, " ({} of {} failed)", self.failed, self.failed + self.acknowledged)
        } else {
            Ok(())
        }
    }
}

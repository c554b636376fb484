//! Carries messages between the service and the other service, badly: each has its own topics, and
//! what is sent on one side arrives on the other never, once or several times, sooner or later.

use std::{
    thread,
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    message::OwnedMessage,
    producer::{BaseRecord, DefaultProducerContext, ThreadedProducer},
};
use tokio_util::sync::CancellationToken;

/// A round. It ends with this value.
pub struct Postman(CancellationToken);

impl Drop for Postman {
    fn drop(&mut self) {
        self.0.cancel();
    }
}

impl Postman {
    /// Carries `topics` from one prefix to another; `mischief` says of each message after what times it
    /// arrives: not at all, once, several times.
    pub fn hire(
        brokers: &str,
        from: &str,
        to: &str,
        topics: &[&str],
        mut mischief: impl FnMut(&str) -> Vec<Duration> + Send + 'static,
    ) -> Self {
        let config = |property: &str, value: &str| {
            let mut config = ClientConfig::new();
            config.set("bootstrap.servers", brokers).set(property, value);
            config
        };
        let consumer: BaseConsumer =
            config("group.id", "postman").set("enable.auto.commit", "false").create().expect("a consumer");
        let producer: ThreadedProducer<DefaultProducerContext> =
            config("partitioner", "murmur2_random").create().expect("a producer");
        let mut all = TopicPartitionList::new();
        for topic in topics {
            for partition in 0..4 {
                all.add_partition_offset(&format!("{from}{topic}"), partition, Offset::Beginning).expect("an offset");
            }
        }
        consumer.assign(&all).expect("assigned");
        let (from, to, fired) = (from.to_owned(), to.to_owned(), CancellationToken::new());
        let postman = Self(fired.clone());
        thread::spawn(move || {
            let mut bag: Vec<(Instant, String, OwnedMessage)> = vec![];
            while !fired.is_cancelled() {
                if let Some(Ok(message)) = consumer.poll(Duration::from_millis(20)) {
                    let topic = message.topic().trim_start_matches(&from).to_owned();
                    for delay in mischief(&topic) {
                        bag.push((Instant::now() + delay, format!("{to}{topic}"), message.detach()));
                    }
                }
                // Of two that are due, the earlier first.
                bag.sort_by_key(|(due, ..)| *due);
                let due = bag.partition_point(|(due, ..)| *due <= Instant::now());
                for (_, topic, message) in bag.drain(..due) {
                    deliver(&producer, &topic, &message);
                }
            }
        });
        postman
    }
}

fn deliver(producer: &ThreadedProducer<DefaultProducerContext>, topic: &str, message: &OwnedMessage) {
    let mut record = BaseRecord::to(topic).key(message.key().unwrap_or_default());
    if let Some(payload) = message.payload() {
        record = record.payload(payload);
    }
    if let Some(headers) = message.headers() {
        record = record.headers(headers.to_owned());
    }
    producer.send(record).map_err(|(error, _)| error).expect("room in the queue");
}

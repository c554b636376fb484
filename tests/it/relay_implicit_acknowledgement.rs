//! Delivery reports that promise more than happened: see `Position` in the relay.

use std::{collections::BTreeSet, time::Duration};

use outbox_relay::{NewMessage, append};
use rdkafka::{
    mocking::MockCluster,
    producer::DefaultProducerContext,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};

use crate::support::{
    kafka::{self, Seen},
    outbox::Outbox,
    parts::PARTS,
};

type Cluster = MockCluster<'static, DefaultProducerContext>;

/// A broker that becomes the leader of the topic's one partition just now: it refuses one request, and is slow
/// enough for the next one to be on its way by then.
fn becoming_leader(outbox: &Outbox) -> Cluster {
    let cluster = MockCluster::new(1).expect("a mock cluster");
    cluster.create_topic(&outbox.topic, 1, 1).expect("a topic");
    cluster.broker_round_trip_time(-1, Duration::from_millis(300)).expect("a round trip");
    let refusal = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION];
    cluster.request_errors(RDKafkaApiKey::Produce, &refusal);
    cluster
}

const KEYS: [&str; 3] = ["a", "b", "c"];

/// Six events of three keys, committed at once and relayed by a broker that refuses the first request.
async fn relayed() -> Vec<Seen> {
    let outbox = Outbox::without_topic().await;
    let cluster = becoming_leader(&outbox);
    let mut tx = outbox.pool.begin().await.unwrap();
    for text in ["first", "second"] {
        for key in KEYS {
            append(&mut tx, &outbox.message(key, text)).await.unwrap();
        }
    }
    tx.commit().await.unwrap();
    let relay = outbox.relay_with("one", |relay| {
        relay.workers = 1;
        relay.kafka.brokers = cluster.bootstrap_servers();
        relay.kafka.client = vec![("batch.num.messages".to_owned(), "1".to_owned())];
    });
    outbox.until("select count(*) from outbox_archive", 6).await;
    relay.stop().await;
    assert_eq!(outbox.count(r#"select count(*) from outbox_archive where "offset" < 0"#).await, 0);
    kafka::read_all(&cluster.bootstrap_servers(), std::slice::from_ref(&outbox.topic)).await
}

/// Every event is there, and first occurrences are in the order of their key.
fn check(seen: &[Seen]) {
    for key in KEYS {
        let mut numbers: Vec<&str> = vec![];
        for seen in seen.iter().filter(|seen| seen.key == key) {
            let number = seen.header("aggregate-seq");
            if !numbers.contains(&number) {
                numbers.push(number);
            }
        }
        assert_eq!(numbers, ["1", "2"], "key {key}: {seen:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_reported_as_delivered_without_an_offset_is_sent_again() {
    check(&relayed().await);
}

/// A broker that has just made a topic is not the leader of its partitions for a moment. About every second run of
/// this is reported success that never was.
async fn written_to_while_they_are_made(fencing: bool) {
    if PARTS.is_embedded() {
        return;
    }
    let outbox = Outbox::without_topic().await;
    let topics: Vec<String> = (0..20).map(|n| format!("{}.{n}", outbox.topic)).collect();
    let mut tx = outbox.pool.begin().await.unwrap();
    for topic in &topics {
        for key in KEYS {
            let message = NewMessage { topic: topic.clone(), ..outbox.message(&format!("{key}.{topic}"), "only") };
            append(&mut tx, &message).await.unwrap();
        }
    }
    tx.commit().await.unwrap();
    let relay = outbox.relay_with("one", |relay| {
        relay.workers = 1;
        relay.fencing = fencing;
        relay.kafka.client = vec![("batch.num.messages".to_owned(), "1".to_owned())];
    });
    PARTS.create_topics(&topics).await;
    outbox.until("select count(*) from outbox_archive", 20 * KEYS.len() as i64).await;
    relay.stop().await;
    let seen = kafka::read_all(&PARTS.brokers(), &topics).await;
    let keys_seen: BTreeSet<&str> = seen.iter().map(|seen| seen.key.as_str()).collect();
    assert_eq!(keys_seen.len(), 20 * KEYS.len(), "events are lost");
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_on_topics_that_are_written_to_while_they_are_made() {
    written_to_while_they_are_made(false).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_on_new_topics_behind_fences() {
    written_to_while_they_are_made(true).await;
}

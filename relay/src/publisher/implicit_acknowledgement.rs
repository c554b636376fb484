//! librdkafka's implicit acknowledgement, made to happen on its mock cluster. The broker refuses the first
//! request and appends the second, which was on its way already. librdkafka then reports success for the
//! first message as well, with the offset -1001, and never sends it again.

use std::time::Duration;

use chrono::DateTime;
use rdkafka::{
    ClientConfig, Message, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
    mocking::MockCluster,
    producer::DefaultProducerContext,
    types::{RDKafkaApiKey, RDKafkaRespErr},
};
use serde_json::value::RawValue;
use sqlx::types::Json;

use super::{KafkaSettings, Publisher, Report};
use crate::{delivery::PendingRow, fault::Fault, position::Position};

const TOPIC: &str = "events";
/// Long enough for the second request to leave before the answer to the first one comes.
const ROUND_TRIP: Duration = Duration::from_millis(300);
const TIMEOUT: Duration = Duration::from_secs(30);

struct Stage {
    cluster: MockCluster<'static, DefaultProducerContext>,
    publisher: Publisher,
}

impl Stage {
    fn new() -> Self {
        let cluster = MockCluster::new(1).expect("a mock cluster");
        cluster.create_topic(TOPIC, 1, 1).expect("a topic");
        cluster.broker_round_trip_time(-1, ROUND_TRIP).expect("a round trip");
        let client = vec![("batch.num.messages".to_owned(), "1".to_owned())];
        let settings = KafkaSettings { brokers: cluster.bootstrap_servers(), client };
        let publisher = Publisher::new(&settings, 10, TIMEOUT, None).expect("a publisher");
        Self { cluster, publisher }
    }

    /// The next Produce request is refused: the broker is not the leader yet.
    fn refuse_one_request(&self) {
        let refusal = [RDKafkaRespErr::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION];
        self.cluster.request_errors(RDKafkaApiKey::Produce, &refusal);
    }

    fn enqueue(&self, id: i64, key: &str) {
        self.publisher.enqueue(&row(id, key), 0).expect("enqueued");
    }

    async fn report(&mut self) -> Report {
        tokio::time::timeout(TIMEOUT, self.publisher.report()).await.expect("in time").expect("a report")
    }

    /// The keys that stand in the log, in their order.
    fn log(&self) -> Vec<String> {
        let reader: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.cluster.bootstrap_servers())
            .set("group.id", "log")
            .set("enable.partition.eof", "true")
            .create()
            .expect("a consumer");
        let mut from_the_beginning = TopicPartitionList::new();
        from_the_beginning.add_partition_offset(TOPIC, 0, Offset::Beginning).expect("an offset");
        reader.assign(&from_the_beginning).expect("an assignment");
        let mut keys = vec![];
        while let Some(Ok(message)) = reader.poll(TIMEOUT) {
            keys.push(String::from_utf8(message.key().unwrap_or_default().to_vec()).expect("text"));
        }
        keys
    }
}

fn row(id: i64, key: &str) -> PendingRow {
    PendingRow {
        id,
        lane: 0,
        key: key.into(),
        seq: 1,
        topic: TOPIC.to_owned(),
        payload: b"{}".to_vec(),
        headers: Json(RawValue::from_string("{}".to_owned()).expect("JSON")),
        replay_of: None,
        created_at: DateTime::UNIX_EPOCH,
        published_seq: 0,
        blocked: false,
    }
}

/// The fault of each failed report and the offset of each other one, in the order of the rows.
fn outcomes(mut reports: Vec<Report>) -> Vec<Result<i64, Fault>> {
    reports.sort_by_key(|report| report.row_id);
    reports.into_iter().map(|report| report.result.map(Position::offset).map_err(|failure| failure.fault)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_without_an_offset_is_no_acknowledgement() {
    let mut stage = Stage::new();
    stage.refuse_one_request();
    stage.enqueue(1, "a");
    stage.enqueue(2, "b");
    let reports = vec![stage.report().await, stage.report().await];
    assert_eq!(outcomes(reports), [Err(Fault::NoPosition), Ok(0)]);
    assert_eq!(stage.log(), ["b"], "the first message was never sent again");

    stage.enqueue(1, "a");
    let reports = vec![stage.report().await];
    assert_eq!(outcomes(reports), [Ok(1)]);
    assert_eq!(stage.log(), ["b", "a"]);
}

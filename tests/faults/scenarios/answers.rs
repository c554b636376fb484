//! A broker that answers with errors. Real brokers can't be told to: this one is librdkafka's mock,
//! which speaks the protocol and answers as it is told, and no guarantee of Kafka's is measured on it.

use std::{sync::mpsc, thread, time::Duration};

use rdkafka::{
    mocking::MockCluster,
    types::{RDKafkaApiKey, RDKafkaRespErr as Code},
};

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    stage::Stage,
};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("the broker answers: try again", "each retriable error of a produce request", retriable),
        scenario!("the broker answers: never", "each fatal error; the producer is made anew", fatal),
        scenario!("the broker answers: not you", "authorisation that is missing for a while", unauthorised),
    ]
}

const RETRIABLE: [Code; 10] = [
    Code::RD_KAFKA_RESP_ERR_LEADER_NOT_AVAILABLE,
    Code::RD_KAFKA_RESP_ERR_NOT_LEADER_FOR_PARTITION,
    Code::RD_KAFKA_RESP_ERR_REQUEST_TIMED_OUT,
    Code::RD_KAFKA_RESP_ERR_NETWORK_EXCEPTION,
    Code::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS,
    Code::RD_KAFKA_RESP_ERR_NOT_ENOUGH_REPLICAS_AFTER_APPEND,
    Code::RD_KAFKA_RESP_ERR_KAFKA_STORAGE_ERROR,
    Code::RD_KAFKA_RESP_ERR_COORDINATOR_LOAD_IN_PROGRESS,
    Code::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART,
    Code::RD_KAFKA_RESP_ERR__TRANSPORT,
];

const FATAL: [Code; 3] = [
    Code::RD_KAFKA_RESP_ERR_OUT_OF_ORDER_SEQUENCE_NUMBER,
    Code::RD_KAFKA_RESP_ERR_UNKNOWN_PRODUCER_ID,
    Code::RD_KAFKA_RESP_ERR_INVALID_PRODUCER_EPOCH,
];

const REFUSED: [Code; 3] = [
    Code::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED,
    Code::RD_KAFKA_RESP_ERR_CLUSTER_AUTHORIZATION_FAILED,
    Code::RD_KAFKA_RESP_ERR_POLICY_VIOLATION,
];

async fn retriable(stage: Stage) -> Verdict {
    answering(stage, &RETRIABLE).await
}

async fn fatal(stage: Stage) -> Verdict {
    answering(stage, &FATAL).await
}

async fn unauthorised(stage: Stage) -> Verdict {
    answering(stage, &REFUSED).await
}

/// Under load, every so often one produce request is answered with the next of these errors.
async fn answering(mut stage: Stage, errors: &'static [Code]) -> Verdict {
    let broker = Broker::start();
    let wishes = Wishes { brokers: Some(broker.bootstrap.clone()), no_user_service: true, ..Wishes::default() };
    let fleet = Fleet::with_topics(&stage, wishes, |topics| broker.create_topics(topics)).await;
    let relay = fleet.process("relay", "", 0);
    relay.until_up().await;
    for &error in errors {
        for _ in 0..if stage.full { 5 } else { 2 } {
            fleet.disturbed();
            broker.answer_next(error, stage.roll(1, 4) as usize);
            fleet.commit_events(6, 5).await;
        }
        // Each is got over by itself; and answers that wait for a request each would only pile up.
        fleet.until_count("select count(*) from outbox", 0, Duration::from_secs(60)).await;
    }
    fleet.settle(Duration::from_secs(120)).await;
    // Consumers first: closing one whose broker is gone never ends.
    let verdict = judge(fleet, vec![relay], Expected::default()).await;
    drop(broker);
    verdict
}

/// The mock cluster can't leave the thread it was made on.
struct Broker {
    bootstrap: String,
    orders: mpsc::Sender<Order>,
}

enum Order {
    Create(Vec<String>, mpsc::Sender<()>),
    Answer(Code, usize),
}

impl Broker {
    fn start() -> Self {
        let (orders, taken) = mpsc::channel();
        let (started, start) = mpsc::channel();
        thread::spawn(move || {
            let cluster = MockCluster::new(1).expect("a mock cluster");
            started.send(cluster.bootstrap_servers()).expect("awaited");
            for order in taken {
                match order {
                    Order::Create(topics, done) => {
                        for topic in topics {
                            cluster.create_topic(&topic, 4, 1).expect("a topic");
                        }
                        let _ = done.send(());
                    }
                    Order::Answer(error, times) => {
                        cluster.request_errors(RDKafkaApiKey::Produce, &vec![error; times]);
                    }
                }
            }
        });
        Self { bootstrap: start.recv().expect("an address"), orders }
    }

    fn create_topics(&self, topics: &[String]) {
        let (done, created) = mpsc::channel();
        self.orders.send(Order::Create(topics.to_owned(), done)).expect("it runs");
        created.recv().expect("created");
    }

    fn answer_next(&self, error: Code, times: usize) {
        self.orders.send(Order::Answer(error, times)).expect("it runs");
    }
}

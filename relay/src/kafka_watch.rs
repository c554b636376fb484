//! Looks whether Kafka can be published to, also while nothing waits: an outage should be known before the first
//! event meets it.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    ClientConfig, ClientContext,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode as Code},
    producer::{BaseProducer, Producer, ProducerContext},
};
use tokio::{task::spawn_blocking, time::sleep};
use tokio_util::sync::CancellationToken;

use crate::{
    publisher::{KafkaSettings, PublisherError, refused},
    trouble::{TroubleKind, Troubles},
};

/// Between two looks while all is well, and while something is not.
const LOOK: Duration = Duration::from_secs(30);
const LOOK_AGAIN: Duration = Duration::from_secs(5);
/// Longest wait for an answer.
const ANSWER: Duration = Duration::from_secs(5);

/// What keeps events from being published.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum PublishTrouble {
    /// No broker answers.
    BrokersAway,
    /// Topics do not exist.
    TopicMissing,
    /// Topics may not be seen by this client.
    TopicForbidden,
}

impl TroubleKind for PublishTrouble {
    const GAUGE: &'static str = "outbox_publish_trouble";
    const EFFECT: &'static str = "events are not published";
    const ALL: &'static [Self] =
        &[PublishTrouble::BrokersAway, PublishTrouble::TopicMissing, PublishTrouble::TopicForbidden];

    fn as_str(self) -> &'static str {
        match self {
            PublishTrouble::BrokersAway => "brokers-away",
            PublishTrouble::TopicMissing => "topic-missing",
            PublishTrouble::TopicForbidden => "topic-forbidden",
        }
    }
}

/// Looks at these topics until `stop`, and tells `troubles`.
///
/// # Errors
///
/// The client's settings are refused.
pub async fn watch_kafka(
    kafka: KafkaSettings,
    topics: Vec<String>,
    troubles: Troubles<PublishTrouble>,
    stop: CancellationToken,
) -> Result<(), PublisherError> {
    troubles.describe();
    let client = Arc::new(client(&kafka)?);
    while !stop.is_cancelled() {
        let (asked, names) = (client.clone(), topics.clone());
        let looked = spawn_blocking(move || look(&asked, &names)).await;
        let well = looked.is_ok_and(|seen| tell(&troubles, seen));
        stop.run_until_cancelled(sleep(if well { LOOK } else { LOOK_AGAIN })).await;
    }
    Ok(())
}

/// What is wrong with each topic.
type Seen = Vec<(String, Option<Code>)>;

fn look(client: &BaseProducer<Quiet>, topics: &[String]) -> Result<Seen, KafkaError> {
    let error_of = |topic: &String| {
        let metadata = client.client().fetch_metadata(Some(topic), ANSWER)?;
        let error = metadata.topics().first().and_then(|topic| topic.error()).map(Code::from);
        Ok((topic.clone(), error))
    };
    topics.iter().map(error_of).collect()
}

/// Whether all is well.
fn tell(troubles: &Troubles<PublishTrouble>, seen: Result<Seen, KafkaError>) -> bool {
    let seen = match seen {
        Ok(seen) => seen,
        Err(error) => {
            let why = error.rdkafka_error_code().map(|code| format!(" ({code})")).unwrap_or_default();
            troubles.begin(PublishTrouble::BrokersAway, format!("none of the brokers answers{why}"));
            return false;
        }
    };
    troubles.end(PublishTrouble::BrokersAway);
    let with = |codes: &[Code]| -> Vec<&str> {
        let is_one = |error: &Option<Code>| error.is_some_and(|error| codes.contains(&error));
        seen.iter().filter(|(_, error)| is_one(error)).map(|(topic, _)| topic.as_str()).collect()
    };
    let mut well = true;
    for (kind, codes, what) in [
        (PublishTrouble::TopicMissing, &[Code::UnknownTopic, Code::UnknownTopicOrPartition][..], "topics do not exist"),
        (PublishTrouble::TopicForbidden, &[Code::TopicAuthorizationFailed], "topics are closed by access control"),
    ] {
        let topics = with(codes);
        if topics.is_empty() {
            troubles.end(kind);
        } else {
            well = false;
            troubles.begin(kind, format!("{what}: {}", topics.join(", ")));
        }
    }
    well
}

fn client(kafka: &KafkaSettings) -> Result<BaseProducer<Quiet>, PublisherError> {
    let mut config = ClientConfig::new();
    for (property, value) in &kafka.client {
        config.set(property, value);
    }
    config
        .set("bootstrap.servers", &kafka.brokers)
        .set("metadata.recovery.strategy", "rebootstrap")
        .set("allow.auto.create.topics", "false")
        .set("reconnect.backoff.max.ms", "1000")
        .create_with_context(Quiet)
        .map_err(refused)
}

/// The producers say the same.
struct Quiet;

impl ClientContext for Quiet {
    fn log(&self, _: RDKafkaLogLevel, _: &str, _: &str) {}
    fn error(&self, _: KafkaError, _: &str) {}
}

impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &rdkafka::message::DeliveryResult<'_>, (): ()) {}
}

#[cfg(test)]
mod tests {
    use rdkafka::{mocking::MockCluster, types::RDKafkaRespErr};

    use super::*;

    fn kinds(troubles: &Troubles<PublishTrouble>) -> Vec<PublishTrouble> {
        troubles.now().into_iter().map(|(kind, ..)| kind).collect()
    }

    #[test]
    fn a_cluster_that_is_away_and_a_topic_that_is_missing_are_told_apart_and_end() {
        let cluster = MockCluster::new(1).expect("the mock cluster starts");
        cluster.create_topic("t", 1, 1).expect("a topic");
        let kafka = KafkaSettings { brokers: cluster.bootstrap_servers(), client: vec![] };
        let (client, topics, troubles) = (client(&kafka).expect("a client"), ["t".to_owned()], Troubles::default());
        assert!(tell(&troubles, look(&client, &topics)));
        assert_eq!(kinds(&troubles), []);

        let missing = RDKafkaRespErr::RD_KAFKA_RESP_ERR_UNKNOWN_TOPIC_OR_PART;
        cluster.topic_error("t", missing).expect("the topic is hidden");
        assert!(!tell(&troubles, look(&client, &topics)));
        assert_eq!(kinds(&troubles), [PublishTrouble::TopicMissing]);
        assert_eq!(troubles.now()[0].1, "topics do not exist: t");

        cluster.broker_down(1).expect("the broker goes");
        assert!(!tell(&troubles, look(&client, &topics)));
        assert_eq!(kinds(&troubles), [PublishTrouble::BrokersAway, PublishTrouble::TopicMissing]);

        cluster.topic_error("t", RDKafkaRespErr::RD_KAFKA_RESP_ERR_NO_ERROR).expect("the topic is there");
        cluster.broker_up(1).expect("the broker comes back");
        while !tell(&troubles, look(&client, &topics)) {}
        assert_eq!(kinds(&troubles), []);
    }
}

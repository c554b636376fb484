//! Looks after the reply topics: whether they exist and may be read.

use std::{sync::Arc, time::Duration};

use rdkafka::{
    consumer::{Consumer, StreamConsumer},
    error::{KafkaError, RDKafkaErrorCode as Code},
};
use tokio::{task::spawn_blocking, time::timeout};

use super::{
    client::Context,
    status::{ConsumerStatus, Trouble},
};

/// How often they are looked at while all is well, and while something is not.
const LOOK: Duration = Duration::from_secs(60);
const LOOK_AGAIN: Duration = Duration::from_secs(10);
const ANSWER: Duration = Duration::from_secs(5);

/// Looks at the topics until it is dropped.
pub(super) async fn watch(consumer: Arc<StreamConsumer<Context>>, topics: Vec<String>, status: ConsumerStatus) {
    loop {
        let next = match look(&consumer, &topics, &status).await {
            true => LOOK,
            false => LOOK_AGAIN,
        };
        // At once when reading has met an error about topics.
        let _ = timeout(next, consumer.context().topics_in_doubt.notified()).await;
    }
}

/// Whether all topics are there and may be read.
async fn look(consumer: &Arc<StreamConsumer<Context>>, topics: &[String], status: &ConsumerStatus) -> bool {
    let (mut missing, mut forbidden) = (vec![], vec![]);
    for topic in topics {
        match found(consumer.clone(), topic.clone()).await {
            Ok(None) => {}
            Ok(Some(Code::UnknownTopic | Code::UnknownTopicOrPartition)) => missing.push(topic.as_str()),
            Ok(Some(Code::TopicAuthorizationFailed)) => forbidden.push(topic.as_str()),
            // A leader that is being elected; brokers that are away, which the client says itself.
            Ok(Some(_)) | Err(_) => return false,
        }
    }
    let tell = |trouble, topics: &[&str], what: &str| match topics.is_empty() {
        true => status.end(trouble),
        false => status.begin(trouble, format!("{what}: {}", topics.join(", "))),
    };
    tell(Trouble::TopicMissing, &missing, "reply topics do not exist");
    tell(Trouble::TopicForbidden, &forbidden, "reply topics may not be read (access control)");
    missing.is_empty() && forbidden.is_empty()
}

/// What is wrong with a topic. The question blocks.
async fn found(consumer: Arc<StreamConsumer<Context>>, topic: String) -> Result<Option<Code>, KafkaError> {
    let asked = spawn_blocking(move || {
        let metadata = consumer.fetch_metadata(Some(&topic), ANSWER)?;
        Ok(metadata.topics().first().and_then(|topic| topic.error()).map(Code::from))
    });
    asked.await.unwrap_or_else(|failure| Err(KafkaError::ClientCreation(failure.to_string())))
}

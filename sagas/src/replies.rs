//! Taking replies in. One message, one transaction: inbox, saga, log, effects.

use outbox_relay::{
    Database, fault_points,
    inbox::{self, Bytes, Incoming, Outcome},
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    definition::{Definition, Meaning},
    journal::EventSource,
    machine::{Event, Ignored},
    orchestrator::{Flows, Handled, Orchestrator, SagaError},
    reply::{self, NamedBy, Naming, Received, Verdict},
    state::Saga,
    store,
};

/// The inbox's name for this consumer.
pub const CONSUMER: &str = "sagas";

/// What became of a message, before it is written down.
struct Conclusion {
    outcome: Outcome,
    detail: Option<String>,
    saga_id: Option<Uuid>,
}

impl Conclusion {
    fn rejected(why: String) -> Self {
        Self { outcome: Outcome::Rejected, detail: Some(why), saga_id: None }
    }
}

impl<F: Flows> Orchestrator<F> {
    /// Takes one message in. Every message ends in the inbox, whatever it is; an error means that
    /// the database failed and the message has to be tried again.
    pub async fn receive(&self, db: &Database, message: &Received) -> Result<Outcome, SagaError> {
        let (orchestrator, message) = (self.clone(), message.clone());
        let outcome = self
            .committed(db, move |conn| {
                Box::pin(async move {
                    let message_key = message.message_key();
                    if !inbox::insert(conn, incoming(&message, &message_key)).await? {
                        return Ok(Outcome::Duplicate);
                    }
                    fault_points::reached("sagas::in_inbox");
                    let conclusion = orchestrator.apply(conn, &message, &message_key).await?;
                    orchestrator.conclude(conn, &message_key, &conclusion, &bytes_of(&message)).await?;
                    fault_points::reached("sagas::decided");
                    Ok(conclusion.outcome)
                })
            })
            .await?;
        metrics::counter!("saga_replies_total", "outcome" => outcome.as_str()).increment(1);
        Ok(outcome)
    }

    /// Keeps a message that made the handler panic, so that the partition goes on.
    pub(crate) async fn reject(&self, db: &Database, message: &Received, why: &str) -> Result<(), SagaError> {
        let (orchestrator, message) = (self.clone(), message.clone());
        let conclusion = Conclusion::rejected(why.to_owned());
        self.committed(db, move |conn| {
            Box::pin(async move {
                let message_key = message.message_key();
                inbox::insert(conn, incoming(&message, &message_key)).await?;
                orchestrator.conclude(conn, &message_key, &conclusion, &bytes_of(&message)).await
            })
        })
        .await
    }

    /// Takes up the replies that waited while the other service was asked.
    pub(crate) async fn take_up_deferred(&self, conn: &mut PgConnection, saga_id: Uuid) -> Result<(), SagaError> {
        for waiting in inbox::deferred(conn, CONSUMER, saga_id).await? {
            let message = Received {
                topic: waiting.topic,
                partition: waiting.partition,
                offset: waiting.offset,
                timestamp_ms: 0,
                cluster_id: String::new(),
                key: waiting.bytes.key,
                headers: waiting.bytes.headers,
                payload: waiting.bytes.payload,
            };
            let conclusion = self.apply(conn, &message, &waiting.message_key).await?;
            self.conclude(conn, &waiting.message_key, &conclusion, &bytes_of(&message)).await?;
        }
        Ok(())
    }

    async fn conclude(
        &self,
        conn: &mut PgConnection,
        message_key: &str,
        conclusion: &Conclusion,
        bytes: &Bytes,
    ) -> Result<(), SagaError> {
        let Conclusion { outcome, detail, saga_id } = conclusion;
        if matches!(outcome, Outcome::Unknown | Outcome::Unexpected | Outcome::Rejected) {
            let shown: String = message_key.chars().take(200).collect();
            tracing::warn!(
                message.key = shown,
                outcome = outcome.as_str(),
                detail,
                "a reply took no effect; it is kept in the inbox"
            );
        }
        inbox::conclude(conn, CONSUMER, message_key, *outcome, detail.as_deref(), *saga_id, bytes).await?;
        Ok(())
    }

    async fn apply(
        &self,
        conn: &mut PgConnection,
        message: &Received,
        message_key: &str,
    ) -> Result<Conclusion, SagaError> {
        let naming = match reply::naming(message) {
            Ok(naming) => naming,
            Err(why) => return Ok(Conclusion::rejected(why)),
        };
        let saga = match self.saga_named(conn, &message.topic, &naming).await? {
            Ok(saga) => saga,
            Err(conclusion) => return Ok(conclusion),
        };
        let about = |outcome, detail: String| Conclusion { outcome, detail: Some(detail), saga_id: Some(saga.saga_id) };
        let Some((step, meaning)) = self.meaning(&saga, &message.topic) else {
            let detail = format!("saga {} ({}) gets no replies on {}", saga.saga_id, saga.name, message.topic);
            return Ok(about(Outcome::Unexpected, detail));
        };
        let event = match reply::verdict(message, meaning, &self.inner.settings.participant) {
            Ok(Verdict::Step(answer)) => Event::Replied { step, answer },
            Ok(Verdict::Undone) => Event::UndoReplied { step, refusal: None },
            Ok(Verdict::UndoRefused(why)) => Event::UndoReplied { step, refusal: Some(why) },
            Err(why) => return Ok(about(Outcome::Rejected, why)),
        };
        let source = EventSource { reference: Some(message_key), ..EventSource::of("reply") };
        let handled = self.take_in(conn, saga.saga_id, &event, source).await?;
        let nothing = |why: &str| Some(why.to_owned());
        let (outcome, detail) = match handled {
            Some(Handled::Moved(_)) | Some(Handled::Ignored(Ignored::Noted)) => (Outcome::Applied, None),
            Some(Handled::Deferred) => (Outcome::Deferred, nothing("waits until the other service has been asked")),
            Some(Handled::Ignored(Ignored::Duplicate)) => (Outcome::Duplicate, nothing("says what is known already")),
            Some(Handled::Ignored(Ignored::Late)) => (Outcome::Late, nothing("the saga was settled before it came")),
            Some(Handled::Ignored(Ignored::Unexpected)) => {
                (Outcome::Unexpected, nothing("not a reply this saga can get where it stands"))
            }
            None => (Outcome::Unknown, nothing("the saga is gone")),
        };
        Ok(Conclusion { outcome, detail, saga_id: Some(saga.saga_id) })
    }

    /// Finds the one saga a reply names. What is present must agree: a reply that names one saga by
    /// its id and another by its user takes no effect.
    async fn saga_named(
        &self,
        conn: &mut PgConnection,
        topic: &str,
        naming: &Naming,
    ) -> Result<Result<Saga, Conclusion>, SagaError> {
        let none =
            |detail: String| Ok(Err(Conclusion { outcome: Outcome::Unknown, detail: Some(detail), saga_id: None }));
        let saga_id = match &naming.by {
            NamedBy::SagaId(saga_id) => *saga_id,
            NamedBy::CorrelationId(correlation_id) => match store::by_correlation(conn, correlation_id).await? {
                Some(saga_id) => saga_id,
                None => return none(format!("no saga has the correlation id {correlation_id:?}")),
            },
            NamedBy::Subject(subject) => match self.open_saga_about(conn, topic, subject).await?.as_slice() {
                [saga_id] => *saga_id,
                [] => return none(format!("no open saga is about user {subject}")),
                several => return none(format!("{} open sagas are about user {subject}", several.len())),
            },
        };
        let Some(saga) = store::find(conn, saga_id).await? else {
            return none(format!("there is no saga {saga_id}"));
        };
        let disagrees = match (&naming.subject, &naming.correlation_id, naming.causation_id) {
            (Some(subject), ..) if *subject != saga.subject => {
                Some(format!("it speaks of user {subject}, the saga it names is about user {}", saga.subject))
            }
            (_, Some(correlation_id), _) if *correlation_id != saga.correlation_id => {
                let known = store::by_correlation(conn, correlation_id).await?.is_some();
                let whose = if known { "belongs to another saga" } else { "is unknown" };
                Some(format!(
                    "its saga id and its correlation id disagree: the correlation id {correlation_id:?} {whose}"
                ))
            }
            _ => None,
        };
        Ok(match disagrees {
            None => Ok(saga),
            Some(detail) => {
                Err(Conclusion { outcome: Outcome::Unexpected, detail: Some(detail), saga_id: Some(saga_id) })
            }
        })
    }

    async fn open_saga_about(
        &self,
        conn: &mut PgConnection,
        topic: &str,
        subject: &str,
    ) -> Result<Vec<Uuid>, SagaError> {
        let mut found = vec![];
        for definition in self.kinds_replying_on(topic) {
            found.extend(store::open_by_subject(conn, definition.name, subject).await?);
        }
        Ok(found)
    }

    fn kinds_replying_on(&self, topic: &str) -> impl Iterator<Item = &'static Definition> {
        let topic = topic.to_owned();
        self.inner.definitions.iter().copied().filter(move |definition| definition.meaning_of(&topic).is_some())
    }

    fn meaning(&self, saga: &Saga, topic: &str) -> Option<(usize, Meaning)> {
        let definition = self.inner.definitions.iter().find(|definition| definition.name == saga.name)?;
        definition.meaning_of(topic)
    }
}

fn incoming<'a>(message: &'a Received, message_key: &'a str) -> Incoming<'a> {
    Incoming {
        consumer: CONSUMER,
        message_key,
        topic: &message.topic,
        partition: message.partition,
        offset: message.offset,
    }
}

fn bytes_of(message: &Received) -> Bytes {
    Bytes { key: message.key.clone(), headers: message.headers.clone(), payload: message.payload.clone() }
}

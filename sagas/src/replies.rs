//! Taking replies in. One message, one transaction: inbox, saga, log, effects.

use std::time::Duration;

use outbox_relay::{
    Database, fault_points,
    inbox::{self, Bytes, Claim, Incoming, Outcome},
    logging::{Throttle, truncated, truncated_to},
};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    definition::{Definition, Meaning},
    journal::EventSource,
    machine::{Answer, Event, Ignored},
    orchestrator::{Flows, Handled, Orchestrator, SagaError},
    reply::{self, NamedBy, Naming, Received, Verdict},
    state::Saga,
    store,
};

/// The inbox's name for this consumer.
pub const CONSUMER: &str = "sagas";

/// Most bytes of a reason in the inbox.
const LONGEST_DETAIL: usize = 1000;

/// A reply's age beside its saga's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Age {
    /// It can't be meant for anything older.
    Young,
    /// The clocks do not tell.
    InDoubt,
    TooOld {
        seconds: u64,
    },
}

/// What became of a message, before it is written down.
struct Conclusion {
    outcome: Outcome,
    detail: Option<String>,
    saga_id: Option<Uuid>,
    /// It took effect, or waits to: another message under its id never will.
    burns_id: bool,
}

impl Conclusion {
    fn without_effect(outcome: Outcome, detail: String) -> Self {
        Self { outcome, detail: Some(detail), saga_id: None, burns_id: false }
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
                    let digest = message.bytes.digest(&message.topic);
                    let identity = message.identity(&digest);
                    let incoming = incoming(&message, &identity, &digest);
                    let claim = inbox::claim(conn, incoming).await?;
                    fault_points::reached("sagas::in_inbox");
                    let conclusion = match claim {
                        Claim::New { seen } => orchestrator.apply(conn, &message, &identity, seen).await?,
                        Claim::Copy => {
                            tracing::debug!(message.key = identity, "a reply came again");
                            return Ok(Outcome::Duplicate);
                        }
                        Claim::Reused => Conclusion::without_effect(
                            Outcome::Unexpected,
                            "id reused: another message under its ce_id took effect before".to_owned(),
                        ),
                    };
                    if matches!(claim, Claim::New { .. }) && !conclusion.burns_id {
                        inbox::release(conn, incoming).await?;
                    }
                    conclude(conn, incoming, &conclusion, &message.bytes).await?;
                    fault_points::reached("sagas::decided");
                    Ok(conclusion.outcome)
                })
            })
            .await?;
        count(outcome);
        Ok(outcome)
    }

    /// Keeps a message that can't be taken in, so that the partition goes on. Without its bytes when the
    /// database refuses those, too: its place in Kafka is always kept.
    pub(crate) async fn reject(&self, db: &Database, message: &Received, why: &str) -> Result<(), SagaError> {
        match self.keep_rejected(db, message.clone(), message.clone(), why.to_owned()).await {
            Err(error) if error.is_the_messages_fault() => {
                let bare = Received { bytes: Bytes::default(), kafka_at: None, ..message.clone() };
                let why = format!("{why}; its bytes could not be kept: {error}");
                self.keep_rejected(db, message.clone(), bare, why).await?;
            }
            kept => kept?,
        }
        count(Outcome::Rejected);
        Ok(())
    }

    /// Keeps `kept` of a message.
    async fn keep_rejected(
        &self,
        db: &Database,
        message: Received,
        kept: Received,
        why: String,
    ) -> Result<(), SagaError> {
        self.committed(db, move |conn| {
            Box::pin(async move {
                let digest = message.bytes.digest(&message.topic);
                let identity = message.identity(&digest);
                let conclusion = Conclusion::without_effect(Outcome::Rejected, why);
                conclude(conn, incoming(&kept, &identity, &digest), &conclusion, &kept.bytes).await
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
                kafka_at: waiting.kafka_at,
                cluster_id: String::new(),
                bytes: waiting.bytes,
            };
            let incoming = incoming(&message, &waiting.identity, &waiting.digest);
            let conclusion = self.apply(conn, &message, &waiting.identity, false).await?;
            if !conclusion.burns_id {
                inbox::release(conn, incoming).await?;
            }
            conclude(conn, incoming, &conclusion, &message.bytes).await?;
            count(conclusion.outcome);
        }
        Ok(())
    }

    async fn apply(
        &self,
        conn: &mut PgConnection,
        message: &Received,
        identity: &str,
        seen: bool,
    ) -> Result<Conclusion, SagaError> {
        let naming = match reply::naming(message) {
            Ok(naming) => naming,
            Err(why) => return Ok(Conclusion::without_effect(Outcome::Rejected, why)),
        };
        let saga = match self.saga_named(conn, &message.topic, &naming).await? {
            Ok(saga) => saga,
            Err(conclusion) => return Ok(conclusion),
        };
        let about = |outcome, detail: String| Conclusion {
            saga_id: Some(saga.saga_id),
            ..Conclusion::without_effect(outcome, detail)
        };
        let Some((step, meaning)) = self.meaning(&saga, &message.topic) else {
            let detail = format!("saga {} ({}) gets no replies on {}", saga.saga_id, saga.name, message.topic);
            return Ok(about(Outcome::Unexpected, detail));
        };
        let age = self.age(&naming, message, &saga);
        if let Age::TooOld { seconds } = age {
            let detail = format!("it is {seconds} s older than the only saga it can be meant for");
            return Ok(about(Outcome::Unexpected, detail));
        }
        let event = match reply::verdict(message, meaning, &self.inner.settings.participant) {
            Ok(Verdict::Step(Answer::Refused(_))) if age == Age::InDoubt => {
                Event::Doubted { step, recourse: self.inner.flows.recourse() }
            }
            Ok(Verdict::Step(answer)) => Event::Replied { step, answer },
            Ok(Verdict::Undone) => Event::UndoReplied { step, refusal: None },
            Ok(Verdict::UndoRefused(why)) => Event::UndoReplied { step, refusal: Some(why) },
            Err(why) => return Ok(about(Outcome::Rejected, why)),
        };
        let source = EventSource { reference: Some(identity), repeated: seen, ..EventSource::of("reply") };
        let handled = self.take_in(conn, saga.saga_id, &event, source).await?;
        let burns_id = matches!(handled, Some(Handled::Moved(_) | Handled::Deferred));
        let nothing = |why: &str| Some(why.to_owned());
        let (outcome, detail) = match handled {
            Some(Handled::Moved(_)) if matches!(event, Event::Doubted { .. }) => {
                (Outcome::Applied, nothing("it may be older than the saga: it is asked about, not obeyed"))
            }
            Some(Handled::Moved(_)) | Some(Handled::Ignored(Ignored::Noted)) => (Outcome::Applied, None),
            Some(Handled::Deferred) => (Outcome::Deferred, nothing("waits until the other service has been asked")),
            Some(Handled::Ignored(Ignored::Duplicate)) => (Outcome::Duplicate, nothing("says what is known already")),
            Some(Handled::Ignored(Ignored::Late)) => (Outcome::Late, nothing("the saga was settled before it came")),
            Some(Handled::Ignored(Ignored::Unexpected)) => {
                (Outcome::Unexpected, nothing("not a reply this saga can get where it stands"))
            }
            None => (Outcome::Unknown, nothing("the saga is gone")),
        };
        Ok(Conclusion { outcome, detail, saga_id: Some(saga.saga_id), burns_id })
    }

    /// Finds the one saga a reply names. What is present must agree: a reply that names one saga by
    /// its id and another by its user takes no effect.
    async fn saga_named(
        &self,
        conn: &mut PgConnection,
        topic: &str,
        naming: &Naming,
    ) -> Result<Result<Saga, Conclusion>, SagaError> {
        let none = |detail: String| Ok(Err(Conclusion::without_effect(Outcome::Unknown, detail)));
        let saga_id = match &naming.by {
            NamedBy::SagaId(saga_id) => *saga_id,
            NamedBy::CorrelationId(correlation_id) => match store::by_correlation(conn, correlation_id).await? {
                Some(saga_id) => saga_id,
                None => return none(format!("no saga has the correlation id {:?}", truncated(correlation_id))),
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
        let disagrees = match (&naming.subject, &naming.correlation_id) {
            (Some(subject), _) if *subject != saga.subject => {
                Some(format!("it speaks of user {subject}, the saga it names is about user {}", saga.subject))
            }
            (_, Some(correlation_id)) if *correlation_id != saga.correlation_id => {
                let known = store::by_correlation(conn, correlation_id).await?.is_some();
                let whose = if known { "belongs to another saga" } else { "is unknown" };
                Some(format!(
                    "its saga id and its correlation id disagree: the correlation id {:?} {whose}",
                    truncated(correlation_id)
                ))
            }
            _ => None,
        };
        Ok(match disagrees {
            None => Ok(saga),
            Some(detail) => {
                Err(Conclusion { saga_id: Some(saga_id), ..Conclusion::without_effect(Outcome::Unexpected, detail) })
            }
        })
    }

    /// Whether a reply is old enough to be meant for something before this saga. Our saga ids and correlation ids
    /// were never in use before; anything else may have been, in a database that was here before this one.
    fn age(&self, naming: &Naming, message: &Received, saga: &Saga) -> Age {
        let ours = match naming.by {
            NamedBy::SagaId(_) => true,
            NamedBy::CorrelationId(_) => saga.correlation_made,
            NamedBy::Subject(_) => false,
        };
        let Some(kafka_at) = message.kafka_at.filter(|_| !ours) else {
            return if ours { Age::Young } else { Age::InDoubt };
        };
        match (saga.created_at - kafka_at).to_std() {
            // Not older at all.
            Err(_) => Age::Young,
            Ok(older) if older <= self.inner.settings.reply_clock_tolerance => Age::InDoubt,
            Ok(older) => Age::TooOld { seconds: older.as_secs() },
        }
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

fn incoming<'a>(message: &'a Received, identity: &'a str, digest: &'a [u8]) -> Incoming<'a> {
    Incoming {
        consumer: CONSUMER,
        identity,
        digest,
        topic: &message.topic,
        partition: message.partition,
        offset: message.offset,
        kafka_at: message.kafka_at,
    }
}

/// Writes down what became of a message.
async fn conclude(
    conn: &mut PgConnection,
    incoming: Incoming<'_>,
    conclusion: &Conclusion,
    bytes: &Bytes,
) -> Result<(), SagaError> {
    let Conclusion { outcome, saga_id, burns_id, .. } = *conclusion;
    let mut detail = conclusion.detail.as_deref().map(|detail| truncated_to(detail, LONGEST_DETAIL).into_owned());
    let unreadable = bytes.unreadable_headers;
    if unreadable > 0 {
        let also = format!("names of headers that are not UTF-8: {unreadable}");
        detail = Some(detail.map_or(also.clone(), |detail| format!("{detail}; {also}")));
    }
    // Of what did as it should, or said what was known, there is nothing left to find out.
    let plain = outcome == Outcome::Duplicate || outcome == Outcome::Applied && detail.is_none();
    let bytes = (!plain).then_some(bytes);
    let disposition = inbox::Disposition { outcome, detail: detail.as_deref(), saga_id, bytes };
    if burns_id {
        inbox::conclude(conn, incoming, disposition).await?;
    } else {
        inbox::keep(conn, incoming, disposition).await?;
    }
    if outcome != Outcome::Applied && outcome != Outcome::Deferred {
        log_no_effect(&incoming, outcome, detail.as_deref().unwrap_or_default());
    }
    Ok(())
}

fn count(outcome: Outcome) {
    metrics::counter!("saga_replies_total", "outcome" => outcome.as_str()).increment(1);
}

/// One line a second for each outcome, whatever a stranger sends; the rest is counted. Every message has its
/// row in the inbox.
fn log_no_effect(message: &Incoming<'_>, outcome: Outcome, detail: &str) {
    static LINES: Throttle<Outcome> = Throttle::every(Duration::from_secs(1));
    let Some(line) = LINES.occurred(outcome) else { return };
    let (topic, partition, offset, left_out) = (message.topic, message.partition, message.offset, line.left_out);
    let (outcome, detail) = (outcome.as_str(), truncated(detail));
    match outcome {
        "late" | "duplicate" => {
            tracing::info!(topic, partition, offset, outcome, %detail, left_out, "a reply took no effect");
        }
        _ => tracing::warn!(
            topic, partition, offset, outcome, %detail, left_out,
            "a reply took no effect; it is kept in the inbox"
        ),
    }
}

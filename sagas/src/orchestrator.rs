//! Carries decisions out: one event, one transaction.

use std::{collections::BTreeMap, future::Future, sync::Arc, time::Duration};

use chrono::Utc;
use outbox_relay::{AppendError, Database, NewMessage, Wake, Work, WorkError, append};
use serde_json::{Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    definition::{Command, Definition, Undo},
    journal::EventSource,
    machine::{Decision, Effect, Event, Ignored, Position, Recourse, Settlement, StepSet, Transition, decide},
    state::{Saga, Status},
    store::{self, LogLine, NewRow, Patience},
};

/// What a flow does on this side, and whom it asks. One implementation for the service, others for
/// tests of flows.
pub trait Flows: Send + Sync + 'static {
    /// The flow has completed: do here what that means, in this transaction.
    fn complete(
        &self,
        conn: &mut PgConnection,
        saga: &Saga,
    ) -> impl Future<Output = Result<LocalOutcome, sqlx::Error>> + Send;

    /// The flow is taken back: undo here what it did, in this transaction.
    fn compensate(
        &self,
        conn: &mut PgConnection,
        saga: &Saga,
    ) -> impl Future<Output = Result<LocalOutcome, sqlx::Error>> + Send;

    /// Whom to ask about silence.
    fn recourse(&self) -> Recourse;

    /// Asks the other service. No transaction is open meanwhile.
    fn ask(&self, saga: &Saga) -> impl Future<Output = Settlement> + Send;
}

/// What came of the local part of a move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LocalOutcome {
    /// Done, or done before.
    Applied,
    /// It must not be done; the saga is stuck with this reason, and nothing is sent.
    Impossible(String),
}

/// How sagas are run.
#[derive(Debug, Clone)]
pub struct SagaSettings {
    /// Event source and sender of commands (`ce_source`, `sender`).
    pub source: String,
    /// Put before every topic's name, to keep systems on one cluster apart. Usually empty.
    pub topic_prefix: String,
    /// Name under which services of the original fleet sign their `saga-reply`.
    pub participant: String,
    /// Time for a reply, from the command's publication.
    pub step_timeout: Duration,
    /// Longest time one question to the other service may take.
    pub ask_timeout: Duration,
    /// First pause after a question nobody answered; doubles up to five minutes.
    pub resolve_backoff: Duration,
    /// Questions nobody answered before the saga is stuck.
    pub resolve_attempts: u32,
    /// How far Kafka's clock and the database's may be apart. Replies that do not name a saga by an id of ours
    /// are held to their age.
    pub reply_clock_tolerance: Duration,
}

/// A saga to be started.
#[derive(Debug, Clone)]
pub struct NewSaga {
    /// Its id, chosen before the transaction, so that a lost COMMIT can be looked up.
    pub saga_id: Uuid,
    /// What it is about; the key of its messages.
    pub subject: String,
    /// The flow's data.
    pub data: Value,
    /// Correlation id of the request. Used for the messages if no saga ever used it; else they get
    /// a new one and the log links the two.
    pub correlation_id: String,
    /// A client chose that id: something older may carry it.
    pub correlation_given: bool,
    /// W3C trace context of the request.
    pub traceparent: Option<String>,
}

/// Starts sagas and takes events in. Cheap to clone.
pub struct Orchestrator<F> {
    pub(crate) inner: Arc<Inner<F>>,
}

pub(crate) struct Inner<F> {
    pub settings: SagaSettings,
    pub definitions: &'static [&'static Definition],
    pub flows: F,
    pub wake: Wake,
}

impl<F> Clone for Orchestrator<F> {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone() }
    }
}

/// What an event came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Handled {
    /// The saga moved there.
    Moved(Status),
    /// No effect.
    Ignored(Ignored),
    /// It waits for the question under way.
    Deferred,
}

/// Why an event could not be taken in.
#[derive(Debug, thiserror::Error)]
pub enum SagaError {
    /// The database failed; the same event may be tried again.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// A command could not be appended.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The row was changed by somebody who did not hold its lock.
    #[error("saga {0} changed underneath; try again")]
    Changed(Uuid),
    /// A saga is stored of a kind this program does not know: it was written by a newer one.
    #[error("saga {saga_id} is of an unknown kind {name:?} or at an unknown step; deploy the version that knows it")]
    UnknownDefinition {
        /// Which.
        saga_id: Uuid,
        /// Its kind.
        name: String,
    },
}

impl WorkError for SagaError {
    fn database_error(&self) -> Option<&sqlx::Error> {
        match self {
            SagaError::Database(error) | SagaError::Append(AppendError::Database(error)) => Some(error),
            _ => None,
        }
    }
}

impl SagaError {
    /// The database answered, and refused the values: the same message would be refused again.
    pub(crate) fn is_the_messages_fault(&self) -> bool {
        let code = self.database_error().and_then(|error| error.as_database_error()?.code());
        // Data exceptions, values that break a constraint, values too long for an index.
        code.is_some_and(|code| code.starts_with("22") || code.starts_with("23") || code == "54000")
    }
}

impl<F: Flows> Orchestrator<F> {
    /// For these kinds of sagas.
    pub fn new(settings: SagaSettings, definitions: &'static [&'static Definition], flows: F, wake: Wake) -> Self {
        Self { inner: Arc::new(Inner { settings, definitions, flows, wake }) }
    }

    /// Starts a saga in the caller's transaction: its row, its first log line and its first command.
    /// Answers with the correlation id its messages carry.
    ///
    /// Call it late: the outbox holds the subject's row lock from here to the commit. A `saga_id`
    /// that exists already is a unique violation of `saga_state_pkey`.
    pub async fn start(
        &self,
        conn: &mut PgConnection,
        definition: &Definition,
        new: NewSaga,
    ) -> Result<String, SagaError> {
        let first = &definition.steps[0];
        let context = json!({ "traceparent": new.traceparent });
        let mut row = NewRow {
            saga_id: new.saga_id,
            name: definition.name,
            definition_version: definition.version,
            step: first.name,
            subject: &new.subject,
            data: &new.data,
            context: &context,
            correlation_id: &new.correlation_id,
            correlation_made: !new.correlation_given,
        };
        let fresh = Uuid::now_v7().to_string();
        if !store::insert(conn, &row).await? {
            (row.correlation_id, row.correlation_made) = (&fresh, true);
            if !store::insert(conn, &row).await? {
                return Err(SagaError::Changed(new.saga_id));
            }
        }
        let correlation_id = row.correlation_id.to_owned();
        let linked = (correlation_id != new.correlation_id).then_some(&new.correlation_id);
        let line = LogLine {
            saga_id: new.saga_id,
            revision: 0,
            event: "started",
            from: None,
            to: Status::Running,
            actor: "service",
            detail: json!({ "command": first.command.topic, "requestCorrelationId": linked }),
        };
        store::log(conn, line).await?;
        let outgoing = Outgoing {
            saga_id: new.saga_id,
            subject: &new.subject,
            data: &new.data,
            context: &context,
            correlation_id: &correlation_id,
            causation_id: None,
        };
        let (command_id, row_id) = self.send(conn, &outgoing, first.name, "do", &first.command).await?;
        store::set_command(conn, new.saga_id, command_id, row_id).await?;
        Ok(correlation_id)
    }

    /// Takes one event in, in the caller's transaction. The saga's row is locked from here on.
    /// `None` when there is no such saga.
    pub(crate) async fn take_in(
        &self,
        conn: &mut PgConnection,
        saga_id: Uuid,
        event: &Event,
        source: EventSource<'_>,
    ) -> Result<Option<Handled>, SagaError> {
        let Some(saga) = store::lock(conn, saga_id).await? else { return Ok(None) };
        let definition = self.definition(&saga)?;
        let position = position(definition, &saga)?;
        match decide(definition, position, event) {
            Decision::Defer => Ok(Some(Handled::Deferred)),
            Decision::Ignore(why) if source.repeated => Ok(Some(Handled::Ignored(why))),
            Decision::Ignore(why) => {
                store::count_event(conn, &saga).await?;
                store::log(
                    conn,
                    source.line(&saga, saga.status, event, json!({ "effect": "none", "why": format!("{why:?}") })),
                )
                .await?;
                Ok(Some(Handled::Ignored(why)))
            }
            Decision::Move(transition) => {
                let to = self.carry_out(conn, definition, &saga, transition, event, source).await?;
                Ok(Some(Handled::Moved(to)))
            }
        }
    }

    async fn carry_out(
        &self,
        conn: &mut PgConnection,
        definition: &Definition,
        saga: &Saga,
        mut transition: Transition,
        event: &Event,
        source: EventSource<'_>,
    ) -> Result<Status, SagaError> {
        for effect in transition.effects.clone() {
            let outcome = match effect {
                Effect::CompleteLocally => self.inner.flows.complete(conn, saga).await?,
                Effect::CompensateLocally => self.inner.flows.compensate(conn, saga).await?,
                Effect::Command(step) => {
                    let step = &definition.steps[step];
                    let sent = self.send(conn, &Outgoing::of(saga), step.name, "do", &step.command).await?;
                    store::set_command(conn, saga.saga_id, sent.0, sent.1).await?;
                    LocalOutcome::Applied
                }
                Effect::Undo(step) => {
                    let step = &definition.steps[step];
                    if let Undo::Command { command, .. } = &step.undo {
                        let undoes = Some(message_id(saga.saga_id, step.name, "do"));
                        let outgoing = Outgoing { causation_id: undoes, ..Outgoing::of(saga) };
                        self.send(conn, &outgoing, step.name, "undo", command).await?;
                    }
                    LocalOutcome::Applied
                }
            };
            // The local part comes first in every move that has one, so nothing was sent yet.
            if let LocalOutcome::Impossible(reason) = outcome {
                transition = Transition {
                    to: Status::Stuck,
                    effects: vec![],
                    evidence: None,
                    stuck_reason: Some(reason),
                    ..transition
                };
                break;
            }
        }
        let step = definition.steps[transition.step].name;
        let refused_undos = transition.refused_undos.names(definition);
        if !store::advance(conn, saga, &transition, step, &refused_undos, source.published_at, self.patience()).await? {
            return Err(SagaError::Changed(saga.saga_id));
        }
        let detail = json!({
            "evidence": transition.evidence,
            "stuckReason": transition.stuck_reason,
            "sent": transition.effects.iter().filter_map(|effect| sent_topic(definition, *effect)).collect::<Vec<_>>(),
        });
        store::log(conn, source.line(saga, transition.to, event, detail)).await?;
        if transition.to == Status::Stuck {
            tracing::error!(
                saga.id = %saga.saga_id, saga.name = saga.name, subject = saga.subject,
                reason = transition.stuck_reason, "saga is stuck: an operator is needed"
            );
        }
        metrics::counter!("saga_transitions_total", "saga" => definition.name, "to" => transition.to.as_str())
            .increment(1);
        Ok(transition.to)
    }

    /// Appends a command.
    async fn send(
        &self,
        conn: &mut PgConnection,
        of: &Outgoing<'_>,
        step: &str,
        direction: &str,
        command: &Command,
    ) -> Result<(Uuid, i64), SagaError> {
        let id = message_id(of.saga_id, step, direction);
        let mut payload = (command.payload)(of.data);
        payload["sagaId"] = json!(of.saga_id);
        payload["correlationId"] = json!(of.correlation_id);
        payload["occurredAt"] = json!(Utc::now().to_rfc3339_opts(chrono::SecondsFormat::Millis, true));
        let settings = &self.inner.settings;
        let mut headers = BTreeMap::from([
            ("correlationId".to_owned(), of.correlation_id.to_owned()),
            ("sender".to_owned(), settings.source.clone()),
            ("saga-id".to_owned(), of.saga_id.to_string()),
            // What brought this about: the command it undoes or follows, else the saga itself.
            ("causation-id".to_owned(), of.causation_id.unwrap_or(of.saga_id).to_string()),
        ]);
        if let Some(traceparent) = of.context.get("traceparent").and_then(Value::as_str) {
            headers.insert("traceparent".to_owned(), traceparent.to_owned());
        }
        let message = NewMessage {
            id,
            topic: format!("{}{}", settings.topic_prefix, command.topic),
            key: of.subject.to_owned(),
            source: settings.source.clone(),
            payload: payload.to_string().into_bytes(),
            content_type: "application/json",
            headers,
            saga_id: Some(of.saga_id),
        };
        Ok((id, append(conn, &message).await?.row_id))
    }

    pub(crate) fn definition(&self, saga: &Saga) -> Result<&'static Definition, SagaError> {
        let known = self.inner.definitions.iter().find(|definition| definition.name == saga.name);
        known.copied().ok_or_else(|| unknown(saga))
    }

    pub(crate) fn patience(&self) -> Patience {
        let settings = &self.inner.settings;
        Patience {
            step: settings.step_timeout,
            // Whoever asks has died only when it is long past the time it gives itself.
            asking: settings.ask_timeout * 2 + Duration::from_secs(5),
            back_off: settings.resolve_backoff,
        }
    }

    /// Runs `step` in a transaction, and wakes the relay once it has committed, also when the caller has gone.
    pub(crate) async fn committed<T: Send + 'static>(
        &self,
        db: &Database,
        step: impl for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, SagaError> + Send + 'static,
    ) -> Result<T, SagaError> {
        let value = db.transaction(step).await?;
        self.inner.wake.notify();
        Ok(value)
    }
}

struct Outgoing<'a> {
    saga_id: Uuid,
    subject: &'a str,
    data: &'a Value,
    context: &'a Value,
    correlation_id: &'a str,
    causation_id: Option<Uuid>,
}

impl<'a> Outgoing<'a> {
    fn of(saga: &'a Saga) -> Self {
        Self {
            saga_id: saga.saga_id,
            subject: &saga.subject,
            data: &saga.data,
            context: &saga.context,
            correlation_id: &saga.correlation_id,
            causation_id: saga.command_id,
        }
    }
}

/// A command's id depends on the saga, the step and the direction alone: written twice, it is the same
/// message.
pub(crate) fn message_id(saga_id: Uuid, step: &str, direction: &str) -> Uuid {
    Uuid::new_v5(&saga_id, format!("{step}/{direction}").as_bytes())
}

fn position(definition: &Definition, saga: &Saga) -> Result<Position, SagaError> {
    let step = definition.step_index(&saga.step).ok_or_else(|| unknown(saga))?;
    let refused_undos = saga.refused_undos.iter().filter_map(|name| definition.step_index(name));
    let refused_undos = refused_undos.fold(StepSet::default(), StepSet::with);
    Ok(Position { status: saga.status, step, undone: saga.undone, refused_undos })
}

fn unknown(saga: &Saga) -> SagaError {
    SagaError::UnknownDefinition { saga_id: saga.saga_id, name: saga.name.clone() }
}

fn sent_topic(definition: &Definition, effect: Effect) -> Option<&'static str> {
    match effect {
        Effect::Command(step) => Some(definition.steps[step].command.topic),
        Effect::Undo(step) => match &definition.steps[step].undo {
            Undo::Command { command, .. } => Some(command.topic),
            Undo::Nothing { .. } => None,
        },
        Effect::CompleteLocally | Effect::CompensateLocally => None,
    }
}

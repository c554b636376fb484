//! One saga on its way through a case.

use outbox_relay::inbox::Outcome;
use serde_json::{Value, json};
use sqlx::Connection;
use tokio::sync::oneshot;
use uuid::Uuid;

use super::{Flaw, Subject, Verdict, difference::difference, ensure, remote::Remote, stage::Stage};
use crate::{
    definition::Definition,
    machine::Settlement,
    orchestrator::Flows,
    reply::Received,
    state::{Saga, Status},
    store,
};

mod rest;
mod silence;
mod words;

pub(super) use words::{Naming, REFUSAL, Say};

/// See the module's words.
pub(super) struct Play<'p, F, S> {
    stage: &'p mut Stage<F, S>,
    saga_id: Uuid,
    correlation_id: String,
    /// What this side owned before.
    before: Value,
    pub remote: Remote,
    /// Everything that is said is said again in every way.
    pub repeats: bool,
    pub naming: Naming,
    /// Somebody was asked and knew nothing: stuck is right without a refused undo too.
    may_be_stuck: bool,
    /// Questions of askers that died; an answer must not reach them.
    unanswered: Vec<oneshot::Sender<Settlement>>,
}

impl<'p, F: Flows, S: Subject> Play<'p, F, S> {
    pub(super) async fn begin(stage: &'p mut Stage<F, S>) -> Verdict<Self> {
        let mut conn = stage.pool.acquire().await?;
        let before = stage.subject.local(&mut conn).await?;
        let mut tx = conn.begin().await?;
        let new = stage.subject.begin(&mut tx).await?;
        let saga_id = new.saga_id;
        let correlation_id = stage.sagas.start(&mut tx, stage.definition, new).await?;
        tx.commit().await?;
        let saga = store::find(&mut conn, saga_id).await?.ok_or_else(|| "the saga is not there".to_owned())?;
        // Else a slate would always look clean.
        let after = stage.subject.local(&mut conn).await?;
        ensure(after != before, || "`local` does not show what `begin` has changed".to_owned())?;
        let complete = stage.subject.is_complete(&mut conn, &saga).await?;
        ensure(!complete, || "`is_complete` says so of a saga that has only begun".to_owned())?;
        let remote = Remote::of(stage.definition, &saga);
        Ok(Self {
            stage,
            saga_id,
            correlation_id,
            before,
            remote,
            repeats: false,
            naming: Naming::Header,
            may_be_stuck: false,
            unanswered: vec![],
        })
    }

    /// The relay: everything that is committed reaches the other services.
    pub(super) async fn deliver(&mut self) -> Verdict {
        let mut conn = self.stage.pool.acquire().await?;
        for message in self.stage.courier.take_out(&mut conn).await? {
            if self.remote.concerns(&message) {
                self.remote.accept(&message)?;
            }
        }
        Ok(())
    }

    /// The other services say something, and perhaps say it again.
    pub(super) async fn say(&mut self, what: Say) -> Verdict {
        self.deliver().await?;
        let message = self.message(what);
        self.receive(&message).await?;
        self.note(what);
        self.deliver().await?;
        self.check_stuck().await?;
        if self.repeats { self.repeat(what, message).await } else { Ok(()) }
    }

    /// The other services say something, and the relay has not been there since.
    pub(super) async fn say_undelivered(&mut self, what: Say) -> Verdict {
        let message = self.message(what);
        self.receive(&message).await.map(drop)
    }

    pub(super) fn definition(&self) -> &'static Definition {
        self.stage.definition
    }

    /// The database fails once while this is taken in.
    pub(super) async fn say_in_a_storm(&mut self, what: Say) -> Verdict {
        self.deliver().await?;
        let (message, before) = (self.message(what), self.picture().await?);
        self.stage.script.fail_next();
        let failed = self.stage.sagas.receive(&self.stage.db, &message).await.is_err();
        ensure(failed && !self.stage.script.take_failure(), || {
            format!("{} should have reached the flow's local part", self.name(what))
        })?;
        let count = self.remote.count();
        self.deliver().await?;
        let after = self.picture().await?;
        ensure(after == before && self.remote.count() == count, || {
            format!("a transaction that failed left something behind: {}", difference(&before, &after))
        })?;
        let outcome = self.receive(&message).await?;
        ensure(outcome == Outcome::Applied, || {
            format!("{} came again after a failure, and is {}", self.name(what), outcome.as_str())
        })?;
        self.note(what);
        self.check_stuck().await
    }

    async fn repeat(&mut self, what: Say, message: Received) -> Verdict {
        let mut elsewhere = Received { offset: self.next_offset(), ..message.clone() };
        elsewhere.bytes.headers.retain(|(name, _)| name != "ce_id");
        let copies =
            [("a copy", message), ("a copy without an id", elsewhere), ("the same said anew", self.message(what))];
        let count = self.remote.count();
        let before = self.picture().await?;
        for (kind, copy) in copies {
            self.receive(&copy).await?;
            self.deliver().await?;
            let after = self.picture().await?;
            ensure(after == before, || {
                format!("{kind} of {} changed {}", self.name(what), difference(&before, &after))
            })?;
            ensure(self.remote.count() == count, || format!("{kind} of {} had a command sent", self.name(what)))?;
        }
        Ok(())
    }

    /// As the consumer does it: a panic is the message's, not ours.
    async fn receive(&mut self, message: &Received) -> Verdict<Outcome> {
        self.stage.messages += 1;
        let (sagas, db, message) = (self.stage.sagas.clone(), self.stage.db.clone(), message.clone());
        let topic = message.topic.clone();
        let attempt = tokio::spawn(async move { sagas.receive(&db, &message).await }).await;
        let taken_in = attempt.map_err(|panic| format!("a reply on {topic:?} made the flow panic: {panic}"))?;
        Ok(taken_in.map_err(|error| format!("a reply on {topic:?} can't be taken in: {error}"))?)
    }

    /// Leads the saga to a step and has its command delivered.
    pub(super) async fn up_to(&mut self, step: usize) -> Verdict {
        for earlier in 0..step {
            self.say(Say::Done(earlier)).await?;
        }
        self.deliver().await?;
        let saga = self.expect(Status::Running).await?;
        ensure(saga.step == self.stage.definition.steps[step].name && self.remote.has_command(step), || {
            format!("the saga should be at step {}, and is at {}", self.stage.definition.steps[step].name, saga.step)
        })
    }

    /// The saga, which must stand there.
    pub(super) async fn expect(&mut self, status: Status) -> Verdict<Saga> {
        let saga = self.saga().await?;
        ensure(saga.status == status, || {
            let reason = saga.stuck_reason.as_deref().map(|why| format!(" ({why:?})")).unwrap_or_default();
            format!("the saga should be {status}, and is {} at step {}{reason}", saga.status, saga.step)
        })?;
        Ok(saga)
    }

    fn note(&mut self, what: Say) {
        match what {
            Say::Undone(step) => self.remote.undo_answered(step, false),
            Say::UndoRefused(step) => self.remote.undo_answered(step, true),
            Say::Done(_) | Say::Refused(_) => {}
        }
    }

    pub(super) async fn saga(&mut self) -> Verdict<Saga> {
        let saga = store::find(&mut *self.stage.pool.acquire().await?, self.saga_id).await?;
        saga.ok_or_else(|| Flaw("the saga is gone".to_owned()))
    }

    /// What must not change by what has no effect: where the saga stands, and what is here.
    pub(super) async fn picture(&mut self) -> Verdict<Value> {
        let mut saga = json!(self.saga().await?);
        // An event without effect counts in these.
        saga["revision"] = Value::Null;
        saga["updatedAt"] = Value::Null;
        let local = self.stage.subject.local(&mut *self.stage.pool.acquire().await?).await?;
        Ok(json!({ "saga": saga, "here": local }))
    }
}

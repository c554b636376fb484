//! What must hold whenever something was said, and when the saga has come to rest.

use outbox_relay::inbox;
use sqlx::Connection;

use super::{Play, Say};
use crate::{
    admin,
    orchestrator::{Flows, LocalOutcome},
    replies::CONSUMER,
    state::{Saga, Status},
    suite::{Subject, Verdict, difference::difference, ensure},
};

impl<F: Flows, S: Subject> Play<'_, F, S> {
    /// Lets the saga come to rest, the other services answering as good ones do, and looks at what is
    /// left.
    pub(in crate::suite) async fn rest(mut self) -> Verdict {
        self.wind_up().await?;
        self.check_log().await?;
        let saga = self.saga().await?;
        let mut conn = self.stage.pool.acquire().await?;
        let local = self.stage.subject.local(&mut conn).await?;
        let complete = self.stage.subject.is_complete(&mut conn, &saga).await?;
        match saga.status {
            Status::Completed => {
                ensure(complete, || "it is completed, and `is_complete` says that it is not".to_owned())?;
            }
            Status::Compensated => {
                ensure(local == self.before, || {
                    format!("it is taken back, and here is not what was before: {}", difference(&self.before, &local))
                })?;
                ensure(!complete, || "`is_complete` says so of a saga that was taken back".to_owned())?;
            }
            Status::Running | Status::Resolving | Status::Stuck => {
                let why = saga.stuck_reason.map(|why| format!(" ({why:?})")).unwrap_or_default();
                return Err(format!("it does not come to rest: it is {}{why}", saga.status).into());
            }
        }
        let waiting = inbox::deferred(&mut conn, CONSUMER, self.saga_id).await?;
        ensure(waiting.is_empty(), || format!("{} replies still wait for the outcome", waiting.len()))?;
        self.remote.check_end(saga.status)?;
        drop(conn);
        self.repeat_local_part(&saga).await
    }

    async fn wind_up(&mut self) -> Verdict {
        for step in 0..self.stage.definition.steps.len() {
            let saga = self.saga().await?;
            if saga.status == Status::Running && saga.step == self.stage.definition.steps[step].name {
                self.say(Say::Done(step)).await?;
            }
        }
        self.deliver().await?;
        for step in self.remote.owing() {
            self.say(Say::Undone(step)).await?;
        }
        Ok(())
    }

    /// Every event has its place in the log, and each begins where the one before it ended.
    async fn check_log(&mut self) -> Verdict {
        let saga = self.saga().await?;
        let log = admin::timeline(&mut *self.stage.pool.acquire().await?, self.saga_id).await?;
        let revisions: Vec<i64> = log.iter().map(|entry| entry.revision).collect();
        ensure(revisions.iter().copied().eq(0..=saga.revision), || {
            format!("the saga is at revision {}, its log has {revisions:?}", saga.revision)
        })?;
        let chained = log.windows(2).all(|pair| pair[1].from_status.as_ref() == Some(&pair[0].to_status));
        ensure(chained && log.last().is_some_and(|last| last.to_status == saga.status.as_str()), || {
            let path: Vec<&str> = log.iter().map(|entry| entry.to_status.as_str()).collect();
            format!("the log does not lead to where the saga is, {}: {}", saga.status, path.join(", "))
        })
    }

    /// Done before, a local part has nothing left to do, whatever it answers.
    async fn repeat_local_part(&mut self, saga: &Saga) -> Verdict {
        let mut conn = self.stage.pool.acquire().await?;
        let mut tx = conn.begin().await?;
        let before = self.stage.subject.local(&mut tx).await?;
        let (part, _): (_, LocalOutcome) = match saga.status {
            Status::Completed => ("complete", self.stage.flows.complete(&mut tx, saga).await?),
            _ => ("compensate", self.stage.flows.compensate(&mut tx, saga).await?),
        };
        let after = self.stage.subject.local(&mut tx).await?;
        tx.rollback().await?;
        ensure(after == before, || format!("`{part}`, called twice, changed {}", difference(&before, &after)))
    }

    /// Stuck is for a refused undo, and for as long as it is refused.
    pub(super) async fn check_stuck(&mut self) -> Verdict {
        let saga = self.saga().await?;
        let name = |step: &usize| self.stage.definition.steps[*step].name;
        let refusing: Vec<&str> = self.remote.refusing().iter().map(name).collect();
        match &saga.stuck_reason {
            None => ensure(refusing.is_empty(), || {
                format!("the undo of {} is refused, and the saga is {}", refusing.join(" and "), saga.status)
            }),
            Some(why) if refusing.is_empty() => ensure(self.may_be_stuck && !saga.undone, || {
                format!("the saga is stuck ({why:?}), and no undo is refused any more")
            }),
            Some(why) => ensure(refusing.iter().all(|step| why.contains(step)), || {
                format!("the undo of {} is refused, and the saga is stuck because of {why:?}", refusing.join(" and "))
            }),
        }
    }
}

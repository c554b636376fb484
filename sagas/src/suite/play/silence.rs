//! Time passes, and somebody asks.

use tokio::{sync::oneshot, task::JoinHandle};

use super::Play;
use crate::{
    deadlines::SweepCursor,
    machine::{Recourse, Settlement},
    orchestrator::{Flows, SagaError},
    state::Status,
    store,
    suite::{Subject, Verdict, ensure},
};

/// Somebody who asks about silence, and waits for the answer.
pub(in crate::suite) struct Asker {
    answer: oneshot::Sender<Settlement>,
    sweep: JoinHandle<Result<usize, SagaError>>,
}

impl<F: Flows, S: Subject> Play<'_, F, S> {
    /// An hour passes, and somebody looks for silence.
    pub(in crate::suite) async fn sweep(&mut self, recourse: Recourse) -> Verdict {
        self.stage.script.set_recourse(recourse);
        self.may_be_stuck |= recourse == Recourse::NeedsOperator;
        self.age().await?;
        let asking = self.start_sweep();
        let asked = self.question(asking).await?;
        self.stage.script.set_recourse(Recourse::Ask);
        ensure(asked.is_none(), || "it was asked about silence where there is none".to_owned())
    }

    /// An hour passes without a reply: the other service is asked.
    pub(in crate::suite) async fn silence(&mut self) -> Verdict<Asker> {
        self.deliver().await?;
        self.age().await?;
        let sweep = self.start_sweep();
        let saga = self.saga().await?;
        let Some((step, asker)) = self.question(sweep).await? else {
            return Err(format!("nobody was asked about silence, the saga was {} before", saga.status).into());
        };
        ensure(step == saga.step, || format!("the saga is at step {}, and step {step} was asked about", saga.step))?;
        self.expect(Status::Resolving).await?;
        Ok(asker)
    }

    /// The other service's answer.
    pub(in crate::suite) async fn answer(&mut self, asker: Asker, answer: Settlement) -> Verdict {
        self.may_be_stuck |= matches!(answer, Settlement::Ambiguous(_) | Settlement::NoAnswer(_));
        let _ = asker.answer.send(answer);
        let again = self.question(asker.sweep).await?;
        ensure(again.is_none(), || "it was asked twice about one silence".to_owned())?;
        self.deliver().await
    }

    /// Whoever asked dies; the answer never comes.
    pub(in crate::suite) async fn dies(&mut self, asker: Asker) {
        self.unanswered.push(asker.answer);
        asker.sweep.abort();
        let _ = asker.sweep.await;
    }

    fn start_sweep(&self) -> JoinHandle<Result<usize, SagaError>> {
        let (sagas, db) = (self.stage.sagas.clone(), self.stage.db.clone());
        tokio::spawn(async move { sagas.sweep(&db, &mut SweepCursor::default()).await })
    }

    /// The question the sweep asks about this saga, if it asks one. Sagas of cases that failed may be
    /// asked about too.
    async fn question(&mut self, mut sweep: JoinHandle<Result<usize, SagaError>>) -> Verdict<Option<(String, Asker)>> {
        loop {
            tokio::select! {
                biased;
                Some(question) = self.stage.questions.recv() => {
                    if question.saga_id == self.saga_id {
                        return Ok(Some((question.step, Asker { answer: question.answer, sweep })));
                    }
                }
                swept = &mut sweep => {
                    swept.map_err(|panic| panic.to_string())??;
                    return Ok(None);
                }
            }
        }
    }

    async fn age(&mut self) -> Verdict {
        Ok(store::age(&mut *self.stage.pool.acquire().await?, self.saga_id).await?)
    }
}

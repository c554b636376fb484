//! The author's flows under the suite's control: questions to other services are answered by the
//! suite, and the database fails when the suite says so.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use sqlx::PgConnection;
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::{
    machine::{Recourse, Settlement},
    orchestrator::{Flows, LocalOutcome},
    state::Saga,
};

/// The author's flows, rehearsed.
pub(super) struct Rehearsal<F> {
    pub flows: Arc<F>,
    pub script: Arc<Script>,
}

/// What the suite decides.
pub(super) struct Script {
    recourse: Mutex<Recourse>,
    fails_next: AtomicBool,
    questions: mpsc::UnboundedSender<Question>,
}

/// A question about silence, on its way to the suite.
pub(super) struct Question {
    pub saga_id: Uuid,
    pub step: String,
    pub answer: oneshot::Sender<Settlement>,
}

impl Script {
    pub(super) fn new(questions: mpsc::UnboundedSender<Question>) -> Self {
        Self { recourse: Mutex::new(Recourse::Ask), fails_next: AtomicBool::new(false), questions }
    }

    pub(super) fn set_recourse(&self, recourse: Recourse) {
        *self.recourse.lock().unwrap_or_else(PoisonError::into_inner) = recourse;
    }

    /// The database fails right after the next local part.
    pub(super) fn fail_next(&self) {
        self.fails_next.store(true, Ordering::Relaxed);
    }

    /// Whether the failure is still to come.
    pub(super) fn take_failure(&self) -> bool {
        self.fails_next.swap(false, Ordering::Relaxed)
    }

    fn then(&self, outcome: LocalOutcome) -> Result<LocalOutcome, sqlx::Error> {
        match self.take_failure() {
            true => Err(sqlx::Error::Io(std::io::ErrorKind::ConnectionReset.into())),
            false => Ok(outcome),
        }
    }
}

impl<F: Flows> Flows for Rehearsal<F> {
    async fn complete(&self, conn: &mut PgConnection, saga: &Saga) -> Result<LocalOutcome, sqlx::Error> {
        let outcome = self.flows.complete(conn, saga).await?;
        self.script.then(outcome)
    }

    async fn compensate(&self, conn: &mut PgConnection, saga: &Saga) -> Result<LocalOutcome, sqlx::Error> {
        let outcome = self.flows.compensate(conn, saga).await?;
        self.script.then(outcome)
    }

    fn recourse(&self) -> Recourse {
        *self.script.recourse.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn ask(&self, saga: &Saga) -> Settlement {
        let (answer, answered) = oneshot::channel();
        let question = Question { saga_id: saga.saga_id, step: saga.step.clone(), answer };
        let nobody = || Settlement::NoAnswer("the suite has gone on without answering".to_owned());
        if self.script.questions.send(question).is_err() {
            return nobody();
        }
        answered.await.unwrap_or_else(|_| nobody())
    }
}

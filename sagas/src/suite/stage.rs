//! What all cases share: the orchestrator, the relay, the list of what went wrong.

use std::{sync::Arc, time::Duration};

use outbox_relay::{Database, PoolSettings, Wake, test_kit::Courier};
use sqlx::PgPool;
use tokio::sync::mpsc;

use super::{
    ENOUGH, Failure, Flaw, Proof, Subject, Verdict,
    play::Play,
    rehearsal::{Question, Rehearsal, Script},
};
use crate::{
    admin,
    definition::Definition,
    machine::Recourse,
    orchestrator::{Flows, Orchestrator, SagaSettings},
};

/// Under this name the suite signs replies on topics of the original fleet.
pub(super) const PARTICIPANT: &str = "suite";
/// Vain questions before a saga is stuck.
pub(super) const QUESTIONS: u32 = 2;

/// Two orchestrators at once, and the askers that have died.
const ORCHESTRATORS: PoolSettings = PoolSettings {
    connections: 10,
    acquire_timeout: Duration::from_secs(30),
    work_timeout: Duration::from_secs(60),
    session: &[],
};

/// See the module's words.
pub(super) struct Stage<F, S> {
    /// The suite's own connections.
    pub pool: PgPool,
    /// The orchestrator's.
    pub db: Database,
    pub definition: &'static Definition,
    pub subject: S,
    pub flows: Arc<F>,
    pub sagas: Orchestrator<Rehearsal<F>>,
    pub script: Arc<Script>,
    pub questions: mpsc::UnboundedReceiver<Question>,
    pub courier: Courier,
    pub messages: usize,
    cases: usize,
    failures: Vec<Failure>,
}

impl<F: Flows, S: Subject> Stage<F, S> {
    pub(super) async fn set(pool: &PgPool, definition: &'static Definition, flows: F, subject: S) -> Verdict<Self> {
        let (asked, questions) = mpsc::unbounded_channel();
        let (flows, script) = (Arc::new(flows), Arc::new(Script::new(asked)));
        let settings = SagaSettings {
            source: "suite".to_owned(),
            topic_prefix: String::new(),
            participant: PARTICIPANT.to_owned(),
            // Time passes when the suite says so: see `Play::silence`.
            step_timeout: Duration::ZERO,
            ask_timeout: Duration::from_secs(600),
            resolve_backoff: Duration::ZERO,
            reply_clock_tolerance: Duration::from_secs(60),
            resolve_attempts: QUESTIONS,
        };
        // The orchestrator's kinds live as long as the program; here that is one word a test.
        let definitions: &'static [&'static Definition] = Box::leak(Box::new([definition]));
        let rehearsal = Rehearsal { flows: flows.clone(), script: script.clone() };
        let courier = Courier::hire(&mut *pool.acquire().await?).await?;
        Ok(Self {
            pool: pool.clone(),
            db: Database::new(pool.connect_options().as_ref().clone(), ORCHESTRATORS),
            definition,
            subject,
            flows,
            sagas: Orchestrator::new(settings, definitions, rehearsal, Wake::default()),
            script,
            questions,
            courier,
            messages: 0,
            cases: 0,
            failures: vec![],
        })
    }

    /// Plays one case through on a saga of its own, up to its rest.
    pub(super) async fn play(
        &mut self,
        step: Option<usize>,
        case: impl Into<String>,
        act: impl AsyncFnOnce(&mut Play<'_, F, S>) -> Verdict,
    ) {
        if self.failures.len() >= ENOUGH {
            return;
        }
        self.cases += 1;
        self.script.set_recourse(Recourse::Ask);
        self.script.take_failure();
        let verdict = async {
            let mut play = Play::begin(self).await?;
            act(&mut play).await?;
            play.rest().await
        };
        if let Err(Flaw(what)) = verdict.await {
            let step = step.map(|step| self.definition.steps[step].name);
            self.failures.push(Failure { flow: self.definition.name, step, case: case.into(), what });
        }
    }

    pub(super) async fn close(mut self) -> Result<Proof, Vec<Failure>> {
        if let Err(Flaw(what)) = self.leave().await {
            self.failures.push(Failure {
                flow: self.definition.name,
                step: None,
                case: "after all cases".to_owned(),
                what,
            });
        }
        match self.failures.is_empty() {
            true => Ok(Proof { cases: self.cases, messages: self.messages }),
            false => Err(self.failures),
        }
    }

    /// What went wrong may well be unfinished; else nothing is.
    async fn leave(&mut self) -> Verdict {
        let mut conn = self.pool.acquire().await?;
        let open = admin::open_counts(&mut conn).await?;
        let open: Vec<_> = open.into_iter().filter(|count| count.name == self.definition.name).collect();
        self.courier.resign(&mut conn).await?;
        super::ensure(open.is_empty() || !self.failures.is_empty(), || format!("sagas are still open: {open:?}"))
    }
}

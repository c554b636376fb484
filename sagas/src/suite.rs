//! The suite every saga passes. Whoever writes a flow proves it with one line in a test:
//!
//! ```text
//! suite::prove(&pool, &DEFINITION, MyFlows::new(), MySubject).await;
//! ```
//!
//! What is proven, each point on fresh sagas, on a real PostgreSQL (`pool`: a database of its own,
//! with the schema; no relay may run on it) and without a broker:
//!
//! - The flow completes, however its replies name it. Each message coming again (a copy, a copy
//!   without an id at another place, the same said anew) changes nothing.
//! - A refusal at each step leaves a clean slate: nothing of the saga stays here, and whatever a
//!   step may have done elsewhere has its undo command behind it, the newest first.
//! - A refused undo makes it stuck, says why, and nothing else does (but silence nobody can explain);
//!   it is healed when that undo comes through, and no sooner. So it goes with several undos in
//!   every order of their replies.
//! - Silence at each step is asked about, and every answer, or none, leads to rest. A reply that
//!   comes meanwhile waits. Whoever asks may die.
//! - Contradicting and late replies in every order lead to rest, and change nothing after it.
//! - A transaction that fails in the middle leaves nothing; the same message is good afterwards.
//! - Carried out twice, the local parts change nothing more.
//!
//! The suite plays the relay (the real statements, `outbox_relay::test_kit`), the other services
//! (`remote`), the consumer and the clock. It can't know what other services really listen to: that
//! a topic has one meaning is checked, that it is spelt as they spell it is not.
//!
//! Map: `wiring` reads the definition; `cases` says what happens in which case; `play` is one saga
//! on its way through one of them; `remote` is what the other services saw; `rehearsal` puts the
//! author's [`Flows`] under the suite's control; `difference` shows what has changed.

use std::{fmt, future::Future};

use serde_json::Value;
use sqlx::{PgConnection, PgPool};

use crate::{
    definition::Definition,
    orchestrator::{Flows, NewSaga, SagaError},
    state::Saga,
};

mod cases;
mod difference;
mod play;
mod rehearsal;
mod remote;
mod stage;
mod wiring;

/// After so many failures no further case is tried: they would make nobody wiser.
const ENOUGH: usize = 10;

/// What the suite has to know of a flow beside its definition and its [`Flows`].
pub trait Subject {
    /// Makes the change on this side and says which saga belongs to it; the suite starts that saga in
    /// the same transaction. Each time about something new, with a key no message had before.
    fn begin(&self, conn: &mut PgConnection) -> impl Future<Output = Result<NewSaga, sqlx::Error>> + Send;

    /// Everything that flows of this kind own on this side, of all sagas: their rows as JSON in a
    /// fixed order, say. After a saga that was taken back it must be what it was before.
    fn local(&self, conn: &mut PgConnection) -> impl Future<Output = Result<Value, sqlx::Error>> + Send;

    /// Whether this saga's subject stands as it should once the saga has completed.
    fn is_complete(
        &self,
        conn: &mut PgConnection,
        saga: &Saga,
    ) -> impl Future<Output = Result<bool, sqlx::Error>> + Send;
}

/// What was gone through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proof {
    /// Cases, each with a saga of its own.
    pub cases: usize,
    /// Messages that were taken in, copies included.
    pub messages: usize,
}

/// A case the flow did not pass.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// The definition's name.
    pub flow: &'static str,
    /// The step it is about, if it is about one.
    pub step: Option<&'static str>,
    /// What the case does.
    pub case: String,
    /// What was wrong then.
    pub what: String,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { flow, step, case, what } = self;
        match step {
            Some(step) => write!(f, "{flow}, step {step}, {case}: {what}"),
            None => write!(f, "{flow}, {case}: {what}"),
        }
    }
}

/// Proves a flow.
///
/// # Panics
///
/// When it does not pass, with a sentence for each case.
pub async fn prove<F: Flows, S: Subject>(
    pool: &PgPool,
    definition: &'static Definition,
    flows: F,
    subject: S,
) -> Proof {
    match try_prove(pool, definition, flows, subject).await {
        Ok(proof) => proof,
        Err(failures) => {
            let told: Vec<String> = failures.iter().map(Failure::to_string).collect();
            panic!(
                "{} does not pass (after {ENOUGH} failures no more is tried):\n{}",
                definition.name,
                told.join("\n")
            );
        }
    }
}

/// Proves a flow, or says what it did not pass: the first ten cases of it.
pub async fn try_prove<F: Flows, S: Subject>(
    pool: &PgPool,
    definition: &'static Definition,
    flows: F,
    subject: S,
) -> Result<Proof, Vec<Failure>> {
    let miswired = wiring::flaws(definition);
    if !miswired.is_empty() {
        return Err(miswired);
    }
    let before = |flaw: Flaw| {
        vec![Failure { flow: definition.name, step: None, case: "before any case".to_owned(), what: flaw.0 }]
    };
    let mut stage = stage::Stage::set(pool, definition, flows, subject).await.map_err(before)?;
    cases::all(&mut stage).await;
    stage.close().await
}

/// What is wrong, in words.
#[derive(Debug)]
struct Flaw(String);

type Verdict<T = ()> = Result<T, Flaw>;

/// A flaw unless `holds`.
fn ensure(holds: bool, what: impl FnOnce() -> String) -> Verdict {
    if holds { Ok(()) } else { Err(Flaw(what())) }
}

impl From<String> for Flaw {
    fn from(what: String) -> Self {
        Self(what)
    }
}

impl From<sqlx::Error> for Flaw {
    fn from(error: sqlx::Error) -> Self {
        Self(format!("the database: {error}"))
    }
}

impl From<SagaError> for Flaw {
    fn from(error: SagaError) -> Self {
        Self(error.to_string())
    }
}

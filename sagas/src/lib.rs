//! Sagas over a transactional outbox.
//!
//! # Guarantees
//!
//! - A saga starts in the transaction of the change it belongs to, with its first command; neither
//!   exists without the other.
//! - A reply takes effect at most once, and only on the saga it answers. One message is one
//!   transaction: inbox, saga, log and effects commit together or not at all.
//! - A saga comes to rest `completed`, `compensated` or `stuck`. Stuck says why, and always means
//!   that a person is needed.
//! - Silence closes nothing by itself: after the deadline, which runs from the command's publication,
//!   the other service is asked. Only where nobody can be asked does a configured policy decide.
//! - A compensation takes back what was done here and, in the same transaction, sends the undo
//!   command behind the command on the same key: a step that is carried out late is undone.
//! - An undo that is refused, or can't be sent, makes its saga stuck until that very undo comes through.
//! - Every message that was taken from Kafka is in the inbox; what had no effect is kept with its
//!   bytes and the reason, once however often it comes, and never stops its partition. A message's id is
//!   burnt only by what took effect.
//!
//! # What it does not do
//!
//! No graph of steps and no sub-sagas: a list reads from top to bottom. No timers beside the one
//! deadline. No exactly-once: commands and replies may come twice, and are known when they do.
//!
//! # Map
//!
//! - [`definition`]: a saga as data; [`flows`]: the sagas themselves.
//! - [`machine`]: `(state, event) → decision`, pure; [`state`]: what is stored.
//! - [`store`]: the SQL of `saga_state` and `saga_log`.
//! - [`orchestrator`]: start a saga, carry decisions out; `journal`: how events read in the log.
//! - [`reply`]: read a reply, pure; `replies`: take one in; `consumer`: from Kafka.
//! - [`deadlines`]: what is done about silence.
//! - [`retention`]: forgetting what is closed.
//! - [`admin`]: what operators see.
//! - `suite` (with the feature `suite`): what every flow has to pass, for the tests of whoever writes one.
//!
//! `tests/model` runs the machine in every order of events there is.

pub mod admin;
mod consumer;
pub mod deadlines;
pub mod definition;
pub mod flows;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
mod journal;
pub mod machine;
pub mod orchestrator;
mod replies;
pub mod reply;
pub mod retention;
pub mod state;
pub mod store;
#[cfg(feature = "suite")]
#[expect(clippy::disallowed_methods, reason = "a test looks at the database by itself")]
pub mod suite;

pub use consumer::{ConsumerSettings, ConsumerStatus, Trouble};
pub use definition::Definition;
pub use machine::{Recourse, Settlement};
pub use orchestrator::{Flows, LocalOutcome, NewSaga, Orchestrator, SagaError, SagaSettings};
pub use state::{Evidence, Saga, Status};

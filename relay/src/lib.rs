//! A transactional outbox on PostgreSQL, and the relay that empties it into Kafka.
//!
//! # Guarantees
//!
//! - A message whose transaction committed reaches Kafka at least once, whatever dies in between.
//!   Every copy has the same message id (`ce_id`). A message counts as published when the broker has named
//!   its offset; a report of success without one is no acknowledgement, and the message is sent again.
//! - First occurrences of one key stand in Kafka in the order their transactions committed, however
//!   many relays run, and also when one of them was frozen past its lease and goes on. The order is
//!   numbered (`aggregate-seq`, from 1, without a gap) and checked: message n+1 is refused while n
//!   is not out. With [`RelaySettings::fencing`] such a relay appends nothing at all any more: the
//!   broker refuses it.
//! - A message that can't be sent is parked, and everything behind it in its key with it, but for
//!   replays of what is out already. Parked rows are visible, are never dropped, and go out in order
//!   when an operator replays them. Other keys go on.
//! - A broker that is away costs no message an attempt. A missing topic stops that topic alone.
//! - A message that kills the relay is found by letting ever fewer messages fly after each death,
//!   and parked when it has killed twice while alone.
//!
//! # What it does not do
//!
//! It does not deliver exactly once: a relay that dies between the broker's acknowledgement and the
//! archive's commit leaves a message that is sent again, fenced or not. Consumers know a copy by its
//! `ce_id`. It does not order messages of different keys. It does not read payloads.
//!
//! # How it works
//!
//! [`append`] numbers a message under its key's row lock and puts it into the `outbox` table, whose
//! rows are inserted and deleted, never updated. Keys are spread over 64 lanes; a lane has one owner
//! at a time, by a lease on the database's clock, and a term that guards everything the owner
//! writes. A worker reads what is not out (the set, not a cursor: ids become visible out of order),
//! keeps **one message of a key in flight**, and moves what the broker has acknowledged to the
//! archive, with its place in Kafka.
//!
//! # Map
//!
//! - [`append`], [`publications`] (`outbox`), [`NewMessage`] (`message`), [`Wake`] (`wake`): for
//!   those who write.
//! - [`Relay`] (`relay`: processes and workers; `worker`: one step, `worker::fencing` what it does behind a
//!   fence; `window`: what may be sent now, pure; `lanes`: who owns what; `delivery`, `parking`: the SQL of it;
//!   `publisher`: Kafka; `position`: where a message stands there).
//! - `fault`, `position`, `breaker`, `holds`, `low_marks`: small pure decisions.
//! - [`Database`] (`database`): the one way to a pooled connection, for the relay and for those who write.
//! - [`archive`], [`replay()`], [`admin`], [`verify`]: for those who operate, and for those who audit.
//! - [`inbox`], [`headers`]: the receiving side.
//! - [`supervisor`]: long-running tasks that are started again when they fail.
//! - [`logging`]: log lines that stay few and short, whatever happens outside.
//! - [`session`]: the settings of database sessions, for the relay and for those who write.
//! - `model`, in tests alone: two relays, a database, a broker and a network in every order of events.
//! - [`fault_points`]: where the fault suite strikes.
//! - `test_kit` (with the feature `test-kit`): a relay without a broker.

pub mod admin;
pub mod archive;
mod breaker;
mod database;
mod delivery;
mod fault;
pub mod fault_points;
#[cfg(feature = "fuzzing")]
#[doc(hidden)]
pub mod fuzzing;
pub mod headers;
mod holds;
pub mod inbox;
mod kafka_watch;
mod lanes;
pub mod logging;
mod low_marks;
mod message;
#[cfg(test)]
mod model;
mod outbox;
mod parking;
mod position;
mod publisher;
mod relay;
mod renewal;
mod replay;
pub mod session;
pub mod supervisor;
#[cfg(feature = "test-kit")]
pub mod test_kit;
pub mod trouble;
pub mod verify;
mod wake;
mod window;
mod worker;

pub use database::{Database, PoolSettings, Work, WorkError};
pub use kafka_watch::{PublishTrouble, watch_kafka};
pub use lanes::FENCES;
pub use message::{LANES, NewMessage, lane_of};
pub use outbox::{
    AppendError, Appended, ParkedOfSaga, Publication, append, parked_of_sagas, publications, unpublished_keys,
};
pub use publisher::{KafkaSettings, PublisherError};
pub use relay::{Relay, RelaySettings};
pub use replay::{ReplayError, Replayed, replay};
pub use wake::Wake;

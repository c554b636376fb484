//! What a relay process knows, and the steps of its worker.

use std::hash::{Hash, Hasher};

use super::{
    Broken, KEYS,
    broker::{Broker, Rows},
    database::Database,
};
use crate::{message::lane_of, window::Window};

/// A relay process: its lease keeper and its one worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Relay {
    /// What the keeper was told last.
    pub(super) held: Option<Term>,
    /// What the worker goes by.
    pub(super) followed: Option<Term>,
    pub(super) memory: Memory,
    /// Acknowledged, not archived yet.
    pub(super) sent: Rows,
    /// Where the last read ended; only a broken relay begins there.
    pub(super) cursor: i64,
}

/// A lane's term, as a relay remembers it. Of old ones, only those of one relay are ever compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Term {
    Present,
    Past,
    LongPast,
}

/// The real window, comparable.
#[derive(Debug, Clone, Default)]
pub(super) struct Memory(pub(super) Window);

impl PartialEq for Memory {
    fn eq(&self, other: &Self) -> bool {
        self.0.snapshot() == other.0.snapshot()
    }
}

impl Eq for Memory {}

impl Hash for Memory {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.0.snapshot().hash(state);
    }
}

impl Relay {
    /// Another term of the lane has begun.
    pub(super) fn overtaken(&mut self) {
        if [self.held, self.followed].contains(&Some(Term::Present)) {
            let older = |term| if term == Term::Present { Term::Past } else { Term::LongPast };
            (self.held, self.followed) = (self.held.map(older), self.followed.map(older));
        }
    }

    pub(super) fn give_up_everything(&mut self) {
        self.memory.0.clear();
        self.sent = Rows::default();
    }

    /// `Worker::follow_ownership`.
    pub(super) fn look(&mut self) {
        match (self.held, self.followed) {
            (None, Some(_)) => {
                self.memory.0.evict_lane(lane_of(&KEYS[0]));
                self.sent = Rows::default();
            }
            (Some(_), Some(_)) => self.give_up_everything(),
            (_, None) => {}
        }
        self.followed = self.held;
    }

    /// `Worker::admit`.
    pub(super) fn read(&mut self, database: &Database, above: i64, broken: Option<Broken>) {
        let mut rows = database.claim(above, &self.memory.0.row_ids());
        if broken == Some(Broken::Cursor) {
            rows.retain(|row| row.id > self.cursor);
            self.cursor = rows.iter().map(|row| row.id).max().unwrap_or(self.cursor);
        }
        if broken == Some(Broken::NoSequenceCheck) {
            rows.iter_mut().for_each(|row| row.published_seq = row.seq - 1);
        }
        // What is refused would be parked if its gap stood a second look; that none does is a property.
        self.memory.0.admit(rows);
    }

    /// `Worker::send_ready`. Every row finds the client's queue full once before it goes.
    pub(super) fn send(&mut self, broker: &mut Broker, broken: Option<Broken>) {
        while let Some(first) = self.memory.0.next_to_send().map(|row| row.id) {
            self.memory.0.put_back(first);
            let again = self.memory.0.next_to_send().map(|row| row.id);
            assert_eq!(again, Some(first), "a row that was put back is the next to go");
            if !broker.log.has(first) {
                broker.on_the_way.add(first);
            }
            if matches!(broken, Some(Broken::TwoOfAKeyInFlight | Broken::DoneWhenEnqueued)) {
                self.memory.0.acknowledged(first);
            }
            if broken == Some(Broken::DoneWhenEnqueued) {
                self.sent.add(first);
            }
        }
    }
}

//! The outbox's tables, as far as one lane goes.

use chrono::DateTime;
use sqlx::types::Json;

use super::{Broken, KEYS, broker::Rows, relay::Term};
use crate::{delivery::PendingRow, message::lane_of};

/// Rows read at once; fewer than there are, so that a read can end in the middle of a key.
const ROOM: usize = 2;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Database {
    /// Every row that got an id; row `n` has id `n + 1`.
    pub(super) rows: Vec<Row>,
    /// Whose the lane is. A lease that ran out leaves it nobody's, with the term still standing.
    pub(super) owner: Option<usize>,
    /// Something was archived by a relay that did not own the lane.
    pub(super) archived_by_another: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct Row {
    pub(super) key: usize,
    pub(super) seq: i64,
    pub(super) committed: bool,
    /// How often it stands in the archive; it is in the outbox while that is 0.
    pub(super) archived: u8,
}

impl Database {
    pub(super) fn row(&self, id: i64) -> &Row {
        &self.rows[id as usize - 1]
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = i64> + use<> {
        1..=self.rows.len() as i64
    }

    /// `outbox_progress`.
    pub(super) fn published_seq(&self, key: usize) -> i64 {
        self.rows.iter().filter(|row| row.key == key && row.archived > 0).map(|row| row.seq).max().unwrap_or(0)
    }

    /// `delivery::has_gap`.
    pub(super) fn has_gap(&self, key: usize) -> bool {
        let pending = self.rows.iter().filter(|row| row.key == key && row.committed && row.archived == 0);
        pending.map(|row| row.seq).min().is_some_and(|first| first > self.published_seq(key) + 1)
    }

    /// The row before this one in its key.
    pub(super) fn before(&self, id: i64) -> Option<i64> {
        let Row { key, seq, .. } = *self.row(id);
        self.ids().find(|&other| self.row(other).key == key && self.row(other).seq == seq - 1)
    }

    pub(super) fn append(&mut self, key: usize) {
        let seq = self.rows.iter().filter(|row| row.key == key).count() as i64 + 1;
        self.rows.push(Row { key, seq, committed: false, archived: 0 });
    }

    /// The key's row lock is held until the commit.
    pub(super) fn is_locked(&self, key: usize) -> bool {
        self.rows.iter().any(|row| row.key == key && !row.committed)
    }

    /// `delivery::claim`.
    pub(super) fn claim(&self, above: i64, known: &[i64]) -> Vec<PendingRow> {
        let pending = |id: &i64| self.row(*id).committed && self.row(*id).archived == 0;
        let claimed = self.ids().filter(pending).filter(|id| *id > above && !known.contains(id));
        claimed.take(ROOM).map(|id| self.pending_row(id)).collect()
    }

    pub(super) fn pending_row(&self, id: i64) -> PendingRow {
        let row = self.row(id);
        PendingRow {
            id,
            lane: lane_of(&KEYS[row.key]),
            key: KEYS[row.key].as_str().into(),
            seq: row.seq,
            topic: String::new(),
            payload: vec![],
            headers: Json(serde_json::value::RawValue::NULL.to_owned()),
            replay_of: None,
            created_at: DateTime::UNIX_EPOCH,
            published_seq: self.published_seq(row.key),
            blocked: false,
        }
    }

    /// `delivery::finish`: what of `sent` was moved.
    pub(super) fn finish(&mut self, relay: usize, term: Option<Term>, sent: Rows, broken: Option<Broken>) -> Rows {
        let owned = self.owner == Some(relay) && term == Some(Term::Present);
        let mut moved = Rows::default();
        if !owned && broken != Some(Broken::NoTermGuard) {
            return moved;
        }
        for id in sent.ids() {
            let row = &mut self.rows[id as usize - 1];
            if row.archived == 0 || broken == Some(Broken::ArchivedUnseen) {
                row.archived = (row.archived + 1).min(2);
                moved.add(id);
                self.archived_by_another |= !owned;
            }
        }
        moved
    }
}

//! The rows in memory, and which of them may be sent now. Pure: no clock, no I/O.
//!
//! The rule that keeps a key in order is here and nowhere else: **of one key, one message is in
//! flight**. With two, the broker could refuse the first and append the second. It also makes a
//! relay that was thawed after losing its lanes harmless to the order of first occurrences: what it
//! still sends, it sends only after everything before it was acknowledged.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use crate::{delivery::PendingRow, message::lane_of};

/// Rows between "read from the outbox" and "moved to the archive".
#[derive(Debug, Default)]
#[cfg_attr(test, derive(Clone))]
pub(crate) struct Window {
    runs: HashMap<Arc<str>, Run>,
    /// Keys whose first waiting row may be sent, in the order they became ready.
    ready: VecDeque<Arc<str>>,
    /// Row id to key, for every row held here.
    keys: HashMap<i64, Arc<str>>,
    in_flight: usize,
}

/// One key's rows, in order.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone))]
struct Run {
    waiting: VecDeque<PendingRow>,
    in_flight: Option<PendingRow>,
    /// Sent, not archived yet.
    sent: usize,
    /// The sequence number that has to come next.
    next_seq: i64,
}

/// Why a row that was read must not be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// An earlier row of its key is parked.
    Behind,
    /// The row before it is neither out nor here: something removed it behind the relay's back.
    Gap { expected: i64 },
    /// Its place in the sequence is out already: something put it back behind the relay's back.
    Stale,
}

impl Window {
    /// Takes rows in, in order of id. Answers with those that must not be sent; nothing later of
    /// their keys is taken in either, but for replays and what is behind a stale row: neither depends on it.
    pub(crate) fn admit(&mut self, rows: Vec<PendingRow>) -> Vec<(PendingRow, Refusal)> {
        let mut refused: Vec<(PendingRow, Refusal)> = Vec::new();
        for row in rows {
            let stops = |(earlier, why): &(PendingRow, Refusal)| earlier.key == row.key && *why != Refusal::Stale;
            if row.replay_of.is_none() && refused.iter().any(stops) {
                continue;
            }
            let expected = self.runs.get(&row.key).map_or(row.published_seq + 1, |run| run.next_seq);
            match Self::refusal(&row, expected) {
                Some(refusal) => refused.push((row, refusal)),
                None => self.push(row, expected),
            }
        }
        refused
    }

    fn refusal(row: &PendingRow, expected: i64) -> Option<Refusal> {
        match row.replay_of {
            Some(_) => None,
            None if row.blocked => Some(Refusal::Behind),
            None if row.seq <= row.published_seq => Some(Refusal::Stale),
            None => (row.seq != expected).then_some(Refusal::Gap { expected }),
        }
    }

    fn push(&mut self, row: PendingRow, expected: i64) {
        self.keys.insert(row.id, row.key.clone());
        let run = self.runs.entry(row.key.clone()).or_insert_with(|| Run {
            waiting: VecDeque::new(),
            in_flight: None,
            sent: 0,
            next_seq: expected,
        });
        if row.replay_of.is_none() {
            run.next_seq = row.seq + 1;
        }
        if run.waiting.is_empty() && run.in_flight.is_none() {
            self.ready.push_back(row.key.clone());
        }
        run.waiting.push_back(row);
    }

    /// The next row to send; it counts as in flight from now on.
    pub(crate) fn next_to_send(&mut self) -> Option<&PendingRow> {
        loop {
            let key = self.ready.pop_front()?;
            let Some(run) = self.runs.get_mut(&key) else { continue };
            if run.in_flight.is_some() {
                continue;
            }
            let Some(row) = run.waiting.pop_front() else { continue };
            run.in_flight = Some(row);
            self.in_flight += 1;
            // Looked up again: the borrow checker can't see that the loop ends here.
            return self.runs.get(&key).and_then(|run| run.in_flight.as_ref());
        }
    }

    /// Takes back the row [`next_to_send`](Self::next_to_send) gave out, because there was no room
    /// for it in the producer's queue.
    pub(crate) fn put_back(&mut self, row_id: i64) {
        let Some(key) = self.keys.get(&row_id) else { return };
        let Some(run) = self.runs.get_mut(key) else { return };
        if let Some(row) = run.in_flight.take_if(|row| row.id == row_id) {
            run.waiting.push_front(row);
            self.in_flight -= 1;
            self.ready.push_front(key.clone());
        }
    }

    /// The broker has this row: the next of its key may go. `None` for a row that is not in flight
    /// (its key was evicted meanwhile).
    pub(crate) fn acknowledged(&mut self, row_id: i64) -> Option<PendingRow> {
        let key = self.keys.get(&row_id)?;
        let run = self.runs.get_mut(key)?;
        let row = run.in_flight.take_if(|row| row.id == row_id)?;
        run.sent += 1;
        self.in_flight -= 1;
        if !run.waiting.is_empty() {
            self.ready.push_back(key.clone());
        }
        Some(row)
    }

    /// The row in flight with this id, if it still is.
    pub(crate) fn in_flight_row(&self, row_id: i64) -> Option<&PendingRow> {
        let run = self.runs.get(self.keys.get(&row_id)?)?;
        run.in_flight.as_ref().filter(|row| row.id == row_id)
    }

    /// Forgets everything of a key that is not sent yet. The rows stay in the outbox and are read
    /// again. What was sent is kept until it is archived: only then does the database know it too.
    pub(crate) fn evict(&mut self, key: &str) {
        let Some(run) = self.runs.get_mut(key) else { return };
        let given_up = run.in_flight.take();
        self.in_flight -= usize::from(given_up.is_some());
        for row in given_up.into_iter().chain(run.waiting.drain(..)) {
            self.keys.remove(&row.id);
            if row.replay_of.is_none() {
                run.next_seq = run.next_seq.min(row.seq);
            }
        }
        if run.sent == 0 {
            self.runs.remove(key);
        }
    }

    /// Forgets everything that is not sent yet.
    pub(crate) fn evict_unsent(&mut self) {
        let keys: Vec<Arc<str>> = self.runs.keys().cloned().collect();
        keys.iter().for_each(|key| self.evict(key));
        self.ready.clear();
    }

    /// Forgets every key of a lane, sent rows included: the lane has another owner.
    pub(crate) fn evict_lane(&mut self, lane: i16) {
        let of_lane = |key: &str| lane_of(key) == lane;
        self.in_flight -= self.runs.iter().filter(|(key, run)| run.in_flight.is_some() && of_lane(key)).count();
        self.runs.retain(|key, _| !of_lane(key));
        self.keys.retain(|_, key| !of_lane(key));
    }

    /// These rows are in the archive.
    pub(crate) fn archived(&mut self, row_ids: impl IntoIterator<Item = i64>) {
        for row_id in row_ids {
            let Some(key) = self.keys.remove(&row_id) else { continue };
            let Some(run) = self.runs.get_mut(&key) else { continue };
            run.sent = run.sent.saturating_sub(1);
            if run.sent == 0 && run.waiting.is_empty() && run.in_flight.is_none() {
                self.runs.remove(&key);
            }
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Self::default();
    }

    /// Rows held, sent ones included.
    pub(crate) fn len(&self) -> usize {
        self.keys.len()
    }

    /// Rows given to the producer and not reported yet.
    pub(crate) fn in_flight(&self) -> usize {
        self.in_flight
    }

    /// Whether a row could be sent right now.
    pub(crate) fn has_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Ids of all rows held.
    pub(crate) fn row_ids(&self) -> Vec<i64> {
        self.keys.keys().copied().collect()
    }

    /// Rows held of one lane.
    pub(crate) fn len_of_lane(&self, lane: i16) -> usize {
        self.keys.values().filter(|key| lane_of(key) == lane).count()
    }
}

/// All that tells one window from another, by row ids: each key's waiting rows, row in flight, count of
/// sent rows and next number; then who is ready, and the rows held.
#[cfg(test)]
type Snapshot<'a> = (Vec<(&'a str, Vec<i64>, Option<i64>, usize, i64)>, Vec<&'a str>, Vec<i64>);

#[cfg(test)]
impl Window {
    /// For the model, which has to know whether it was here before.
    pub(crate) fn snapshot(&self) -> Snapshot<'_> {
        let mut runs: Vec<_> = self
            .runs
            .iter()
            .map(|(key, run)| {
                let waiting = run.waiting.iter().map(|row| row.id).collect();
                (&**key, waiting, run.in_flight.as_ref().map(|row| row.id), run.sent, run.next_seq)
            })
            .collect();
        runs.sort_unstable();
        let mut ids = self.row_ids();
        ids.sort_unstable();
        (runs, self.ready.iter().map(|key| &**key).collect(), ids)
    }
}

#[cfg(test)]
mod tests;

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
mod tests {
    use proptest::prelude::*;
    use serde_json::value::RawValue;
    use sqlx::types::Json;

    use super::*;

    fn row(id: i64, key: &str, seq: i64) -> PendingRow {
        PendingRow {
            id,
            lane: lane_of(key),
            key: key.into(),
            seq,
            topic: "t".into(),
            payload: vec![],
            headers: Json(RawValue::from_string("{}".to_owned()).unwrap()),
            replay_of: None,
            created_at: chrono::DateTime::UNIX_EPOCH,
            published_seq: 0,
            blocked: false,
        }
    }

    fn send_next(window: &mut Window) -> Option<i64> {
        window.next_to_send().map(|row| row.id)
    }

    #[test]
    fn a_key_has_one_message_in_flight_and_others_go_on() {
        let mut window = Window::default();
        assert!(window.admit(vec![row(1, "a", 1), row(2, "a", 2), row(3, "b", 1)]).is_empty());
        assert_eq!([send_next(&mut window), send_next(&mut window), send_next(&mut window)], [Some(1), Some(3), None]);
        window.acknowledged(1);
        assert_eq!(send_next(&mut window), Some(2));
    }

    #[test]
    fn a_row_whose_predecessor_is_missing_is_refused_with_everything_behind_it() {
        let mut window = Window::default();
        let refused = window.admit(vec![row(5, "a", 2), row(6, "a", 3), row(7, "b", 1)]);
        assert_eq!(refused.len(), 1);
        assert_eq!(refused[0].1, Refusal::Gap { expected: 1 });
        assert_eq!([send_next(&mut window), send_next(&mut window)], [Some(7), None]);
    }

    #[test]
    fn a_row_behind_a_parked_one_is_refused() {
        let mut window = Window::default();
        let blocked = PendingRow { blocked: true, published_seq: 1, ..row(5, "a", 3) };
        assert_eq!(window.admit(vec![blocked])[0].1, Refusal::Behind);
    }

    #[test]
    fn a_row_whose_place_is_out_already_is_refused_and_stops_nobody() {
        let mut window = Window::default();
        let stale = PendingRow { published_seq: 4, ..row(8, "a", 3) };
        let next = PendingRow { published_seq: 4, ..row(9, "a", 5) };
        let refused = window.admit(vec![stale, next]);
        assert_eq!((refused.len(), &refused[0].1), (1, &Refusal::Stale));
        assert_eq!(send_next(&mut window), Some(9));
    }

    #[test]
    fn a_replay_goes_out_beside_what_is_parked() {
        let mut window = Window::default();
        let blocked = PendingRow { blocked: true, published_seq: 1, ..row(5, "a", 3) };
        let replay = PendingRow { blocked: true, replay_of: Some(1), published_seq: 1, ..row(6, "a", 1) };
        assert_eq!(window.admit(vec![blocked, replay]).len(), 1);
        assert_eq!(send_next(&mut window), Some(6));
    }

    #[test]
    fn an_evicted_key_starts_over_where_it_stood() {
        let mut window = Window::default();
        window.admit(vec![row(1, "a", 1), row(2, "a", 2), row(3, "a", 3)]);
        send_next(&mut window);
        window.acknowledged(1);
        send_next(&mut window);
        window.evict("a");
        assert_eq!(window.acknowledged(2).map(|r| r.id), None, "a late report of an evicted row counts for nothing");
        // Row 1 is sent but not archived, so the database still says that nothing is out.
        assert!(window.admit(vec![row(2, "a", 2), row(3, "a", 3)]).is_empty());
        assert_eq!(send_next(&mut window), Some(2));
    }

    #[test]
    fn a_replay_stands_outside_the_sequence_but_in_line() {
        let mut window = Window::default();
        let replay = PendingRow { replay_of: Some(1), published_seq: 4, ..row(9, "a", 2) };
        let next = PendingRow { published_seq: 4, ..row(10, "a", 5) };
        assert!(window.admit(vec![replay, next]).is_empty());
        assert_eq!([send_next(&mut window), send_next(&mut window)], [Some(9), None]);
    }

    /// Everything a broker and a database can do to the window, in any order.
    #[derive(Debug, Clone)]
    enum Happening {
        Read,
        Send,
        Ack(usize),
        Fail(usize),
        Archive,
    }

    fn happenings() -> impl Strategy<Value = Vec<Happening>> {
        let one = prop_oneof![
            3 => Just(Happening::Read),
            5 => Just(Happening::Send),
            4 => any::<usize>().prop_map(Happening::Ack),
            1 => any::<usize>().prop_map(Happening::Fail),
            2 => Just(Happening::Archive),
        ];
        proptest::collection::vec(one, 1..200)
    }

    proptest! {
        /// First sends of a key are in order, whatever fails in between, and no row is lost: what
        /// is not archived is still in the outbox or in the window.
        #[test]
        fn first_appends_of_a_key_keep_their_order(script in happenings()) {
            let mut outbox: Vec<(i64, &str, i64)> =
                (0..30).map(|n| (n + 1, ["a", "b", "c"][n as usize % 3], n / 3 + 1)).collect();
            let mut window = Window::default();
            let mut flying: Vec<i64> = vec![];
            let mut unarchived: Vec<i64> = vec![];
            let mut out: HashMap<&str, i64> = HashMap::new();
            let mut appended: HashMap<&str, Vec<i64>> = HashMap::new();
            let of = |id: i64| (["a", "b", "c"][(id - 1) as usize % 3], (id - 1) / 3 + 1);
            for happening in script {
                match happening {
                    Happening::Read => {
                        let known = window.row_ids();
                        let rows = outbox.iter().filter(|(id, ..)| !known.contains(id)).take(7)
                            .map(|&(id, key, seq)| PendingRow {
                                published_seq: out.get(key).copied().unwrap_or(0), ..row(id, key, seq)
                            }).collect();
                        prop_assert!(window.admit(rows).is_empty());
                    }
                    Happening::Send => if let Some(id) = send_next(&mut window) {
                        let (key, seq) = of(id);
                        let log = appended.entry(key).or_default();
                        if !log.contains(&seq) {
                            prop_assert_eq!(log.last().map_or(1, |last| last + 1), seq);
                            log.push(seq);
                        }
                        flying.push(id);
                    },
                    Happening::Ack(which) if !flying.is_empty() => {
                        let id = flying.remove(which % flying.len());
                        if window.acknowledged(id).is_some() { unarchived.push(id); }
                    }
                    Happening::Fail(which) if !flying.is_empty() => {
                        let id = flying.remove(which % flying.len());
                        let key = window.in_flight_row(id).map(|row| row.key.clone());
                        if let Some(key) = key { window.evict(&key); }
                    }
                    Happening::Archive => {
                        for id in unarchived.drain(..) {
                            outbox.retain(|(row_id, ..)| *row_id != id);
                            let (key, seq) = of(id);
                            out.insert(key, seq);
                            window.archived([id]);
                        }
                    }
                    Happening::Ack(_) | Happening::Fail(_) => {}
                }
            }
        }
    }
}

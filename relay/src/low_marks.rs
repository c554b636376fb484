//! Where to begin reading a lane. Pure: time comes in as a value.
//!
//! While some transaction elsewhere holds an old snapshot, rows that were sent minutes ago stay in
//! the index as dead entries, and every read from the beginning walks over all of them. So reads
//! begin at a mark that lags a third to two thirds of a second behind what was read, which covers
//! transactions that commit a little late; and a sweep from the very beginning, every second but never
//! more than a twentieth of the time (and whenever it begins anew, after a failure), finds those that commit later still. A longer lag would cost:
//! every read walks over what was sent within it. The mark is a hint: losing it loses nothing.
//!
//! A sweep also tells where to begin when nothing is known yet: at the first row it found. Whatever
//! commits below that at this very moment waits for the next sweep.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

const LAG: Duration = Duration::from_millis(333);
const SWEEP_REST: Duration = Duration::from_secs(1);
const SWEEP_SHARE: u32 = 20;

#[derive(Debug)]
pub(crate) struct LowMarks {
    highest: HashMap<i16, i64>,
    previous: HashMap<i16, i64>,
    low: HashMap<i16, i64>,
    rotated_at: Instant,
    next_sweep: Instant,
}

impl LowMarks {
    pub(crate) fn new(now: Instant) -> Self {
        let none = HashMap::new;
        Self { highest: none(), previous: none(), low: none(), rotated_at: now, next_sweep: now }
    }

    /// The marks for these lanes, and whether this read is a sweep.
    pub(crate) fn marks(&mut self, lanes: &[i16], now: Instant) -> (Vec<i64>, bool) {
        if now.duration_since(self.rotated_at) >= LAG {
            let lagging = std::mem::replace(&mut self.previous, self.highest.clone());
            lagging.into_iter().for_each(|(lane, mark)| {
                let low = self.low.entry(lane).or_insert(mark);
                *low = mark.max(*low);
            });
            self.rotated_at = now;
        }
        let sweep = now >= self.next_sweep;
        let mark = |lane| if sweep { 0 } else { self.low.get(lane).copied().unwrap_or(0) };
        (lanes.iter().map(mark).collect(), sweep)
    }

    /// A sweep took this long: the next one may come after twenty times that, a second at least.
    pub(crate) fn swept(&mut self, now: Instant, took: Duration) {
        self.next_sweep = now + (took * SWEEP_SHARE).max(SWEEP_REST);
    }

    /// A sweep found no row of this lane below this one.
    pub(crate) fn begins_at(&mut self, lane: i16, row_id: i64) {
        self.low.entry(lane).or_insert(row_id - 1);
    }

    /// Everything of this lane up to this row was read.
    pub(crate) fn read_up_to(&mut self, lane: i16, row_id: i64) {
        let highest = self.highest.entry(lane).or_insert(row_id);
        *highest = (*highest).max(row_id);
    }

    /// Rows that were read have been given up, or rows that were passed over may go: begin anew.
    pub(crate) fn reset(&mut self, now: Instant) {
        *self = Self::new(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_sweep_says_where_to_begin() {
        let start = Instant::now();
        let mut marks = LowMarks::new(start);
        marks.marks(&[7, 8], start);
        marks.swept(start, Duration::from_millis(500));
        marks.begins_at(7, 100);
        assert_eq!(marks.marks(&[7, 8], start), (vec![99, 0], false));
        marks.begins_at(7, 5);
        assert_eq!(
            marks.marks(&[7], start),
            (vec![99], false),
            "later sweeps find what came late, and set nothing back"
        );
    }

    #[test]
    fn a_mark_lags_behind_what_was_read_and_a_sweep_starts_over() {
        let start = Instant::now();
        let mut marks = LowMarks::new(start);
        assert_eq!(marks.marks(&[7], start), (vec![0], true));
        marks.swept(start, Duration::from_millis(500));
        marks.read_up_to(7, 100);
        assert_eq!(marks.marks(&[7], start + LAG / 2), (vec![0], false));
        marks.marks(&[7], start + LAG);
        assert_eq!(marks.marks(&[7], start + LAG * 2), (vec![100], false));
        // A sweep of half a second: the next one ten seconds later.
        assert_eq!(marks.marks(&[7, 8], start + SWEEP_REST * 9), (vec![100, 0], false));
        assert_eq!(marks.marks(&[7, 8], start + SWEEP_REST * 10), (vec![0, 0], true));
    }
}

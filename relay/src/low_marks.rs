//! Where to begin reading a lane. Pure: time comes in as a value.
//!
//! While some transaction elsewhere holds an old snapshot, rows that were sent minutes ago stay in
//! the index as dead entries, and every read from the beginning walks over all of them. Two marks a
//! lane spare that:
//!
//! - **Settled**: nothing becomes visible at or below it any more, and what was visible is in memory or
//!   gone. Who appends draws the row's id in a transaction that has its number already (`append` counts
//!   the key up first). So once a transaction of our own that began after a read has ended, *and with it
//!   everything numbered before*, all that the read may have missed is either there or rolled back. When
//!   another read, which begins at the settled mark, sees the world as it is then, the mark moves up to
//!   where the first had come. It costs no query of its own: archiving is such a transaction. Where
//!   transactions are short, the mark stays a read or two behind.
//! - **Lagging**: where reads had come a third to two thirds of a second ago. Reads begin here while some
//!   long transaction that writes keeps the settled mark where it is. What commits later than that waits
//!   for a sweep.
//!
//! A sweep reads from the settled mark; it comes a second after the last, but takes no more than a twentieth of
//! the time. A full sweep reads from the beginning; it finds what comes to stand below the settled mark all the
//! same: rows that an operator's replay (or a hand) puts back under their old ids, and ids that are given out
//! twice because a failover lost some. It takes no more than a fiftieth of the time, and goes by slices of as
//! many lanes as can be walked at once without anyone waiting for it. With millions of dead rows it comes round
//! in a minute or two, else in a second.
//!
//! All of this is a hint: losing it loses nothing.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use crate::delivery::LaneClaim;

const LAG: Duration = Duration::from_millis(333);
const SWEEP_REST: Duration = Duration::from_secs(1);
const SWEEP_SHARE: u32 = 20;
const FULL_SWEEP_SHARE: u32 = 50;
/// How long a slice of a full sweep should take.
const SLICE: Duration = Duration::from_millis(10);

/// Row ids by lane.
type Marks = HashMap<i16, i64>;

#[derive(Debug)]
pub(crate) struct LowMarks {
    /// Up to here everything was read that was visible then.
    read: Marks,
    settled: Marks,
    settled_at: Option<Instant>,
    /// The oldest milestone that was not passed yet, and the newest.
    waiting: Option<Milestone>,
    newest: Option<Milestone>,
    lagging: Marks,
    previous: Marks,
    rotated_at: Instant,
    next_sweep: Instant,
    next_slice: Instant,
    /// Lanes of a slice.
    slice: usize,
    /// The next slice begins with this lane or the first above it.
    slice_from: i16,
}

/// How far was read before this transaction of ours began.
#[derive(Debug)]
struct Milestone {
    xid: i64,
    read: Marks,
}

/// Where a read begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// At the beginning of every lane.
    Beginning,
    /// At the beginning of some lanes; the others are not read.
    Slice,
    /// At the settled marks.
    Settled,
    /// At the lagging marks, which may lie above the settled ones.
    Lagging,
}

/// What a read has found of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneRead {
    pub lane: i16,
    /// The first row's id.
    pub first: Option<i64>,
    /// It gave as many rows as it might, and may have more.
    pub full: bool,
    /// Everything visible was read up to here.
    pub up_to: i64,
}

impl LowMarks {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            read: Marks::new(),
            settled: Marks::new(),
            settled_at: None,
            waiting: None,
            newest: None,
            lagging: Marks::new(),
            previous: Marks::new(),
            rotated_at: now,
            next_sweep: now,
            next_slice: now,
            slice: usize::MAX,
            slice_from: 0,
        }
    }

    /// What to read next of the lanes that have these limits.
    pub(crate) fn next_read(&mut self, limits: &BTreeMap<i16, i64>, now: Instant) -> (Start, Vec<LaneClaim>) {
        if now.duration_since(self.rotated_at) >= LAG {
            for (lane, mark) in std::mem::replace(&mut self.previous, self.read.clone()) {
                raise(&mut self.lagging, lane, mark);
            }
            self.rotated_at = now;
        }
        if now >= self.next_slice && self.slice < limits.len() {
            return (Start::Slice, self.next_slice(limits));
        }
        let keeps_up = self.settled_at.is_some_and(|at| now.duration_since(at) < LAG);
        let (start, marks) = match () {
            () if now >= self.next_slice => (Start::Beginning, &Marks::new()),
            () if keeps_up || now >= self.next_sweep => (Start::Settled, &self.settled),
            () => (Start::Lagging, &self.lagging),
        };
        let claim = |(&lane, &most)| LaneClaim { lane, most, above: marks.get(&lane).copied().unwrap_or(0) };
        (start, limits.iter().map(claim).collect())
    }

    fn next_slice(&mut self, limits: &BTreeMap<i16, i64>) -> Vec<LaneClaim> {
        let lanes = limits.range(self.slice_from..).chain(limits.range(..self.slice_from));
        let slice: Vec<LaneClaim> =
            lanes.take(self.slice).map(|(&lane, &most)| LaneClaim { lane, most, above: 0 }).collect();
        self.slice_from = slice.last().map_or(0, |claim| claim.lane + 1);
        slice
    }

    /// A read of so many of our lanes has ended. One that failed, for its length maybe, counts too, or there would be
    /// nothing but sweeps.
    pub(crate) fn took(&mut self, start: Start, lanes: usize, of: usize, took: Duration, now: Instant) {
        let part = |rest: Duration| rest.mul_f64(lanes as f64 / of as f64);
        if matches!(start, Start::Beginning | Start::Slice) {
            self.next_slice = now + (took * FULL_SWEEP_SHARE).max(part(SWEEP_REST));
            let fitting = lanes as f64 * SLICE.div_duration_f64(took);
            self.slice = (fitting as usize).clamp(1, lanes * 2);
        }
        if matches!(start, Start::Beginning | Start::Settled) {
            self.next_sweep = now + (took * SWEEP_SHARE).max(SWEEP_REST);
        }
    }

    /// What a read has found. `oldest_running` is the number of the oldest transaction that had not ended before
    /// it began; none when it passed over rows that may not be sent now, so that nothing settles.
    pub(crate) fn found(&mut self, start: Start, lanes: &[LaneRead], oldest_running: Option<i64>, now: Instant) {
        let settles = matches!(start, Start::Beginning | Start::Settled);
        let passed = |milestone: &mut Milestone| settles && oldest_running.is_some_and(|xid| milestone.xid < xid);
        if let Some(passed) = self.newest.take_if(passed).or_else(|| self.waiting.take_if(passed)) {
            for read in lanes {
                let mark = passed.read.get(&read.lane).copied().unwrap_or(0);
                raise(&mut self.settled, read.lane, mark.min(read.up_to));
            }
            self.settled_at = Some(now);
            self.waiting = self.newest.take();
        }
        for read in lanes {
            // When nothing is known of the lane, it was read from its beginning. What commits below its first
            // row at this very moment waits for a sweep.
            self.lagging.entry(read.lane).or_insert_with(|| read.first.map_or(read.up_to, |id| id - 1));
            raise(&mut self.read, read.lane, read.up_to);
        }
    }

    /// A transaction with this number began after the last read, and has ended.
    pub(crate) fn wrote(&mut self, xid: i64) {
        let milestone = Milestone { xid, read: self.read.clone() };
        // The newest alone would never be passed where somebody always writes.
        let place = if self.waiting.is_none() { &mut self.waiting } else { &mut self.newest };
        *place = Some(milestone);
    }

    /// Rows that were read have been given up, or rows that were passed over may go: begin anew.
    pub(crate) fn reset(&mut self, now: Instant) {
        *self = Self::new(now);
    }
}

fn raise(marks: &mut Marks, lane: i16, to: i64) {
    let mark = marks.entry(lane).or_insert(to);
    *mark = to.max(*mark);
}

#[cfg(test)]
mod tests {
    use super::*;

    const QUICK: Duration = Duration::from_millis(1);
    const SLOW: Duration = Duration::from_millis(640);

    /// A few lanes, of which everything up to `up_to` is read each time.
    struct Lanes {
        marks: LowMarks,
        limits: BTreeMap<i16, i64>,
        now: Instant,
    }

    impl Lanes {
        fn new(lanes: std::ops::Range<i16>) -> Self {
            let now = Instant::now();
            Self { marks: LowMarks::new(now), limits: lanes.map(|lane| (lane, 50)).collect(), now }
        }

        fn passes(&mut self, time: Duration) -> &mut Self {
            self.now += time;
            self
        }

        fn next(&mut self) -> (Start, Vec<(i16, i64)>) {
            let (start, claims) = self.marks.next_read(&self.limits, self.now);
            assert!(claims.iter().all(|claim| claim.most == 50));
            (start, claims.iter().map(|claim| (claim.lane, claim.above)).collect())
        }

        fn read(&mut self, up_to: i64, oldest_running: Option<i64>, took: Duration) -> (Start, Vec<(i16, i64)>) {
            let (start, claims) = self.next();
            self.now += took;
            self.marks.took(start, claims.len(), self.limits.len(), took, self.now);
            let read = |&(lane, _): &(i16, i64)| LaneRead { lane, first: Some(up_to - 9), full: false, up_to };
            let reads: Vec<LaneRead> = claims.iter().map(read).collect();
            self.marks.found(start, &reads, oldest_running, self.now);
            (start, claims)
        }

        /// One lane, a full sweep just done, and no sweep due.
        fn swept() -> Self {
            let mut lanes = Self::new(7..8);
            assert_eq!(lanes.read(100, Some(50), QUICK), (Start::Beginning, vec![(7, 0)]));
            lanes
        }

        /// The same, settled up to 100 by a transaction numbered 60.
        fn settled() -> Self {
            let mut lanes = Self::swept();
            lanes.marks.wrote(60);
            lanes.marks.next_slice += SWEEP_REST * 60;
            assert_eq!(lanes.passes(SWEEP_REST).read(200, Some(61), QUICK), (Start::Settled, vec![(7, 0)]));
            assert_eq!(lanes.next(), (Start::Settled, vec![(7, 100)]));
            lanes
        }
    }

    #[test]
    fn what_was_read_is_settled_once_everything_that_ran_then_has_ended() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        assert_eq!(lanes.read(300, Some(70), QUICK), (Start::Settled, vec![(7, 100)]));
        assert_eq!(lanes.next().1, [(7, 100)], "what ran before 70 need not have ended");
        assert_eq!(lanes.read(400, Some(71), QUICK), (Start::Settled, vec![(7, 100)]));
        assert_eq!(lanes.next().1, [(7, 200)], "up to where was read before 70, and no further");
    }

    #[test]
    fn a_read_that_ends_at_its_limit_settles_no_more_than_it_has_seen() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        let read = LaneRead { lane: 7, first: Some(101), full: true, up_to: 150 };
        lanes.marks.found(Start::Settled, &[read], Some(71), lanes.now);
        assert_eq!(lanes.next(), (Start::Settled, vec![(7, 150)]));
    }

    #[test]
    fn a_read_that_passes_over_rows_settles_nothing() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        lanes.read(300, None, QUICK);
        assert_eq!(lanes.next(), (Start::Settled, vec![(7, 100)]));
    }

    #[test]
    fn a_long_transaction_leaves_reads_to_the_lagging_marks_and_sweeps_to_the_settled_ones() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        for _ in 0..4 {
            lanes.passes(LAG / 2).read(300, Some(65), QUICK);
        }
        assert_eq!(lanes.read(400, Some(65), QUICK), (Start::Lagging, vec![(7, 300)]));
        lanes.marks.wrote(80);
        assert_eq!(lanes.passes(SWEEP_REST).read(400, Some(65), SLOW), (Start::Settled, vec![(7, 100)]));
        assert_eq!(lanes.passes(SWEEP_REST).next().0, Start::Lagging, "a sweep may take a twentieth of the time");
        assert_eq!(lanes.passes(SLOW * 20).read(500, Some(90), SLOW), (Start::Settled, vec![(7, 100)]));
        assert_eq!(lanes.next(), (Start::Settled, vec![(7, 400)]), "it has ended, and so has 80, the newest of ours");
    }

    #[test]
    fn where_somebody_always_writes_the_oldest_milestone_is_passed() {
        let mut lanes = Lanes::settled();
        for xid in 70..90 {
            lanes.marks.wrote(xid);
            lanes.read(xid * 10, Some(xid - 4), QUICK);
        }
        assert_eq!(lanes.next().1, [(7, 790)]);
    }

    #[test]
    fn the_first_sweep_says_where_to_begin() {
        let mut lanes = Lanes::swept();
        assert_eq!(lanes.read(200, Some(50), QUICK), (Start::Lagging, vec![(7, 90)]));
        assert_eq!(lanes.next(), (Start::Lagging, vec![(7, 90)]), "what is read later sets nothing back");
    }

    #[test]
    fn a_full_sweep_that_is_slow_goes_by_slices_and_rests() {
        let mut lanes = Lanes::new(0..64);
        let (start, all) = lanes.read(100, Some(50), SLOW);
        assert_eq!((start, all.len()), (Start::Beginning, 64));
        assert_ne!(lanes.passes(SLOW * 49).next().0, Start::Slice);
        assert_eq!(lanes.passes(SLOW).read(100, Some(50), SLICE), (Start::Slice, vec![(0, 0)]));
        assert_ne!(lanes.next().0, Start::Slice);
        assert_eq!(lanes.passes(SLICE * 50).read(100, Some(50), SLICE / 8), (Start::Slice, vec![(1, 0)]));
        assert_eq!(lanes.passes(SLICE * 50).read(100, Some(50), SLICE), (Start::Slice, vec![(2, 0), (3, 0)]));
    }

    #[test]
    fn a_full_sweep_comes_round_in_a_second_where_it_is_quick() {
        let mut lanes = Lanes::new(0..64);
        for _ in 0..3 {
            assert_eq!(lanes.read(100, Some(50), QUICK).0, Start::Beginning);
            assert_ne!(lanes.next().0, Start::Beginning);
            lanes.passes(SWEEP_REST);
        }
        for _ in 0..3 {
            lanes.read(100, Some(50), SLICE * 2);
            lanes.passes(SWEEP_REST);
        }
        let (start, lanes) = lanes.next();
        assert_eq!((start, lanes.len()), (Start::Slice, 8));
    }
}

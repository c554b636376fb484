//! Where to begin reading a lane. Pure: time comes in as a value.
//!
//! While some transaction elsewhere holds an old snapshot, rows that were sent minutes ago stay in
//! the index as dead entries, and every read from the beginning walks over all of them. Two marks a
//! lane spare that:
//!
//! - **Settled**: nothing becomes visible at or below it any more, and what was visible is in memory or
//!   gone. Who appends draws the row's id in a transaction that has its number already (`append` counts
//!   the key up first, a replay locks it; the sequence has no cache). So once a transaction of our own *and
//!   everything numbered before it* has ended, every row whose id was drawn before that transaction began is
//!   either there or rolled back. A read that begins at the settled mark then sees all there will ever be of
//!   them, and the mark moves up over them. It costs no write of its own: archiving is such a transaction.
//!   Where transactions are short, the mark stays a read or two behind.
//! - **Lagging**: where reads had come a third to two thirds of a second ago. Reads begin here while some
//!   long transaction that writes, in whatever database of the server, keeps the settled mark where it is.
//!   What commits later than that waits for a sweep, or for the end of the long one.
//!
//! A sweep reads from the settled mark and takes no more than a twentieth of the time. A full sweep reads from
//! the beginning; it finds what comes to stand below the settled mark all the same: rows that an operator's replay
//! (or a hand) puts back under their old ids, and ids that are given out twice because a failover lost some. It
//! takes no more than a fiftieth of the time, and goes by slices of as many lanes as are walked in a moment. It
//! comes round in a second, with millions of dead rows in a minute or two.
//!
//! All of this is a hint: losing it loses nothing, and after a failure everything begins anew.

use std::{
    collections::{BTreeMap, HashMap},
    time::{Duration, Instant},
};

use crate::delivery::LaneClaim;

const LAG: Duration = Duration::from_millis(333);
const SWEEP_SHARE: u32 = 20;
const FULL_SWEEP_SHARE: u32 = 50;
const FULL_SWEEP_REST: Duration = Duration::from_secs(1);
/// How long a slice of a full sweep should take.
const SLICE: Duration = Duration::from_millis(25);

/// Row ids by lane.
type Marks = HashMap<i16, i64>;

#[derive(Debug)]
pub(crate) struct LowMarks {
    /// The newest id of all lanes that had been given out before the last read.
    newest_id: i64,
    settled: Marks,
    /// The oldest milestone that was not passed yet, and the newest.
    waiting: Option<Milestone>,
    newest: Option<Milestone>,
    /// Reads have come this far.
    read: Marks,
    previous: Marks,
    lagging: Marks,
    rotated_at: Instant,
    next_sweep: Instant,
    next_slice: Instant,
    /// Lanes of a slice.
    slice: usize,
    /// The next slice begins with this lane or the first above it.
    slice_from: i16,
}

/// Ids up to this one had been given out before a transaction of ours with this number began.
#[derive(Debug)]
struct Milestone {
    xid: i64,
    newest_id: i64,
}

/// What to read next.
#[derive(Debug)]
pub(crate) struct Read {
    start: Start,
    /// Not of all lanes when it is a slice of a full sweep.
    pub claims: Vec<LaneClaim>,
    /// Nothing that this read does not see can come up to this id.
    settles: Option<i64>,
}

/// Where a read begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    Beginning,
    Settled,
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
    /// Everything visible above the beginning was read up to here.
    pub up_to: i64,
}

impl LowMarks {
    pub(crate) fn new(now: Instant) -> Self {
        Self {
            newest_id: 0,
            settled: Marks::new(),
            waiting: None,
            newest: None,
            read: Marks::new(),
            previous: Marks::new(),
            lagging: Marks::new(),
            rotated_at: now,
            next_sweep: now,
            next_slice: now,
            slice: usize::MAX,
            slice_from: 0,
        }
    }

    /// What to read of the lanes that have these limits, given what was asked of the database just before: the newest
    /// id given out, and the number of the oldest transaction that has not ended; none where the read is going to
    /// pass over rows that may not be sent now, so that nothing may settle.
    pub(crate) fn next_read(
        &mut self,
        limits: &BTreeMap<i16, i64>,
        newest_id: i64,
        oldest_running: Option<i64>,
        now: Instant,
    ) -> Read {
        self.newest_id = newest_id;
        if now.duration_since(self.rotated_at) >= LAG {
            for (lane, mark) in std::mem::replace(&mut self.previous, self.read.clone()) {
                raise(&mut self.lagging, lane, mark);
            }
            self.rotated_at = now;
        }
        if now >= self.next_slice && self.slice < limits.len() {
            return Read { start: Start::Beginning, claims: self.next_slice(limits), settles: None };
        }
        let settles = oldest_running.and_then(|xid| self.passed(xid));
        let start = if now >= self.next_slice {
            Start::Beginning
        } else if settles.is_some() || now >= self.next_sweep {
            Start::Settled
        } else {
            Start::Lagging
        };
        let claim = |(&lane, &most)| LaneClaim { lane, most, above: self.mark(start, lane) };
        Read { start, claims: limits.iter().map(claim).collect(), settles }
    }

    fn mark(&self, start: Start, lane: i16) -> i64 {
        let of = |marks: &Marks| marks.get(&lane).copied().unwrap_or(0);
        match start {
            Start::Beginning => 0,
            Start::Settled => of(&self.settled),
            Start::Lagging => of(&self.lagging).max(of(&self.settled)),
        }
    }

    fn next_slice(&mut self, limits: &BTreeMap<i16, i64>) -> Vec<LaneClaim> {
        let lanes = limits.range(self.slice_from..).chain(limits.range(..self.slice_from));
        let slice: Vec<LaneClaim> =
            lanes.take(self.slice).map(|(&lane, &most)| LaneClaim { lane, most, above: 0 }).collect();
        self.slice_from = slice.last().map_or(0, |claim| claim.lane + 1);
        slice
    }

    /// The newest id that was given out before everything that runs began, as far as milestones tell.
    fn passed(&mut self, oldest_running: i64) -> Option<i64> {
        let passed = |milestone: &mut Milestone| milestone.xid < oldest_running;
        let milestone = self.newest.take_if(passed).or_else(|| self.waiting.take_if(passed))?;
        self.waiting = self.newest.take();
        Some(milestone.newest_id)
    }

    /// What a read has found, lane by lane.
    pub(crate) fn found(&mut self, read: &Read, lanes: &[LaneRead]) {
        for found in lanes {
            if let Some(settled) = read.settles {
                raise(&mut self.settled, found.lane, settled.min(found.up_to));
            }
            // When nothing is known of the lane, it was read from its beginning. What commits below its first
            // row at this very moment waits for a sweep.
            self.lagging.entry(found.lane).or_insert_with(|| found.first.map_or(found.up_to, |id| id - 1));
            raise(&mut self.read, found.lane, found.up_to);
        }
    }

    /// The query of a read, which was of some or all of so many lanes, took so long.
    pub(crate) fn took(&mut self, read: &Read, of: usize, took: Duration, now: Instant) {
        let lanes = read.claims.len();
        if read.start == Start::Beginning {
            let part = FULL_SWEEP_REST.mul_f64(lanes as f64 / of as f64);
            self.next_slice = now + (took * FULL_SWEEP_SHARE).max(part);
            let fitting = lanes as f64 * SLICE.div_duration_f64(took);
            self.slice = (fitting as usize).clamp(1, lanes * 2);
        }
        if read.start != Start::Lagging && lanes == of {
            self.next_sweep = now + took * SWEEP_SHARE;
        }
    }

    /// The query of a read failed, for its length maybe. There must not be nothing but sweeps.
    pub(crate) fn failed(&mut self, read: &Read, took: Duration, now: Instant) {
        (self.next_slice, self.next_sweep) = (now + took, now + took);
        self.slice = (read.claims.len() / 2).max(1);
    }

    /// A transaction with this number began after the last read, and has ended.
    pub(crate) fn wrote(&mut self, xid: i64) {
        let milestone = Milestone { xid, newest_id: self.newest_id };
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
    use super::{Start::*, *};

    const QUICK: Duration = Duration::from_millis(1);
    const SLOW: Duration = Duration::from_millis(640);

    /// A few lanes, of which everything is read each time up to the newest id.
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

        /// Where a read begins, and with which marks.
        fn read(&mut self, newest_id: i64, oldest_running: Option<i64>, took: Duration) -> (Start, Vec<(i16, i64)>) {
            let read = self.marks.next_read(&self.limits, newest_id, oldest_running, self.now);
            assert!(read.claims.iter().all(|claim| claim.most == 50));
            self.now += took;
            self.marks.took(&read, self.limits.len(), took, self.now);
            let found = |claim: &LaneClaim| found(claim.lane, Some(newest_id - 9), newest_id);
            self.marks.found(&read, &read.claims.iter().map(found).collect::<Vec<_>>());
            (read.start, read.claims.iter().map(|claim| (claim.lane, claim.above)).collect())
        }

        /// One lane, settled up to 100 by a transaction numbered 60, and no full sweep for a long time.
        fn settled() -> Self {
            let mut lanes = Self::new(7..8);
            assert_eq!(lanes.read(100, Some(50), QUICK), (Beginning, vec![(7, 0)]));
            lanes.marks.next_slice += SLOW * 10_000;
            lanes.marks.wrote(60);
            assert_eq!(lanes.read(200, Some(61), QUICK), (Settled, vec![(7, 0)]));
            lanes
        }
    }

    fn found(lane: i16, first: Option<i64>, up_to: i64) -> LaneRead {
        LaneRead { lane, first, full: false, up_to }
    }

    #[test]
    fn what_was_drawn_before_everything_that_runs_is_settled() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        assert_eq!(
            lanes.read(300, Some(70), QUICK),
            (Lagging, vec![(7, 100)]),
            "what ran before 70 need not have ended"
        );
        assert_eq!(lanes.read(400, Some(71), QUICK), (Settled, vec![(7, 100)]));
        lanes.marks.wrote(80);
        assert_eq!(lanes.read(500, Some(81), QUICK), (Settled, vec![(7, 200)]), "up to what was drawn before 70 began");
    }

    #[test]
    fn a_read_that_ends_at_its_limit_settles_no_more_than_it_has_seen() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        let read = lanes.marks.next_read(&lanes.limits, 300, Some(71), lanes.now);
        lanes.marks.found(&read, &[LaneRead { full: true, ..found(7, Some(101), 150) }]);
        assert_eq!(lanes.read(400, Some(71), QUICK).1, [(7, 150)]);
    }

    #[test]
    fn a_read_that_passes_over_rows_settles_nothing() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        assert_eq!(lanes.read(300, None, QUICK).1, [(7, 100)]);
        assert_eq!(lanes.read(300, None, QUICK).1, [(7, 100)]);
    }

    #[test]
    fn a_long_transaction_leaves_reads_to_the_lagging_marks_and_sweeps_to_the_settled_ones() {
        let mut lanes = Lanes::settled();
        lanes.marks.wrote(70);
        for _ in 0..4 {
            lanes.passes(LAG / 2).read(300, Some(65), QUICK);
        }
        assert_eq!(lanes.read(400, Some(65), SLOW), (Lagging, vec![(7, 300)]));
        lanes.marks.wrote(80);
        assert_eq!(lanes.read(400, Some(65), SLOW), (Settled, vec![(7, 100)]));
        assert_eq!(lanes.passes(SLOW * 19).read(400, Some(65), QUICK).0, Lagging, "a twentieth of the time");
        assert_eq!(lanes.passes(SLOW).read(400, Some(65), SLOW), (Settled, vec![(7, 100)]));
        lanes.marks.wrote(90);
        assert_eq!(lanes.read(500, Some(91), SLOW), (Settled, vec![(7, 100)]), "it has ended: at once");
        assert_eq!(lanes.read(500, Some(91), SLOW).1, [(7, 400)], "by 90, the newest of ours");
    }

    #[test]
    fn where_somebody_always_writes_the_oldest_milestone_is_passed() {
        let mut lanes = Lanes::settled();
        for xid in 70..90 {
            lanes.marks.wrote(xid);
            lanes.read(xid * 10, Some(xid - 4), QUICK);
        }
        assert_eq!(lanes.marks.settled[&7], 790);
    }

    #[test]
    fn the_first_sweep_says_where_to_begin() {
        let mut lanes = Lanes::new(7..8);
        lanes.read(100, Some(50), SLOW);
        assert_eq!(lanes.read(200, Some(50), QUICK), (Lagging, vec![(7, 90)]));
        assert_eq!(lanes.read(300, Some(50), QUICK), (Lagging, vec![(7, 90)]), "what is read later sets nothing back");
    }

    #[test]
    fn a_full_sweep_that_is_slow_goes_by_slices_and_rests() {
        let mut lanes = Lanes::new(0..64);
        assert_eq!(lanes.read(100, Some(50), SLICE * 64).0, Beginning);
        assert_eq!(lanes.passes(SLICE * 64 * 49).read(100, Some(50), QUICK).1.len(), 64);
        assert_eq!(lanes.passes(SLICE * 64).read(100, Some(50), SLICE), (Beginning, vec![(0, 0)]));
        assert_eq!(lanes.read(100, Some(50), QUICK).1.len(), 64);
        assert_eq!(lanes.passes(SLICE * 50).read(100, Some(50), SLICE / 8), (Beginning, vec![(1, 0)]));
        assert_eq!(lanes.passes(SLICE * 50).read(100, Some(50), SLICE), (Beginning, vec![(2, 0), (3, 0)]));
    }

    #[test]
    fn a_full_sweep_comes_round_in_a_second_where_it_is_quick() {
        let mut lanes = Lanes::new(0..64);
        for _ in 0..3 {
            assert_eq!(lanes.read(100, Some(50), QUICK).0, Beginning);
            assert_ne!(lanes.read(100, Some(50), QUICK).0, Beginning);
            lanes.passes(FULL_SWEEP_REST);
        }
        for lanes_of_slice in [64, 32, 16, 8] {
            assert_eq!(lanes.read(100, Some(50), SLICE * 2).1.len(), lanes_of_slice);
            lanes.passes(SLICE * 100);
        }
    }

    #[test]
    fn a_read_that_fails_leaves_as_much_time_to_others_and_is_not_tried_whole_again() {
        let mut lanes = Lanes::new(0..64);
        let read = lanes.marks.next_read(&lanes.limits, 100, Some(50), lanes.now);
        lanes.now += SLOW;
        lanes.marks.failed(&read, SLOW, lanes.now);
        assert_eq!(lanes.passes(SLOW / 2).read(100, Some(50), QUICK).0, Lagging);
        assert_eq!(lanes.passes(SLOW / 2).read(100, Some(50), QUICK).1.len(), 32);
    }
}

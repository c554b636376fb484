//! From the outbox into the window.

use std::{
    collections::{BTreeMap, HashMap},
    time::Instant,
};

use sqlx::PgConnection;
use tokio::time::timeout_at;

use super::{KILLS_TO_PARK, SILENCE, Worker};
use crate::{
    breaker::Allowance,
    delivery::{self, ClaimFilter, LaneClaim, PendingRow},
    fault_points,
    lanes::Trusted,
    low_marks::LaneRead,
    parking::ParkCause,
    window::Refusal,
};

impl Worker {
    /// Reads what there is room for, and takes it into the window.
    pub(super) async fn admit(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        let now = Instant::now();
        let room = self.settings.batch.saturating_sub(self.window.len());
        if room < self.settings.batch / 4 || (now < self.claim_again_at && !self.wake.has_changed().unwrap_or(false)) {
            return Ok(());
        }
        let allowance = self.breaker.allowance(now);
        if matches!(allowance, Allowance::NothingUntil(_)) {
            return Ok(());
        }
        let limits = self.lane_limits(trusted, room);
        if limits.is_empty() {
            self.claim_again_at = now + self.settings.poll;
            return Ok(());
        }
        let (topics, keys) = (self.topics.expire(now), self.keys.expire(now));
        if !topics.is_empty() || !keys.is_empty() {
            self.marks.reset(now);
        }
        self.publisher.refresh_metadata(topics).await;
        let mut rows = self.read(&limits, allowance == Allowance::Probe).await?;
        if !rows.is_empty() {
            fault_points::reached("relay::claimed");
        }
        let rows = match self.trial_of_first(trusted, &mut rows).await? {
            Some(on_trial) => on_trial,
            None if rows.is_empty() => return Ok(()),
            None if self.may_fly(trusted).await => rows,
            None => {
                self.look_again();
                return Ok(());
            }
        };
        let refused = self.window.admit(rows);
        self.unsendable.extend(refused.into_iter().map(|(row, refusal)| {
            let cause = cause(&row, refusal);
            (row, cause)
        }));
        Ok(())
    }

    /// Rows of these lanes that are not in memory, in the order of their ids; of a `probe` the first alone.
    async fn read(&mut self, limits: &BTreeMap<i16, i64>, probe: bool) -> Result<Vec<PendingRow>, sqlx::Error> {
        // Armed before the query: a commit during it wakes the next step. If it fails, it is made again at once.
        self.wake.borrow_and_update();
        self.claim_again_at = Instant::now();
        let filter = ClaimFilter {
            known_ids: self.window.row_ids(),
            paused_topics: self.topics.names(),
            held_keys: self.keys.names(),
        };
        let marks = &mut self.marks;
        let reading = async |conn: &mut PgConnection| {
            let horizon = delivery::horizon(conn).await?;
            let asked = Instant::now();
            let oldest_running = (!filter.passes_over_rows()).then_some(horizon.oldest_running);
            let read = marks.next_read(limits, horizon.newest_id, oldest_running, asked);
            let claimed = delivery::claim(conn, &read.claims, &filter).await;
            if claimed.is_err() {
                marks.failed(&read, asked.elapsed(), Instant::now());
            }
            Ok::<_, sqlx::Error>((horizon, asked, read, claimed?))
        };
        let (horizon, asked, read, mut rows) = self.db.lend(self.settings.lease.max(SILENCE), reading).await?;
        self.marks.took(&read, limits.len(), asked.elapsed(), Instant::now());
        let found = lane_reads(&read.claims, &rows, horizon.newest_id);
        let more = read.claims.len() < limits.len() || found.iter().any(|lane| lane.full);
        self.claim_again_at = if more { asked } else { asked + self.settings.poll };
        match probe {
            true => rows.truncate(1),
            false => self.marks.found(&read, &found),
        }
        Ok(rows)
    }

    /// Whether no other worker of this process has a row on trial, or waits to have one. Asked anew for
    /// every batch: who waits for a trial waits until what is in flight has landed, and no longer.
    async fn may_fly(&mut self, trusted: &Trusted) -> bool {
        let trials = self.trials.clone();
        self.flying = if self.window.len() == 0 {
            self.flying = None;
            timeout_at(trusted.until.into(), trials.read_owned()).await.ok()
        } else {
            match trials.try_read_owned() {
                Ok(flying) => Some(flying),
                Err(_) => return false,
            }
        };
        self.flying.is_some()
    }

    /// Rows that were read are left where they are for now.
    pub(super) fn look_again(&mut self) {
        self.marks.reset(Instant::now());
        self.claim_again_at = Instant::now();
    }

    /// How many rows may be read of each lane: an equal part of the room, and of a suspected lane no
    /// more than its limit leaves.
    fn lane_limits(&self, trusted: &Trusted, room: usize) -> BTreeMap<i16, i64> {
        let open = || trusted.lanes.iter().filter(|(_, held)| !held.draining);
        let part = room.div_ceil(open().count().max(1)) as i64;
        open()
            .map(|(&lane, held)| match held.limit {
                None => (lane, part),
                Some(limit) => (lane, (i64::from(limit) - self.window.len_of_lane(lane) as i64).min(part)),
            })
            .filter(|&(_, limit)| limit > 0)
            .collect()
    }

    /// A row of a lane that is down to one row at a time is on trial: it is written down and sent with
    /// nothing else of this process in flight, of any lane, or a death would be charged to rows that
    /// merely flew at the same time. One that was the last thing two relays did is parked.
    ///
    /// `None` when no row is from such a lane; else what may be sent now, which may be nothing yet.
    async fn trial_of_first(
        &mut self,
        trusted: &Trusted,
        rows: &mut Vec<PendingRow>,
    ) -> Result<Option<Vec<PendingRow>>, sqlx::Error> {
        let down_to_one = |row: &PendingRow| trusted.lanes.get(&row.lane).is_some_and(|held| held.limit == Some(1));
        let Some(first) = rows.iter().position(down_to_one) else { return Ok(None) };
        let row = rows.swap_remove(first);
        self.look_again();
        let Some(lane) = trusted.term(row.lane).filter(|_| self.window.len() == 0) else { return Ok(Some(vec![])) };
        self.flying = None;
        let alone = timeout_at(trusted.until.into(), self.trials.clone().write_owned()).await;
        let Ok(alone) = alone else { return Ok(Some(vec![])) };
        let (relay_id, row_id) = (trusted.relay_id, row.id);
        match self.with_connection(async |conn| delivery::suspect(conn, relay_id, lane, row_id).await).await? {
            Some(kills) if kills >= KILLS_TO_PARK => {
                let reason = format!(
                    "the relay died {kills} times while this row alone was in flight; look at its payload and at the relay's last log lines before replaying it"
                );
                self.unsendable.push((row, ParkCause::Unsendable(reason)));
                Ok(Some(vec![]))
            }
            Some(_) => {
                self.on_trial = Some(alone);
                Ok(Some(vec![row]))
            }
            None => Ok(Some(vec![])),
        }
    }
}

/// What these rows, which are in the order of their ids, tell of the lanes they were read from. No id
/// above `newest_id` existed then.
fn lane_reads(claims: &[LaneClaim], rows: &[PendingRow], newest_id: i64) -> Vec<LaneRead> {
    let mut ids: HashMap<i16, Vec<i64>> = HashMap::new();
    rows.iter().for_each(|row| ids.entry(row.lane).or_default().push(row.id));
    let read = |claim: &LaneClaim| {
        let ids = ids.get(&claim.lane).map_or(&[][..], Vec::as_slice);
        let (first, last) = (ids.first().copied(), ids.last().copied());
        let full = ids.len() as i64 >= claim.most;
        LaneRead { lane: claim.lane, first, full, up_to: last.filter(|_| full).unwrap_or(newest_id) }
    };
    claims.iter().map(read).collect()
}

/// Why a row that the window refused is to be parked.
fn cause(row: &PendingRow, refusal: Refusal) -> ParkCause {
    match refusal {
        Refusal::Behind => ParkCause::Behind,
        Refusal::Gap { expected } => ParkCause::Gap(format!(
            "sequence gap: message {} of this key came before message {expected} was out; a row was removed from the outbox by hand, or written without the library",
            row.seq
        )),
        Refusal::Stale => ParkCause::Stale(format!(
            "message {} of this key came when message {} was out already; a row was put back into the outbox by hand, or written without the library. Nothing waits for it: replay the archived row instead, and delete this one",
            row.seq, row.published_seq
        )),
    }
}

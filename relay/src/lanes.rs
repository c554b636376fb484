//! Who owns which lane. The database decides by its own clock; this process trusts what it was
//! told for a little less long, counted from before it asked, so that clocks need not agree.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::{delivery::LaneTerm, fault_points, message::LANES};

/// How many groups of lanes have a fence each, where relays fence each other off. A constant: two relays
/// that disagreed about it would not stand behind the same fences.
pub const FENCES: usize = 8;

/// This process's view of its lanes, shared by the lease keeper and the workers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Ownership(Arc<Mutex<Held>>);

#[derive(Debug, Default)]
struct Held {
    relay_id: Uuid,
    trusted_until: Option<Instant>,
    lanes: BTreeMap<i16, Lane>,
    paused: bool,
}

/// A lane this process owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Lane {
    pub term: i64,
    /// How many rows may be in flight while the lane is under suspicion.
    pub limit: Option<i32>,
    /// To be handed over as soon as nothing of it is in flight.
    pub draining: bool,
}

impl Ownership {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The lanes of one worker (every `workers`th one), and until when they may be trusted. `None`
    /// when trust has run out: whatever is in flight must be given up.
    pub(crate) fn lanes_of(&self, worker: usize, workers: usize) -> Option<Trusted> {
        let held = self.held();
        let until = held.trusted_until.filter(|&until| Instant::now() < until)?;
        let lanes = held.lanes.iter().filter(|(lane, _)| **lane as usize % workers == worker);
        Some(Trusted {
            relay_id: held.relay_id,
            until,
            lanes: lanes.map(|(lane, is)| (*lane, *is)).collect(),
            paused: held.paused,
        })
    }

    /// How many lanes this process owns now.
    pub(crate) fn count(&self) -> usize {
        self.held().lanes.len()
    }

    /// The worker learnt that a suspected lane behaves.
    pub(crate) fn set_limit(&self, lane: i16, term: i64, limit: Option<i32>) {
        if let Some(held) = self.held().lanes.get_mut(&lane).filter(|held| held.term == term) {
            held.limit = limit;
        }
    }

    /// These lanes may be somebody else's by now.
    pub(crate) fn forget(&self, lanes: impl Iterator<Item = i16>) {
        let mut held = self.held();
        lanes.for_each(|lane| {
            held.lanes.remove(&lane);
        });
    }

    /// Gives one drained lane to whoever wants it.
    pub(crate) async fn hand_over(
        &self,
        conn: &mut PgConnection,
        relay_id: Uuid,
        lane: LaneTerm,
    ) -> Result<(), sqlx::Error> {
        sqlx::query("update outbox_lanes set owner = null, clean = true where lane = $1 and term = $2 and owner = $3")
            .bind(lane.lane)
            .bind(lane.term)
            .bind(relay_id)
            .execute(conn)
            .await?;
        self.held().lanes.remove(&lane.lane);
        Ok(())
    }

    /// A worker of this process died: its lanes come under suspicion as if the process had.
    pub(crate) async fn accuse(
        &self,
        conn: &mut PgConnection,
        worker: usize,
        workers: usize,
        batch: usize,
    ) -> Result<(), sqlx::Error> {
        let Some(trusted) = self.lanes_of(worker, workers) else { return Ok(()) };
        sqlx::query(
            "update outbox_lanes
                set attempt_limit = greatest(1, coalesce(attempt_limit, $3) / 8),
                    suspect_kills = suspect_kills + case when on_trial then 1 else 0 end, on_trial = false
              where owner = $1 and lane = any($2)",
        )
        .bind(trusted.relay_id)
        .bind(trusted.lanes.keys().copied().collect::<Vec<_>>())
        .bind(i32::try_from(batch).unwrap_or(i32::MAX))
        .execute(conn)
        .await?;
        Ok(())
    }

    fn forget_all(&self) {
        *self.held() = Held::default();
    }
}

/// What a worker may rely on for now.
#[derive(Debug)]
pub(crate) struct Trusted {
    pub relay_id: Uuid,
    pub until: Instant,
    pub lanes: BTreeMap<i16, Lane>,
    /// An operator has paused all relays.
    pub paused: bool,
}

impl Trusted {
    /// The lane with its term, if it is owned.
    pub(crate) fn term(&self, lane: i16) -> Option<LaneTerm> {
        self.lanes.get(&lane).map(|held| LaneTerm { lane, term: held.term })
    }
}

/// Takes, keeps and gives back lanes for one process.
pub(crate) struct LeaseKeeper {
    pub ownership: Ownership,
    name: String,
    lease: Duration,
    batch: i32,
    /// Lanes that leave the same rest divided by this have one owner together.
    groups: i16,
    relay_id: Option<Uuid>,
}

impl LeaseKeeper {
    pub(crate) fn new(ownership: Ownership, name: String, lease: Duration, batch: usize, groups: i16) -> Self {
        let batch = i32::try_from(batch).unwrap_or(i32::MAX);
        Self { ownership, name, lease, batch, groups, relay_id: None }
    }

    /// One round: renew the lease (or make a new one), clear away relays whose lease ran out, take
    /// free lanes up to a fair share, mark what is above it for hand-over.
    pub(crate) async fn tick(&mut self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        let asked_at = Instant::now();
        let relay_id = self.renew_or_register(conn).await?;
        let mut tx = conn.begin().await?;
        // Deleting the row frees its lanes (on delete set null). A renewal that got in first makes
        // this a no-op: the condition is looked at again after the row lock.
        sqlx::query("delete from outbox_relays where lease_until < clock_timestamp()").execute(&mut *tx).await?;
        let relays: i64 = sqlx::query_scalar("select count(*) from outbox_relays").fetch_one(&mut *tx).await?;
        let share = fair_share(relays, self.groups);
        let groups: Vec<i16> =
            sqlx::query_scalar("select distinct lane % $2 from outbox_lanes where owner = $1 order by 1")
                .bind(relay_id)
                .bind(self.groups)
                .fetch_all(&mut *tx)
                .await?;
        let kept = &groups[..groups.len().min(share)];
        // A group may have lost lanes while it was being handed over, and be to stay now.
        if kept.len() < share || self.groups < LANES {
            self.take_free_lanes(&mut tx, relay_id, kept, (share - kept.len()) as i64).await?;
        }
        let lanes: Vec<(i16, i64, Option<i32>)> = sqlx::query_as(
            "select lane, term, attempt_limit from outbox_lanes where owner = $1 order by lane % $2, lane",
        )
        .bind(relay_id)
        .bind(self.groups)
        .fetch_all(&mut *tx)
        .await?;
        let paused: bool =
            sqlx::query_scalar("select paused_at is not null from outbox_control").fetch_one(&mut *tx).await?;
        tx.commit().await?;
        if !lanes.is_empty() {
            fault_points::reached("relay::lanes_taken");
        }

        let trusted_until = asked_at + self.lease - self.lease / 5;
        let mut held = self.ownership.held();
        held.relay_id = relay_id;
        held.trusted_until = Some(trusted_until);
        held.paused = paused;
        let mut groups: Vec<i16> = lanes.iter().map(|(lane, ..)| lane % self.groups).collect();
        groups.dedup();
        let draining = |lane: i16| groups.iter().skip(share).any(|group| *group == lane % self.groups);
        let lane = |(lane, term, limit)| (lane, Lane { term, limit, draining: draining(lane) });
        held.lanes = lanes.into_iter().map(lane).collect();
        Ok(())
    }

    async fn renew_or_register(&mut self, conn: &mut PgConnection) -> Result<Uuid, sqlx::Error> {
        if let Some(relay_id) = self.relay_id {
            let renewed = sqlx::query(
                "update outbox_relays set lease_until = clock_timestamp() + make_interval(secs => $2)
                  where id = $1",
            )
            .bind(relay_id)
            .bind(self.lease.as_secs_f64())
            .execute(&mut *conn)
            .await?;
            if renewed.rows_affected() == 1 {
                return Ok(relay_id);
            }
            tracing::warn!(relay.id = %relay_id, "lease lost: another relay has taken the lanes; starting over");
            metrics::counter!("outbox_leases_lost_total").increment(1);
            self.ownership.forget_all();
        }
        // A new identity for every lease: what an earlier one still does can't be mistaken for ours.
        let relay_id = Uuid::now_v7();
        sqlx::query(
            "insert into outbox_relays (id, name, lease_until)
             values ($1, $2, clock_timestamp() + make_interval(secs => $3))",
        )
        .bind(relay_id)
        .bind(&self.name)
        .bind(self.lease.as_secs_f64())
        .execute(conn)
        .await?;
        self.relay_id = Some(relay_id);
        Ok(relay_id)
    }

    /// A lane whose last owner gave it back is clean. One whose owner vanished may hold the row that
    /// killed it: its new owner goes on with an eighth of what was in flight, down to one row, and a
    /// row that was alone in flight is charged with the death.
    ///
    /// A group of lanes is taken whole or not at all. One relay takes lanes at a time: two that pass over
    /// each other's locked rows would each come by a part of a group.
    async fn take_free_lanes(
        &self,
        conn: &mut PgConnection,
        relay_id: Uuid,
        kept: &[i16],
        more: i64,
    ) -> Result<(), sqlx::Error> {
        // Nobody waits for his turn: a relay frozen in the middle of its own would keep all the others from
        // renewing the trust in what they have.
        let mine = sqlx::query("select from outbox_control for update skip locked").fetch_optional(&mut *conn).await?;
        if mine.is_none() {
            return Ok(());
        }
        let taken: Vec<(i16, Option<i32>)> = sqlx::query_as(
            "update outbox_lanes l
                set owner = $1, term = term + 1, clean = false,
                    attempt_limit = case when clean then attempt_limit
                                         else greatest(1, coalesce(attempt_limit, $3) / 8) end,
                    suspect_kills = suspect_kills + case when not clean and on_trial then 1 else 0 end,
                    on_trial = false
               from (select lane from outbox_lanes
                      where owner is null
                        and (lane % $4 = any($5)
                             or lane % $4 in (select lane % $4 from outbox_lanes
                                               group by lane % $4 having bool_and(owner is null)
                                               order by lane % $4 limit $2))
                        for update skip locked) free
              where l.lane = free.lane
             returning l.lane, l.attempt_limit",
        )
        .bind(relay_id)
        .bind(more)
        .bind(self.batch)
        .bind(self.groups)
        .bind(kept)
        .fetch_all(conn)
        .await?;
        let suspected = taken.iter().filter(|(_, limit)| limit.is_some()).count();
        if !taken.is_empty() {
            tracing::info!(relay.id = %relay_id, lanes = taken.len(), suspected, "took lanes");
        }
        Ok(())
    }

    /// Gives everything back, at the end of an orderly stop: nothing is in flight any more.
    pub(crate) async fn resign(&mut self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        let Some(relay_id) = self.relay_id.take() else { return Ok(()) };
        self.ownership.forget_all();
        let mut tx = conn.begin().await?;
        sqlx::query("update outbox_lanes set owner = null, clean = true where owner = $1")
            .bind(relay_id)
            .execute(&mut *tx)
            .await?;
        sqlx::query("delete from outbox_relays where id = $1").bind(relay_id).execute(&mut *tx).await?;
        tx.commit().await
    }
}

/// What a group of lanes is called at the broker. It belongs to this database alone, however often it was
/// copied, and stays with it when a standby takes over.
pub(crate) async fn fence_name(conn: &mut PgConnection, group: usize) -> Result<String, sqlx::Error> {
    sqlx::query_scalar(
        "select format('outbox.%s.%s.%s-of-%s', (select system_identifier from pg_control_system()), oid, $1, $2)
           from pg_database where datname = current_database()",
    )
    .bind(group as i64)
    .bind(FENCES as i64)
    .fetch_one(conn)
    .await
}

/// How many groups of lanes each of `relays` processes may own: rounded up, so that none stays unowned.
fn fair_share(relays: i64, groups: i16) -> usize {
    usize::from(groups.unsigned_abs()).div_ceil(usize::try_from(relays).unwrap_or(1).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_all_lanes_however_many_relays_there_are() {
        for relays in 1..=100_i64 {
            for groups in [LANES, FENCES as i16] {
                assert!(fair_share(relays, groups) as i64 * relays >= i64::from(groups), "{relays}");
            }
        }
        assert_eq!([0, 1, 3, 64, 65].map(|relays| fair_share(relays, LANES)), [64, 64, 22, 1, 1]);
        assert_eq!([0, 1, 3, 8, 9].map(|relays| fair_share(relays, FENCES as i16)), [8, 8, 3, 1, 1]);
    }

    #[test]
    fn trust_runs_out_by_itself() {
        let ownership = Ownership::default();
        assert!(ownership.lanes_of(0, 1).is_none(), "nothing was ever granted");
        ownership.held().trusted_until = Some(Instant::now() + Duration::from_secs(60));
        assert!(ownership.lanes_of(0, 1).is_some());
        ownership.held().trusted_until = Some(Instant::now() - Duration::from_millis(1));
        assert!(ownership.lanes_of(0, 1).is_none());
    }
}

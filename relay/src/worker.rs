//! One worker: reads ([`reading`]), sends and collects reports ([`sending`]), settles ([`fencing`]), archives and
//! parks ([`archiving`]).
//! [`Worker::step`] is the unit; the loop around it only decides how long to rest.

mod archiving;
mod fencing;
mod reading;
mod sending;

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::PgConnection;
use tokio::sync::{OwnedRwLockReadGuard, OwnedRwLockWriteGuard, RwLock, watch};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::fencing::Fence;
use crate::{
    breaker::{Allowance, Breaker},
    database::Database,
    delivery::{self, LaneTerm, PendingRow, SentRow},
    holds::Holds,
    lanes::{Ownership, Trusted},
    logging::Throttle,
    low_marks::LowMarks,
    parking::ParkCause,
    publisher::Publisher,
    relay::{RelaySettings, jitter},
    renewal::Renewal,
    window::Window,
};

/// How long reports are collected before what is there is archived: long enough to archive many
/// rows in one transaction, short enough not to show.
const COLLECT: Duration = Duration::from_millis(20);
/// Longest a statement may take where the lease is shorter: a sweep under a held snapshot takes seconds.
const SILENCE: Duration = Duration::from_secs(40);
/// Between two looks whether the operator lets the relay go on.
const PAUSED_REST: Duration = Duration::from_millis(100);
/// Rest after the database failed.
const DATABASE_REST: Duration = Duration::from_millis(500);
/// A row that was alone in flight when two owners of its lane died is taken to be the cause.
const KILLS_TO_PARK: i16 = 2;

pub(crate) struct Worker {
    index: usize,
    settings: Arc<RelaySettings>,
    db: Database,
    ownership: Ownership,
    publisher: Publisher,
    fence: Fence,
    fence_down_since: Option<Instant>,
    fence_lines: Throttle,
    wake: watch::Receiver<()>,

    relay_id: Uuid,
    /// How often trust has run out.
    reign: u64,
    /// Terms under which the rows in the window were read.
    terms: HashMap<i16, i64>,
    window: Window,
    /// Acknowledged, not archived yet.
    sent: Vec<SentRow>,
    /// To be parked once everything before them is archived.
    unsendable: Vec<(PendingRow, ParkCause)>,
    /// Suspected lanes whose row came back with an error: whatever it is, it did not kill us.
    survived: HashSet<i16>,
    /// Rows that were refused for what they are, in a batch that was refused for one of them.
    refused: HashSet<i64>,
    /// The row in flight is one of those, and nothing else may be.
    alone: bool,
    breaker: Breaker,
    renewal: Renewal,
    topics: Holds,
    /// What is logged of paused topics, by their names: few, since they come from the programs that append.
    topic_lines: Throttle<String>,
    keys: Holds,
    marks: LowMarks,
    claim_again_at: Instant,
    /// Shared by the workers of a process: read by those who send, written by who has a row on trial.
    trials: Arc<RwLock<()>>,
    /// Held while the window has rows.
    flying: Option<OwnedRwLockReadGuard<()>>,
    /// Held while the window has the one row that is on trial.
    on_trial: Option<OwnedRwLockWriteGuard<()>>,
    /// Rows that were on trial when the lease ran out, and did not kill us.
    acquitted: Vec<i64>,
}

/// What a step came to.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    /// There may be more to do right away.
    Busy,
    /// Nothing to do until a wake-up or the poll.
    Idle,
    /// Nothing may be done before this moment, wake-ups or not.
    RestUntil(Instant),
}

impl Worker {
    pub(crate) fn new(
        index: usize,
        settings: Arc<RelaySettings>,
        db: Database,
        ownership: Ownership,
        publisher: Publisher,
        wake: watch::Receiver<()>,
        trials: Arc<RwLock<()>>,
    ) -> Self {
        let now = Instant::now();
        Self {
            index,
            db,
            ownership,
            publisher,
            fence: if settings.fencing { Fence::Down } else { Fence::Up },
            fence_down_since: None,
            fence_lines: Throttle::new(),
            settings,
            wake,
            relay_id: Uuid::nil(),
            reign: 0,
            terms: HashMap::new(),
            window: Window::default(),
            sent: Vec::new(),
            unsendable: Vec::new(),
            survived: HashSet::new(),
            refused: HashSet::new(),
            alone: false,
            breaker: Breaker::default(),
            renewal: Renewal::default(),
            topics: Holds::default(),
            topic_lines: Throttle::new(),
            keys: Holds::default(),
            marks: LowMarks::new(now),
            claim_again_at: now,
            trials,
            flying: None,
            on_trial: None,
            acquitted: Vec::new(),
        }
    }

    /// Until `shutdown`, and then until nothing is in flight any more, one lease at the most.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut stop_by = None;
        loop {
            if shutdown.is_cancelled() {
                let stop_by = *stop_by.get_or_insert(Instant::now() + self.settings.lease);
                if self.window.in_flight() == 0 && self.sent.is_empty() {
                    break;
                }
                if Instant::now() > stop_by {
                    let rows = self.window.len();
                    tracing::warn!(
                        worker = self.index,
                        rows,
                        "stopping after a whole lease: giving up what is in flight"
                    );
                    break;
                }
            }
            let rest_until = match self.step(stop_by.is_some()).await {
                Ok(Outcome::Busy) => {
                    // Whatever keeps this loop busy must not keep the lease keeper from its turn.
                    tokio::task::yield_now().await;
                    continue;
                }
                Ok(Outcome::Idle) => {
                    let poll = self.settings.poll.mul_f64(0.75 + jitter() / 2.0);
                    tokio::select! {
                        _ = self.wake.changed() => {}
                        () = tokio::time::sleep(poll) => {}
                        () = shutdown.cancelled(), if stop_by.is_none() => {}
                    }
                    self.claim_again_at = Instant::now();
                    continue;
                }
                Ok(Outcome::RestUntil(until)) => until,
                Err(error) => {
                    tracing::warn!(worker = self.index, %error, "the outbox can't be read or written; trying again");
                    metrics::counter!("outbox_database_errors_total").increment(1);
                    Instant::now() + DATABASE_REST
                }
            };
            tokio::select! {
                () = tokio::time::sleep_until(rest_until.into()) => {}
                () = shutdown.cancelled(), if stop_by.is_none() => {}
            }
        }
        // Dropping a producer purges it and waits for its thread; nobody has to wait for that.
        std::thread::spawn(move || drop(self.publisher));
    }

    /// A database that has fallen silent must not keep lanes whose lease is renewed elsewhere: an
    /// answer that does not come is an error. Nothing is lost by it: rows stay in the outbox until the
    /// archive has them, and what was read is read again.
    async fn with_connection<T>(
        &self,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, sqlx::Error>,
    ) -> Result<T, sqlx::Error> {
        self.db.lend(self.settings.lease.max(SILENCE), work).await
    }

    async fn step(&mut self, stopping: bool) -> Result<Outcome, sqlx::Error> {
        let Some(trusted) = self.ownership.lanes_of(self.index, self.settings.workers) else {
            self.surrender();
            return Ok(Outcome::RestUntil(Instant::now() + Duration::from_millis(100)));
        };
        self.follow_ownership(&trusted);
        self.acquit().await?;
        if !self.fence_is_up(&trusted).await? {
            return Ok(self.outcome(trusted.paused));
        }
        if !stopping && !trusted.paused {
            self.admit(&trusted).await?;
            self.send_ready(&trusted);
        }
        self.collect_reports(&trusted, stopping || trusted.paused).await;
        self.settle(&trusted).await;
        self.archive(&trusted).await?;
        self.renew_producer();
        self.park_unsendable(&trusted).await?;
        self.hand_over_drained(&trusted).await?;
        if self.window.len() == 0 {
            (self.flying, self.on_trial) = (None, None);
        }
        Ok(self.outcome(trusted.paused))
    }

    fn outcome(&self, paused: bool) -> Outcome {
        if self.window.in_flight() > 0 || !self.sent.is_empty() {
            return Outcome::Busy;
        }
        if paused {
            return Outcome::RestUntil(Instant::now() + PAUSED_REST);
        }
        if self.window.has_ready() {
            return Outcome::Busy;
        }
        match self.breaker.allowance(Instant::now()) {
            Allowance::NothingUntil(until) => Outcome::RestUntil(until),
            _ if Instant::now() >= self.claim_again_at => Outcome::Busy,
            _ => Outcome::Idle,
        }
    }

    /// Trust has run out: whatever another relay may own by now must not be sent any more.
    fn surrender(&mut self) {
        if self.window.len() > 0 {
            tracing::warn!(
                worker = self.index,
                rows = self.window.len(),
                "lease not renewed in time: giving up what is in flight"
            );
            if !self.settings.fencing {
                self.publisher.purge();
            }
            while self.publisher.report_now().is_some() {}
        }
        self.reign += 1;
        if self.on_trial.is_some() {
            self.acquitted.extend(self.window.row_ids());
        }
        self.window.clear();
        self.sent.clear();
        self.unsendable.clear();
        self.refused.clear();
        self.terms.clear();
        self.break_transaction();
        (self.flying, self.on_trial) = (None, None);
        self.marks.reset(Instant::now());
        self.claim_again_at = Instant::now();
    }

    /// A relay that was taken for dead and lives did not die of the row it had on trial. Whoever has the lane
    /// now must not park it for that.
    async fn acquit(&mut self) -> Result<(), sqlx::Error> {
        while let Some(&row_id) = self.acquitted.last() {
            self.with_connection(async |conn| delivery::acquit(conn, row_id).await).await?;
            self.acquitted.pop();
        }
        Ok(())
    }

    /// Forgets rows of lanes that are not ours any more, or are ours again under a new term.
    fn follow_ownership(&mut self, trusted: &Trusted) {
        if self.relay_id != trusted.relay_id {
            self.surrender();
            self.relay_id = trusted.relay_id;
        }
        let lost: Vec<i16> = self
            .terms
            .iter()
            .filter(|&(&lane, &term)| trusted.lanes.get(&lane).is_none_or(|held| held.term != term))
            .map(|(&lane, _)| lane)
            .collect();
        let rows: usize = lost.iter().map(|&lane| self.window.len_of_lane(lane)).sum();
        if rows > 0 {
            tracing::warn!(worker = self.index, rows, lanes = ?lost, "lanes lost: giving up what is in flight");
        }
        for lane in lost {
            self.terms.remove(&lane);
            self.window.evict_lane(lane);
            self.sent.retain(|row| row.lane != lane);
        }
        if trusted.lanes.keys().any(|lane| !self.terms.contains_key(lane)) {
            self.terms = trusted.lanes.iter().map(|(&lane, held)| (lane, held.term)).collect();
            self.marks.reset(Instant::now());
            self.claim_again_at = Instant::now();
        }
    }

    async fn hand_over_drained(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        for (&lane, held) in trusted.lanes.iter().filter(|(_, held)| held.draining) {
            if self.window.len_of_lane(lane) == 0 {
                let lane = LaneTerm { lane, term: held.term };
                let ownership = &self.ownership;
                self.with_connection(async |conn| ownership.hand_over(conn, trusted.relay_id, lane).await).await?;
            }
        }
        Ok(())
    }
}

//! One worker: reads, sends, collects reports, archives. [`Worker::step`] is the unit; the loop
//! around it only decides how long to rest.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use sqlx::postgres::PgPool;
use tokio::{sync::watch, time::timeout_at};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    breaker::{Allowance, Breaker},
    delivery::{self, ClaimFilter, LaneTerm, ParkCause, PendingRow, SentRow},
    fault::Fault,
    holds::Holds,
    lanes::{Ownership, Trusted},
    low_marks::LowMarks,
    publisher::{Failure, NotEnqueued, Publisher, Report},
    relay::{RelaySettings, jitter},
    window::{Refusal, Window},
};

/// How long reports are collected before what is there is archived: long enough to archive many
/// rows in one transaction, short enough not to show.
const COLLECT: Duration = Duration::from_millis(20);
/// Rest after the database failed.
const DATABASE_REST: Duration = Duration::from_millis(500);
/// A row that was alone in flight when two owners of its lane died is taken to be the cause.
const KILLS_TO_PARK: i16 = 2;

pub(crate) struct Worker {
    index: usize,
    settings: Arc<RelaySettings>,
    pool: PgPool,
    ownership: Ownership,
    publisher: Publisher,
    wake: watch::Receiver<()>,

    relay_id: Uuid,
    /// Terms under which the rows in the window were read.
    terms: HashMap<i16, i64>,
    window: Window,
    /// Acknowledged, not archived yet.
    sent: Vec<SentRow>,
    /// To be parked once everything before them is archived.
    unsendable: Vec<(PendingRow, String)>,
    breaker: Breaker,
    topics: Holds,
    keys: Holds,
    marks: LowMarks,
    claim_again_at: Instant,
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
        pool: PgPool,
        ownership: Ownership,
        publisher: Publisher,
        wake: watch::Receiver<()>,
    ) -> Self {
        let now = Instant::now();
        Self {
            index,
            settings,
            pool,
            ownership,
            publisher,
            wake,
            relay_id: Uuid::nil(),
            terms: HashMap::new(),
            window: Window::default(),
            sent: Vec::new(),
            unsendable: Vec::new(),
            breaker: Breaker::default(),
            topics: Holds::default(),
            keys: Holds::default(),
            marks: LowMarks::new(now),
            claim_again_at: now,
        }
    }

    /// Until `shutdown`, and then until nothing is in flight any more, one lease at the most.
    pub(crate) async fn run(mut self, shutdown: CancellationToken) {
        let mut stop_by = None;
        loop {
            if shutdown.is_cancelled() {
                let stop_by = *stop_by.get_or_insert(Instant::now() + self.settings.lease);
                let quiet = self.window.in_flight() == 0 && self.sent.is_empty();
                if quiet || Instant::now() > stop_by {
                    break;
                }
            }
            let rest_until = match self.step(stop_by.is_some()).await {
                Ok(Outcome::Busy) => continue,
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

    async fn step(&mut self, stopping: bool) -> Result<Outcome, sqlx::Error> {
        let Some(trusted) = self.ownership.lanes_of(self.index, self.settings.workers) else {
            self.surrender();
            return Ok(Outcome::RestUntil(Instant::now() + Duration::from_millis(100)));
        };
        self.follow_ownership(&trusted);
        if !stopping && !trusted.paused {
            self.admit(&trusted).await?;
            self.send_ready();
        }
        self.collect_reports(&trusted, stopping || trusted.paused).await;
        self.archive(&trusted).await?;
        self.park_unsendable(&trusted).await?;
        self.hand_over_drained(&trusted).await?;
        Ok(self.outcome())
    }

    fn outcome(&self) -> Outcome {
        if self.window.in_flight() > 0 || self.window.has_ready() || !self.sent.is_empty() {
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
            self.publisher.purge();
            while self.publisher.report_now().is_some() {}
        }
        self.window.clear();
        self.sent.clear();
        self.unsendable.clear();
        self.terms.clear();
        self.marks.reset(Instant::now());
        self.claim_again_at = Instant::now();
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

    /// Reads what there is room for, and takes it into the window.
    async fn admit(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        let now = Instant::now();
        let room = self.settings.batch.saturating_sub(self.window.len());
        if room < self.settings.batch / 4 || (now < self.claim_again_at && !self.wake.has_changed().unwrap_or(false)) {
            return Ok(());
        }
        let allowance = self.breaker.allowance(now);
        if matches!(allowance, Allowance::NothingUntil(_)) {
            return Ok(());
        }
        let (lanes, limits) = self.lane_limits(trusted, room);
        if lanes.is_empty() {
            self.claim_again_at = now + self.settings.poll;
            return Ok(());
        }
        if self.topics.expire(now) | self.keys.expire(now) {
            self.marks.reset(now);
        }
        // Armed before the query: a commit during it wakes the next step.
        self.wake.borrow_and_update();
        let (low, sweep) = self.marks.marks(&lanes, now);
        let filter = ClaimFilter {
            known_ids: self.window.row_ids(),
            paused_topics: self.topics.names(),
            held_keys: self.keys.names(),
        };
        let mut conn = self.pool.acquire().await?;
        let mut rows = delivery::claim(&mut conn, &lanes, &low, &limits, &filter).await?;
        drop(conn);
        if sweep {
            self.marks.swept(Instant::now(), now.elapsed());
        }
        // A lane that gave as many rows as it might has more.
        let full = rows.len() >= lanes.len().min(room) && !rows.is_empty();
        self.claim_again_at = if full { now } else { now + self.settings.poll };
        if allowance == Allowance::Probe {
            rows.truncate(1);
        } else {
            rows.iter().for_each(|row| self.marks.read_up_to(row.lane, row.id));
        }
        let rows = self.charge_suspects(trusted, rows).await?;
        let refused = self.window.admit(rows);
        self.refuse(trusted, refused).await
    }

    /// How many rows may be read of each lane: an equal part of the room, and of a suspected lane no
    /// more than its limit leaves.
    fn lane_limits(&self, trusted: &Trusted, room: usize) -> (Vec<i16>, Vec<i64>) {
        let open = || trusted.lanes.iter().filter(|(_, held)| !held.draining);
        let part = room.div_ceil(open().count().max(1)) as i64;
        open()
            .map(|(&lane, held)| match held.limit {
                None => (lane, part),
                Some(limit) => (lane, (i64::from(limit) - self.window.len_of_lane(lane) as i64).min(part)),
            })
            .filter(|&(_, limit)| limit > 0)
            .unzip()
    }

    /// In a lane that is down to one row at a time, that row is written down before it is sent, and
    /// parked when it has been the last thing two relays did.
    async fn charge_suspects(
        &mut self,
        trusted: &Trusted,
        rows: Vec<PendingRow>,
    ) -> Result<Vec<PendingRow>, sqlx::Error> {
        let mut cleared = Vec::with_capacity(rows.len());
        for row in rows {
            let alone = trusted.lanes.get(&row.lane).is_some_and(|held| held.limit == Some(1));
            let Some(lane) = trusted.term(row.lane).filter(|_| alone) else {
                cleared.push(row);
                continue;
            };
            let mut conn = self.pool.acquire().await?;
            match delivery::suspect(&mut conn, trusted.relay_id, lane, row.id).await? {
                Some(kills) if kills >= KILLS_TO_PARK => {
                    let reason = format!(
                        "the relay died {kills} times while this row alone was in flight; look at its payload and at the relay's last log lines before replaying it"
                    );
                    self.unsendable.push((row, reason));
                }
                Some(_) => cleared.push(row),
                None => {}
            }
        }
        Ok(cleared)
    }

    async fn refuse(&mut self, trusted: &Trusted, refused: Vec<(PendingRow, Refusal)>) -> Result<(), sqlx::Error> {
        for (row, refusal) in refused {
            match refusal {
                Refusal::Behind => {
                    if let Some(lane) = trusted.term(row.lane) {
                        let mut conn = self.pool.acquire().await?;
                        delivery::park(&mut conn, trusted.relay_id, lane, &row.key, &ParkCause::Behind).await?;
                    }
                }
                Refusal::Gap { expected } => {
                    let reason = format!(
                        "sequence gap: message {} of this key came before message {expected} was out; a row was removed from the outbox by hand, or written without the library",
                        row.seq
                    );
                    self.unsendable.push((row, reason));
                }
            }
        }
        Ok(())
    }

    fn send_ready(&mut self) {
        while let Some(row) = self.window.next_to_send() {
            let row_id = row.id;
            match self.publisher.enqueue(row) {
                Ok(()) => {}
                Err(NotEnqueued::QueueFull) => {
                    self.window.put_back(row_id);
                    return;
                }
                Err(NotEnqueued::Failed(failure)) => self.failed(row_id, failure),
            }
        }
    }

    /// Waits for reports, and sends the next of each key as soon as the one before is acknowledged.
    async fn collect_reports(&mut self, trusted: &Trusted, winding_down: bool) {
        let until = (Instant::now() + COLLECT).min(trusted.until);
        let (mut delivered, mut failed) = (0u64, 0u64);
        while self.window.in_flight() > 0 && self.sent.len() < self.settings.batch / 2 {
            let report = match self.publisher.report_now() {
                Some(report) => report,
                None => match timeout_at(until.into(), self.publisher.report()).await {
                    Ok(Some(report)) => report,
                    Ok(None) | Err(_) => break,
                },
            };
            match self.reported(report) {
                Some(true) => delivered += 1,
                Some(false) => failed += 1,
                None => {}
            }
            if !winding_down && self.breaker.allowance(Instant::now()) == Allowance::Everything {
                self.send_ready();
            }
        }
        if delivered > 0 {
            self.breaker.succeeded();
        } else if failed > 0 {
            self.breaker.failed(Instant::now(), jitter());
            self.marks.reset(Instant::now());
        }
        metrics::counter!("outbox_published_total").increment(delivered);
        metrics::gauge!("outbox_breaker_open", "worker" => self.index.to_string())
            .set(f64::from(u8::from(self.breaker.is_open())));
    }

    /// Takes one report in. `Some(true)`: the broker has the row; `Some(false)`: the broker or the
    /// way to it failed; `None`: nothing that tells about the broker.
    fn reported(&mut self, report: Report) -> Option<bool> {
        match report.result {
            Ok(place) => {
                let row = self.window.acknowledged(report.row_id)?;
                let dwell = (chrono::Utc::now() - row.created_at).as_seconds_f64();
                metrics::histogram!("outbox_dwell_seconds").record(dwell.max(0.0));
                self.keys.release(&row.key);
                self.topics.release(&row.topic);
                self.sent.push(SentRow {
                    id: row.id,
                    lane: row.lane,
                    partition: place.partition,
                    offset: place.offset,
                });
                Some(true)
            }
            Err(failure) => {
                let broker = failure.fault == Fault::Broker;
                self.window.in_flight_row(report.row_id)?;
                self.failed(report.row_id, failure);
                broker.then_some(false)
            }
        }
    }

    /// One row did not get out. Its key waits in every case; who else waits depends on the fault.
    fn failed(&mut self, row_id: i64, failure: Failure) {
        let Some(row) = self.window.in_flight_row(row_id).cloned() else { return };
        metrics::counter!("outbox_publish_errors_total", "fault" => failure.fault.as_str()).increment(1);
        let now = Instant::now();
        self.window.evict(&row.key);
        self.marks.reset(now);
        match failure.fault {
            Fault::Message => self.unsendable.push((row, failure.reason)),
            Fault::Topic => {
                if self.topics.hold(&row.topic, now) {
                    tracing::warn!(
                        topic = row.topic,
                        reason = failure.reason,
                        "topic paused: create it, or allow this client to write to it"
                    );
                }
            }
            Fault::Broker => {
                if self.keys.hold(&row.key, now) {
                    tracing::debug!(key = row.key, reason = failure.reason, "delivery failed; trying again");
                }
            }
            Fault::Producer => self.replace_producer(&failure.reason),
        }
    }

    fn replace_producer(&mut self, reason: &str) {
        tracing::error!(worker = self.index, reason, "the Kafka producer is dead; making a new one");
        metrics::counter!("outbox_producers_replaced_total").increment(1);
        match Publisher::new(
            &self.settings.kafka,
            self.settings.batch,
            self.settings.lease.max(Duration::from_secs(10)),
        ) {
            Ok(publisher) => {
                let dead = std::mem::replace(&mut self.publisher, publisher);
                std::thread::spawn(move || drop(dead));
            }
            Err(error) => tracing::error!(%error, "no new producer"),
        }
        self.window.evict_unsent();
        self.breaker.failed(Instant::now(), jitter());
    }

    /// Moves what the broker has to the archive.
    async fn archive(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        if self.sent.is_empty() {
            return Ok(());
        }
        let mut lanes: Vec<i16> = self.sent.iter().map(|row| row.lane).collect();
        lanes.sort_unstable();
        lanes.dedup();
        let terms: Vec<LaneTerm> = lanes.iter().filter_map(|&lane| trusted.term(lane)).collect();
        let mut conn = self.pool.acquire().await?;
        let archived = delivery::finish(&mut conn, trusted.relay_id, &terms, &self.sent).await?;
        if archived.len() < self.sent.len() {
            let fenced = self.sent.len() - archived.len();
            tracing::warn!(
                worker = self.index,
                fenced,
                "rows were sent under a term that is over; the lane's owner sends them again"
            );
            metrics::counter!("outbox_fenced_writes_total").increment(fenced as u64);
        }
        self.window.archived(self.sent.drain(..).map(|row| row.id));
        for lane in terms {
            let Some(limit) = trusted.lanes.get(&lane.lane).and_then(|held| held.limit) else { continue };
            let next = limit.saturating_mul(8);
            let next = (next < self.settings.batch as i32).then_some(next);
            delivery::trust_more(&mut conn, trusted.relay_id, lane, next).await?;
            self.ownership.set_limit(lane.lane, lane.term, next);
        }
        Ok(())
    }

    /// Parks what can never be sent. Only after [`archive`](Self::archive): what was sent of the
    /// same key is in the outbox until then, and would be parked with the rest.
    async fn park_unsendable(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        while let Some((row, reason)) = self.unsendable.pop() {
            let Some(lane) = trusted.term(row.lane) else { continue };
            let cause = ParkCause::Unsendable { row_id: row.id, reason: reason.clone() };
            let parked = async {
                let mut conn = self.pool.acquire().await?;
                delivery::park(&mut conn, trusted.relay_id, lane, &row.key, &cause).await
            };
            match parked.await {
                Ok(rows) => {
                    tracing::error!(
                        outbox.row = row.id,
                        key = row.key,
                        topic = row.topic,
                        rows,
                        reason,
                        "parked: this message and everything behind it in its key waits for an operator"
                    );
                    metrics::counter!("outbox_parked_total").increment(rows);
                }
                Err(error) => {
                    self.unsendable.push((row, reason));
                    return Err(error);
                }
            }
        }
        Ok(())
    }

    async fn hand_over_drained(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        for (&lane, held) in trusted.lanes.iter().filter(|(_, held)| held.draining) {
            if self.window.len_of_lane(lane) == 0 {
                let mut conn = self.pool.acquire().await?;
                let lane = LaneTerm { lane, term: held.term };
                self.ownership.hand_over(&mut conn, trusted.relay_id, lane).await?;
            }
        }
        Ok(())
    }
}

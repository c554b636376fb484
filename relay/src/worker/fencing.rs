//! Fencing at the broker: a relay that has lost its lanes appends nothing any more once its successor has
//! raised its own fence, which it does before it sends anything.
//!
//! Lanes are owned in groups, and a group has a name at the broker, its transactional id. Who takes a
//! group raises a fence: `init_transactions` under that name makes the broker abort what the owner
//! before left open and refuse whatever it still sends. **Then, and only then, the database is asked
//! whether the lanes are still ours.** The order is the proof: whoever takes the lanes after that answer
//! raises its own fence after ours, and ours falls; who took them before it is in the answer. Asked the
//! other way round, a relay frozen between the two would fence off the rightful owner and go on. A fence
//! stays up until the broker says otherwise, also while the lanes are elsewhere for a time: who had them
//! has raised its own, and the first message sent behind the old one is refused.
//!
//! A batch is a transaction, and consumers read what is committed. One that did not come off is aborted
//! and its rows are read again. Where even that fails, the fence is raised anew, which settles it.

use std::time::{Duration, Instant};

use tokio::time::timeout_at;

use super::Worker;
use crate::{
    breaker::Allowance,
    delivery::{self, LaneTerm},
    fault::Fault,
    fault_points,
    lanes::{self, Trusted},
    relay::jitter,
};

/// A fence that is not up after so long is an error: a leader's death and the sweep of its transactions are over.
const FENCE_ALARM: Duration = Duration::from_secs(60);

/// Where a worker stands with the broker. One that does not fence is always behind a fence that is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fence {
    /// Nothing may be sent before it is raised.
    Down,
    /// Up, and no transaction is open.
    Up,
    /// Up, with messages in an open transaction.
    InTransaction,
    /// Up, with a transaction that has to be aborted.
    Broken,
}

impl Worker {
    /// Raises the fence if it is down. `false` when there is none yet, or when that took so long that it
    /// has to be asked again whether the lanes may be trusted.
    ///
    /// Neither this nor a commit need end while they may: the broker decides what comes of them, and an
    /// attempt that is given up may yet fence off the next.
    pub(super) async fn fence_is_up(&mut self, trusted: &Trusted) -> Result<bool, sqlx::Error> {
        if trusted.lanes.is_empty() || matches!(self.fence, Fence::Up | Fence::InTransaction) {
            return Ok(true);
        }
        if matches!(self.breaker.allowance(Instant::now()), Allowance::NothingUntil(_)) {
            return Ok(false);
        }
        if self.fence == Fence::Broken {
            self.abort().await;
            return Ok(false);
        }
        let index = self.index;
        let name = self.with_connection(async |conn| lanes::fence_name(conn, index).await).await?;
        if let Err(reason) = self.raise_fence(&name).await {
            self.no_fence(&name, &reason);
            self.breaker.failed(Instant::now(), jitter());
        } else {
            self.fence_down_since = None;
            self.fence_lines.recovered();
            metrics::gauge!("outbox_fence_wait_seconds", "worker" => self.index.to_string()).set(0.0);
            let terms: Vec<LaneTerm> = trusted.lanes.keys().filter_map(|&lane| trusted.term(lane)).collect();
            let lost = self.with_connection(async |conn| delivery::lost(conn, trusted.relay_id, &terms).await).await?;
            if lost.is_empty() {
                self.fence = Fence::Up;
            }
            // The rightful owner is fenced off now, and raises its fence again.
            self.ownership.forget(lost.into_iter());
        }
        Ok(false)
    }

    async fn raise_fence(&mut self, name: &str) -> Result<(), String> {
        let patience = self.settings.delivery_timeout();
        let publisher = self.settings.publisher(Some(name)).map_err(|error| error.to_string())?;
        // The old one has to be gone: with messages in flight it asks the broker for a new epoch on its
        // way out, and would fence off its successor.
        std::mem::replace(&mut self.publisher, publisher).end(patience).await;
        self.renewal.done(Instant::now());
        self.publisher.raise_fence(patience).await?;
        tracing::info!(worker = self.index, fence = name, "fence raised");
        metrics::counter!("outbox_fences_raised_total").increment(1);
        Ok(())
    }

    /// The broker ends the last transaction of the name first, and says CONCURRENT_TRANSACTIONS until then. That takes
    /// as long as a partition of it has no leader; a fault of the broker can make it last for ever, and then
    /// nothing but an operator helps.
    fn no_fence(&mut self, name: &str, reason: &str) {
        let waited = self.fence_down_since.get_or_insert_with(Instant::now).elapsed();
        metrics::gauge!("outbox_fence_wait_seconds", "worker" => self.index.to_string()).set(waited.as_secs_f64());
        let Some(line) = self.fence_lines.occurred(()) else { return };
        let (worker, seconds, left_out) = (self.index, waited.as_secs(), line.left_out);
        if waited < FENCE_ALARM {
            tracing::warn!(worker, reason, left_out, "no fence at the broker yet; trying again");
        } else {
            tracing::error!(
                worker,
                reason,
                seconds,
                left_out,
                "the broker does not end the last transaction of {name}; nothing of its lanes is published. Look at it \
                 with `kafka-transactions.sh describe --transactional-id {name}`, and at partitions without a leader"
            );
        }
    }

    /// Whether a message may be sent now; the first one opens a transaction.
    pub(super) fn may_send(&mut self) -> bool {
        if self.settings.fencing && self.fence == Fence::Up && self.window.has_ready() {
            self.fence = match self.publisher.begin() {
                Ok(()) => Fence::InTransaction,
                Err(reason) => {
                    tracing::warn!(worker = self.index, reason, "no transaction could be begun; trying again");
                    self.breaker.failed(Instant::now(), jitter());
                    Fence::Down
                }
            };
        }
        matches!(self.fence, Fence::Up | Fence::InTransaction)
    }

    /// The rows of a transaction are out together or not at all: with one that was refused, or is not ours
    /// to send any more, none is.
    pub(super) fn break_transaction(&mut self) {
        if self.fence == Fence::InTransaction {
            self.fence = Fence::Broken;
        }
    }

    /// Commits what was sent, so that consumers see it and the archive may have it.
    pub(super) async fn settle(&mut self, trusted: &Trusted) {
        match self.fence {
            Fence::Up => {}
            Fence::InTransaction => match self.publisher.commit(self.settings.delivery_timeout()).await {
                Ok(()) => self.settled(trusted).await,
                Err(reason) => {
                    tracing::warn!(worker = self.index, reason, "a transaction was not committed; sending again");
                    self.breaker.failed(Instant::now(), jitter());
                    self.abort().await;
                }
            },
            Fence::Broken => self.abort().await,
            Fence::Down => self.forget_unsettled(),
        }
    }

    /// Every message of the transaction is out, and its report is there or about to be.
    async fn settled(&mut self, trusted: &Trusted) {
        fault_points::reached("relay::settled");
        self.fence = Fence::Up;
        // Who commits is there, and need not have said so while reports were collected.
        self.broker_answers();
        let mut delivered = 0;
        while self.window.in_flight() > 0
            && let Ok(Some(report)) = timeout_at(trusted.until.into(), self.publisher.report()).await
        {
            delivered += u64::from(self.reported(report) == Some(true));
        }
        metrics::counter!("outbox_published_total").increment(delivered);
    }

    async fn abort(&mut self) {
        self.forget_unsettled();
        let aborted = self.publisher.abort(self.settings.delivery_timeout()).await;
        while let Some(report) = self.publisher.report_now() {
            if report.result.is_err_and(|failure| failure.fault == Fault::TimedOut) {
                self.renewal.timed_out(Instant::now());
            }
        }
        self.fence = match aborted {
            // A fence that is raised anew brings a new producer.
            Ok(()) if self.renewal.is_due() => Fence::Down,
            Ok(()) => Fence::Up,
            Err(reason) => {
                tracing::debug!(worker = self.index, reason, "a transaction was not aborted; raising the fence anew");
                Fence::Down
            }
        };
    }

    fn forget_unsettled(&mut self) {
        if self.window.len() > 0 {
            self.window.clear();
            self.sent.clear();
            self.look_again();
        }
    }
}

//! What came of the rows: archived, or parked.

use std::{collections::HashSet, time::Instant};

use super::Worker;
use crate::{
    delivery::{self, Finished, LaneTerm},
    fault_points,
    lanes::Trusted,
    parking::{self, ParkCause},
};

impl Worker {
    /// Moves what the broker has to the archive.
    pub(super) async fn archive(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        for lane in std::mem::take(&mut self.survived) {
            let suspected = trusted.lanes.get(&lane).is_some_and(|held| held.limit == Some(1));
            if let Some(lane) = trusted.term(lane).filter(|_| suspected) {
                let relay_id = trusted.relay_id;
                self.with_connection(async |conn| delivery::trust_more(conn, relay_id, lane, Some(1)).await).await?;
            }
        }
        if self.sent.is_empty() {
            return Ok(());
        }
        let mut lanes: Vec<i16> = self.sent.iter().map(|row| row.lane).collect();
        lanes.sort_unstable();
        lanes.dedup();
        let terms: Vec<LaneTerm> = lanes.iter().filter_map(|&lane| trusted.term(lane)).collect();
        let Finished { ids: archived, xid } = self
            .with_connection(async |conn| delivery::finish(conn, trusted.relay_id, &terms, &self.sent).await)
            .await?;
        fault_points::reached("relay::archived");
        if let Some(xid) = xid {
            self.marks.wrote(xid);
        }
        if archived.len() < self.sent.len() {
            let fenced = self.sent.len() - archived.len();
            tracing::warn!(
                worker = self.index,
                fenced,
                "rows were sent under a term that is over; the lane's owner sends them again"
            );
            metrics::counter!("outbox_fenced_writes_total").increment(fenced as u64);
            // Nothing more of these lanes until the lease keeper has asked whose they are, or they would
            // be read and sent again and again.
            let archived: HashSet<i64> = archived.into_iter().collect();
            let lost = self.sent.iter().filter(|row| !archived.contains(&row.id)).map(|row| row.lane);
            self.ownership.forget(lost);
        }
        self.window.archived(self.sent.drain(..).map(|row| row.id));
        if self.topics.any() {
            // Only rows whose predecessor is out were read: there may be more of every key.
            self.claim_again_at = Instant::now();
        }
        for lane in terms {
            let Some(limit) = trusted.lanes.get(&lane.lane).and_then(|held| held.limit) else { continue };
            let next = limit.saturating_mul(8);
            let next = (next < self.settings.batch as i32).then_some(next);
            let relay_id = trusted.relay_id;
            self.with_connection(async |conn| delivery::trust_more(conn, relay_id, lane, next).await).await?;
            self.ownership.set_limit(lane.lane, lane.term, next);
        }
        Ok(())
    }

    /// Parks what can't be sent. Only after [`archive`](Self::archive): until then the database does
    /// not know what of the key is out.
    pub(super) async fn park_unsendable(&mut self, trusted: &Trusted) -> Result<(), sqlx::Error> {
        while let Some((row, cause)) = self.unsendable.pop() {
            let Some(lane) = trusted.term(row.lane) else { continue };
            let parked =
                self.with_connection(async |conn| parking::park(conn, trusted.relay_id, lane, &row, &cause).await);
            match parked.await {
                // No gap after all, or the row, the block or the lane is gone: look again from the beginning.
                // Rows that contradict each other may say so for ever, and must not keep the processor busy.
                Ok(0) => {
                    let again = cause != ParkCause::Behind && !self.keys.hold(&row.key, Instant::now());
                    if again && matches!(cause, ParkCause::Gap(_)) {
                        tracing::warn!(
                            outbox.row = row.id,
                            key = &*row.key,
                            seq = row.seq,
                            "its predecessor is in the outbox, but not before it; nothing of this key goes out"
                        );
                    }
                    self.look_again();
                }
                Ok(rows) => {
                    metrics::counter!("outbox_parked_total").increment(rows);
                    let (id, key, topic) = (row.id, &*row.key, row.topic);
                    if cause == ParkCause::Behind {
                        tracing::info!(outbox.row = id, key, topic, rows, "parked behind an earlier row of its key");
                    } else {
                        let reason = cause.reason();
                        tracing::error!(outbox.row = id, key, topic, rows, reason, "parked: waits for an operator");
                    }
                }
                // The row is read again, and comes here again. Whatever is wrong with it, the others go on.
                Err(error) => {
                    self.keys.hold(&row.key, Instant::now());
                    self.look_again();
                    return Err(error);
                }
            }
        }
        Ok(())
    }
}

//! From the window to the broker, and what comes back.

use std::time::Instant;

use tokio::time::timeout_at;

use super::{COLLECT, Worker, fencing::Fence};
use crate::{
    breaker::Allowance,
    delivery::SentRow,
    fault::Fault,
    fault_points,
    lanes::Trusted,
    logging::Throttle,
    parking::ParkCause,
    publisher::{self, Failure, NotEnqueued, Report},
    relay::jitter,
};

/// Reports without a position, as lines of the log.
static NO_POSITION: Throttle = Throttle::new();

impl Worker {
    /// Sends all that may be sent now. The lease is looked at before each message: a process that was frozen
    /// among them gives the client one too many, beside what that has already, and not the rest of its window.
    /// A broker refuses a whole batch for one message in it that is too large, so a row that was refused goes
    /// again with nothing else in flight: then it is the one, or not.
    pub(super) fn send_ready(&mut self, trusted: &Trusted) {
        self.alone &= self.window.in_flight() > 0;
        while !self.alone && !self.renewal.is_due() && Instant::now() < trusted.until && self.may_send() {
            let others = self.window.in_flight() > 0;
            let Some(row) = self.window.next_to_send() else { return };
            let (row_id, alone) = (row.id, self.refused.contains(&row.id));
            if alone && others {
                return self.window.put_back(row_id);
            }
            fault_points::reached("relay::sending");
            let enqueued = self.publisher.enqueue(row, self.reign);
            fault_points::reached_with("relay::enqueued", &row.key);
            match enqueued {
                Ok(()) => self.alone = alone,
                Err(NotEnqueued::QueueFull) => return self.window.put_back(row_id),
                Err(NotEnqueued::Failed(failure)) => {
                    // The client has looked at this one message.
                    self.refused.insert(row_id);
                    self.failed(row_id, failure);
                }
            }
        }
    }

    /// Waits for reports, and sends the next of each key as soon as the one before is acknowledged.
    pub(super) async fn collect_reports(&mut self, trusted: &Trusted, winding_down: bool) {
        let until = (Instant::now() + COLLECT).min(trusted.until);
        let (mut delivered, mut failed) = (0u64, 0u64);
        while self.window.in_flight() > 0 && self.sent.len() < (self.settings.batch / 2).max(1) {
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
                self.send_ready(trusted);
            }
        }
        if delivered > 0 {
            self.broker_answers();
        } else if failed > 0 {
            self.breaker.failed(Instant::now(), jitter());
            self.marks.reset(Instant::now());
        }
        metrics::counter!("outbox_published_total").increment(delivered);
        metrics::gauge!("outbox_breaker_open", "worker" => self.index.to_string())
            .set(f64::from(u8::from(self.breaker.is_open())));
    }

    pub(super) fn broker_answers(&mut self) {
        if self.breaker.is_open() {
            publisher::recovered();
        }
        self.breaker.succeeded();
    }

    /// Takes one report in. `Some(true)`: the broker has the row; `Some(false)`: the broker or the
    /// way to it failed; `None`: nothing that tells about the broker.
    pub(super) fn reported(&mut self, report: Report) -> Option<bool> {
        if report.reign != self.reign {
            // Of a flight that was given up with the lease: the same row may be in flight anew.
            return None;
        }
        match report.result {
            Ok(position) => {
                let row = self.window.acknowledged(report.row_id)?;
                fault_points::reached("relay::acknowledged");
                let dwell = (chrono::Utc::now() - row.created_at).as_seconds_f64();
                metrics::histogram!("outbox_dwell_seconds").record(dwell.max(0.0));
                self.refused.remove(&row.id);
                if self.topics.remembers(&row.topic)
                    && let Some(over) = self.topic_lines.recovered()
                {
                    tracing::info!(topic = row.topic, seconds = over.lasted.as_secs(), "topic takes messages again");
                }
                if self.keys.release(&row.key) | self.topics.release(&row.topic) {
                    // What was passed over meanwhile may lie below the marks.
                    self.marks.reset(Instant::now());
                }
                self.sent.push(SentRow { id: row.id, lane: row.lane, position });
                Some(true)
            }
            Err(failure) => {
                let broker = matches!(failure.fault, Fault::Broker | Fault::TimedOut);
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
        self.break_transaction();
        self.survived.insert(row.lane);
        self.marks.reset(now);
        match failure.fault {
            Fault::Message if self.refused.insert(row.id) => {
                self.keys.hold(&row.key, now);
            }
            Fault::Message => {
                self.refused.remove(&row.id);
                self.unsendable.push((row, ParkCause::Unsendable(failure.reason)));
            }
            Fault::Topic => {
                self.topics.hold(&row.topic, now);
                if let Some(line) = self.topic_lines.occurred(row.topic.clone()) {
                    tracing::warn!(
                        topic = row.topic,
                        reason = failure.reason,
                        seconds = line.lasted.as_secs(),
                        left_out = line.left_out,
                        "topic paused: create it, or allow this client to write to it. Later events of the keys \
                         concerned wait, also those of other topics: the order of the key demands it"
                    );
                }
            }
            Fault::Broker | Fault::TimedOut => {
                if failure.fault == Fault::TimedOut {
                    self.renewal.timed_out(now);
                }
                if self.keys.hold(&row.key, now) {
                    tracing::debug!(key = &*row.key, reason = failure.reason, "delivery failed; trying again");
                }
            }
            Fault::Producer => self.replace_producer(&failure.reason),
            Fault::NoPosition => {
                self.keys.hold(&row.key, now);
                metrics::counter!("outbox_reports_without_position_total").increment(1);
                if let Some(line) = NO_POSITION.occurred(()) {
                    tracing::warn!(
                        worker = self.index,
                        topic = row.topic,
                        reason = failure.reason,
                        left_out = line.left_out,
                        "a message may not be in Kafka although the client says so; sending it again"
                    );
                }
            }
        }
    }

    fn replace_producer(&mut self, reason: &str) {
        tracing::error!(worker = self.index, reason, "the Kafka producer is dead; making a new one");
        self.breaker.failed(Instant::now(), jitter());
        // With fencing the transaction is broken, can't be aborted, and the next fence brings a new one.
        if !self.settings.fencing {
            self.new_producer();
        }
    }

    /// Replaces a producer that gave up on a message; see [`renewal`](crate::renewal). With fencing the next fence
    /// brings a new one.
    pub(super) fn renew_producer(&mut self) {
        if !self.renewal.may_begin(Instant::now(), self.window.in_flight()) {
            return;
        }
        if self.settings.fencing {
            // A transaction that is open or broken ends first. Without one, nothing else would lower the fence, and a
            // producer that is due gets no messages.
            if self.fence == Fence::Up {
                self.fence = Fence::Down;
            }
        } else {
            tracing::warn!(worker = self.index, "the Kafka client gave up on a message; going on with a new client");
            self.new_producer();
        }
    }

    fn new_producer(&mut self) {
        metrics::counter!("outbox_producers_replaced_total").increment(1);
        match self.settings.publisher(None) {
            Ok(publisher) => {
                let replaced = std::mem::replace(&mut self.publisher, publisher);
                std::thread::spawn(move || drop(replaced));
            }
            Err(error) => tracing::error!(%error, "no new producer"),
        }
        self.renewal.done(Instant::now());
        self.window.evict_unsent();
        self.look_again();
    }
}

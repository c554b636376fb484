//! When a producer is replaced because it gave up on a message. Pure: time comes in as a value.
//!
//! The client caches a leader's epoch by topic name and partition number, and takes no metadata of a lower one
//! (librdkafka 2.12.1, `rd_kafka_toppar_leader_update`), although a topic that was deleted and made again begins at 0.
//! It then sends to the old leaders until each message has timed out, for hours, and asking for metadata does not
//! help. A new client has an empty cache. A time-out can have other causes, a partition without a leader for example,
//! and a new client is no remedy then: so the next one waits longer.

use std::time::{Duration, Instant};

/// Messages that are in flight to other leaders may be acknowledged first: each that is not is sent again.
const GRACE: Duration = Duration::from_secs(1);
const FIRST_WAIT: Duration = Duration::from_secs(60);
const LONGEST_WAIT: Duration = Duration::from_secs(600);

/// Decides when a worker makes itself a new producer.
#[derive(Debug, Default)]
pub(crate) struct Renewal {
    due_since: Option<Instant>,
    last: Option<Last>,
}

#[derive(Debug)]
struct Last {
    at: Instant,
    /// Until the next one.
    wait: Duration,
}

impl Renewal {
    /// The client gave up on a message.
    pub(crate) fn timed_out(&mut self, now: Instant) {
        if self.last.as_ref().is_none_or(|last| now >= last.at + last.wait) {
            self.due_since.get_or_insert(now);
        }
    }

    /// Whether the producer is to be replaced: it gets no messages any more.
    pub(crate) fn is_due(&self) -> bool {
        self.due_since.is_some()
    }

    /// Whether it may be replaced now, with so many messages in flight.
    pub(crate) fn may_begin(&self, now: Instant, in_flight: usize) -> bool {
        self.due_since.is_some_and(|since| in_flight == 0 || now >= since + GRACE)
    }

    /// There is a new producer.
    pub(crate) fn done(&mut self, now: Instant) {
        if self.due_since.take().is_none() {
            return;
        }
        // After a long time without trouble it is another trouble.
        let recent = self.last.as_ref().filter(|last| now < last.at + last.wait + LONGEST_WAIT);
        let wait = recent.map_or(FIRST_WAIT, |last| (last.wait * 2).min(LONGEST_WAIT));
        self.last = Some(Last { at: now, wait });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_out_costs_the_producer_and_the_next_one_only_after_a_wait_that_doubles() {
        let (start, second) = (Instant::now(), Duration::from_secs(1));
        let mut renewal = Renewal::default();
        assert!(!renewal.is_due());
        renewal.timed_out(start);
        assert!(renewal.is_due());
        renewal.done(start);
        assert!(!renewal.is_due());
        renewal.timed_out(start + FIRST_WAIT - second);
        assert!(!renewal.is_due(), "it is too early");
        renewal.timed_out(start + FIRST_WAIT);
        assert!(renewal.is_due());
        renewal.done(start + FIRST_WAIT);
        renewal.timed_out(start + FIRST_WAIT * 3 - second);
        assert!(!renewal.is_due(), "the second wait is twice the first");
        renewal.timed_out(start + FIRST_WAIT * 3);
        assert!(renewal.is_due());
    }

    #[test]
    fn after_a_long_time_without_trouble_it_begins_anew() {
        let start = Instant::now();
        let mut renewal = Renewal::default();
        for at in [start, start + FIRST_WAIT + LONGEST_WAIT] {
            renewal.timed_out(at);
            renewal.done(at);
        }
        renewal.timed_out(start + FIRST_WAIT * 2 + LONGEST_WAIT);
        assert!(renewal.is_due(), "the wait is the first again");
    }

    #[test]
    fn what_is_in_flight_has_a_moment_to_be_acknowledged() {
        let start = Instant::now();
        let mut renewal = Renewal::default();
        assert!(!renewal.may_begin(start, 0));
        renewal.timed_out(start);
        assert!(renewal.may_begin(start, 0));
        assert!(!renewal.may_begin(start, 1));
        assert!(renewal.may_begin(start + GRACE, 1));
    }
}

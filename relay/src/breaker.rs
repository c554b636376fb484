//! The circuit breaker in front of the broker. Pure: time comes in as a value.

use std::time::{Duration, Instant};

const FIRST_WAIT: Duration = Duration::from_millis(250);
/// An operator who has brought the broker back should not wait long for the relay to notice.
const LONGEST_WAIT: Duration = Duration::from_secs(5);

/// How much may be sent now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Allowance {
    /// As much as there is room for.
    Everything,
    /// One message, to see whether the broker is back.
    Probe,
    /// Nothing before this moment.
    NothingUntil(Instant),
}

/// Closed until a round of sends brings nothing but broker faults; then one probe at a time, with
/// waits that double from 250 ms to 5 s, until a message gets through.
#[derive(Debug, Default)]
pub struct Breaker {
    open: Option<Open>,
}

#[derive(Debug, Clone, Copy)]
struct Open {
    until: Instant,
    wait: Duration,
}

impl Breaker {
    /// How much may be sent at `now`.
    pub fn allowance(&self, now: Instant) -> Allowance {
        match self.open {
            None => Allowance::Everything,
            Some(open) if now >= open.until => Allowance::Probe,
            Some(open) => Allowance::NothingUntil(open.until),
        }
    }

    /// A message was acknowledged: the broker is there.
    pub fn succeeded(&mut self) {
        self.open = None;
    }

    /// Nothing got through. `jitter` in 0..1 spreads the probes of several relays.
    pub fn failed(&mut self, now: Instant, jitter: f64) {
        let wait = self.open.map_or(FIRST_WAIT, |open| (open.wait * 2).min(LONGEST_WAIT));
        let until = now + wait.mul_f64(0.75 + jitter / 2.0);
        self.open = Some(Open { until, wait });
    }

    /// Whether the breaker is open, for status and metrics.
    pub fn is_open(&self) -> bool {
        self.open.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn opens_on_failure_probes_after_the_wait_and_closes_on_success() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        assert_eq!(breaker.allowance(start), Allowance::Everything);

        breaker.failed(start, 0.5);
        assert_eq!(breaker.allowance(start), Allowance::NothingUntil(start + FIRST_WAIT));
        assert_eq!(breaker.allowance(start + FIRST_WAIT), Allowance::Probe);

        breaker.succeeded();
        assert_eq!(breaker.allowance(start), Allowance::Everything);
    }

    #[test]
    fn waits_double_up_to_the_longest() {
        let start = Instant::now();
        let mut breaker = Breaker::default();
        (0..20).for_each(|_| breaker.failed(start, 0.5));
        assert_eq!(breaker.allowance(start), Allowance::NothingUntil(start + LONGEST_WAIT));
    }
}

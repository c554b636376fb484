use std::time::Duration;

use super::vars::Vars;

/// The outbox relay.
#[derive(Debug, Clone, Copy)]
pub struct RelayConfig {
    /// For how long a relay that says nothing keeps its lanes.
    pub lease: Duration,
    /// How many rows it takes at a time.
    pub batch: usize,
    /// How many workers share its lanes.
    pub workers: usize,
    /// How often it looks when nobody wakes it.
    pub poll: Duration,
}

impl RelayConfig {
    pub(super) fn read(vars: &mut Vars) -> Self {
        let (millis, seconds) = (Duration::from_millis, Duration::from_secs);
        Self {
            lease: vars.duration("RELAY_LEASE", seconds(10), seconds(1)..=seconds(300)),
            batch: vars.number("RELAY_BATCH", 2000, 1..=100_000),
            workers: vars.number("RELAY_WORKERS", 2, 1..=64),
            poll: vars.duration("RELAY_POLL", millis(500), millis(10)..=seconds(60)),
        }
    }
}

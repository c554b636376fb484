use std::time::Duration;

use outbox_relay::FENCES;

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
    /// Whether relays fence each other off at the broker.
    pub fencing: bool,
    /// Its connections: a storm of logins must not hold it up.
    pub pool_size: u32,
}

impl RelayConfig {
    pub(super) fn read(vars: &mut Vars) -> Self {
        let (millis, seconds) = (Duration::from_millis, Duration::from_secs);
        let lease = vars.duration("RELAY_LEASE", seconds(10), seconds(1)..=seconds(300));
        let batch = vars.number("RELAY_BATCH", 2000, 1..=100_000);
        let workers = vars.number("RELAY_WORKERS", 2, 1..=64);
        let poll = vars.duration("RELAY_POLL", millis(500), millis(10)..=seconds(60));
        let fencing = vars.flag("RELAY_FENCING", false);
        // One for each fence.
        let workers = if fencing { FENCES } else { workers };
        // The others are the lease keeper's and the listener's: without them lanes are lost under load.
        let needed = workers as u32 + 2;
        let pool_size = vars.number("RELAY_POOL_SIZE", needed + 2, 2..=1000);
        if pool_size < needed {
            vars.reject(
                "RELAY_POOL_SIZE",
                format!("is {pool_size}; {workers} relay workers need {needed} connections"),
                format!("Set it to {needed} or more, or leave it out"),
            );
        }
        Self { lease, batch, workers, poll, fencing, pool_size }
    }
}

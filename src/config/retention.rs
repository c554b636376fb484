use std::time::Duration;

use super::vars::Vars;

const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
const LONGEST: Duration = Duration::from_secs(3650 * 24 * 3600);

/// How long history is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RetentionConfig {
    /// Published outbox rows.
    pub archive: Duration,
    /// Messages taken from Kafka: longer than Kafka itself may deliver one again.
    pub inbox: Duration,
    /// Finished sagas and their log; `None` keeps them.
    pub sagas: Option<Duration>,
}

impl RetentionConfig {
    pub(super) fn read(vars: &mut Vars) -> Self {
        let archive = vars.duration("ARCHIVE_RETENTION", 30 * DAY, HOUR..=LONGEST);
        let inbox = vars.duration("INBOX_RETENTION", 30 * DAY, HOUR..=LONGEST);
        let sagas = vars.duration("SAGA_RETENTION", Duration::ZERO, Duration::ZERO..=LONGEST);
        if !sagas.is_zero() && sagas < HOUR {
            vars.reject("SAGA_RETENTION", "is less than an hour", "Give 1h or more, or 0 to keep them");
        }
        Self { archive, inbox, sagas: (!sagas.is_zero()).then_some(sagas) }
    }
}

//! Moments as people type them.

use std::{str::FromStr, time::Duration};

use chrono::{DateTime, NaiveDate, NaiveTime, TimeDelta, Utc};

/// A moment, or how long ago it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Moment {
    /// Then.
    At(DateTime<Utc>),
    /// So long before now.
    Ago(TimeDelta),
}

impl Moment {
    /// The moment itself; `None` for one that lies before all time.
    pub fn at(self, now: DateTime<Utc>) -> Option<DateTime<Utc>> {
        match self {
            Moment::At(at) => Some(at),
            Moment::Ago(ago) => now.checked_sub_signed(ago),
        }
    }
}

impl FromStr for Moment {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Ok(at) = DateTime::parse_from_rfc3339(text) {
            return Ok(Moment::At(at.to_utc()));
        }
        if let Ok(day) = NaiveDate::parse_from_str(text, "%Y-%m-%d") {
            return Ok(Moment::At(day.and_time(NaiveTime::MIN).and_utc()));
        }
        let ago = humantime::parse_duration(text).ok().filter(|ago| *ago <= A_CENTURY);
        match ago.and_then(|ago| TimeDelta::from_std(ago).ok()) {
            Some(ago) => Ok(Moment::Ago(ago)),
            None => Err("write a moment with its zone (2026-03-09T14:00:00Z), a day (2026-03-09, from midnight UTC), \
                         or how long ago it was (90s, 2h, 7d)"
                .to_owned()),
        }
    }
}

const A_CENTURY: Duration = Duration::from_secs(100 * 366 * 24 * 3600);

#[cfg(test)]
mod tests {
    use super::*;

    fn at(text: &str) -> String {
        let now = "2026-03-09T14:00:00Z".parse().unwrap();
        text.parse::<Moment>().unwrap().at(now).unwrap().to_rfc3339()
    }

    #[test]
    fn a_moment_is_a_time_with_its_zone_a_day_in_utc_or_so_long_ago() {
        assert_eq!(at("2026-03-01T10:00:00+02:00"), "2026-03-01T08:00:00+00:00");
        assert_eq!(at("2026-03-01"), "2026-03-01T00:00:00+00:00");
        assert_eq!(at("2h"), "2026-03-09T12:00:00+00:00");
        assert_eq!(at("1day 30m"), "2026-03-08T13:30:00+00:00");
    }

    #[test]
    fn a_time_without_a_zone_is_refused_with_what_can_be_written() {
        for bad in ["2026-03-01T10:00:00", "yesterday", "", "-2h", "9999999999y"] {
            let refused = bad.parse::<Moment>().unwrap_err();
            assert!(refused.contains("2026-03-09T14:00:00Z") && refused.contains("2h"), "{bad:?}: {refused}");
        }
    }
}

//! The archive's daily partitions: made ahead of time, dropped by retention. Dropping a partition
//! costs nothing, however many rows it holds; deleting them one by one is what slows outboxes down.

use chrono::{DateTime, Days, NaiveDate, Utc};
use sqlx::{AssertSqlSafe, PgConnection};

const DAYS_AHEAD: u64 = 7;

/// What housekeeping did to the archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// Partitions made.
    pub made: Vec<String>,
    /// Partitions dropped, with the rows in them.
    pub dropped: Vec<String>,
}

/// Makes the partitions of today and the next seven days, and drops those that lie wholly before
/// `keep_from`. Safe to run on many replicas at once; run it daily at least. A day without its
/// partition goes to the default one and costs nothing but a tidy archive.
pub async fn keep_up(
    conn: &mut PgConnection,
    today: NaiveDate,
    keep_from: Option<DateTime<Utc>>,
) -> Result<Upkeep, sqlx::Error> {
    let mut upkeep = Upkeep::default();
    let existing: Vec<String> = sqlx::query_scalar(
        "select c.relname::text from pg_inherits i join pg_class c on c.oid = i.inhrelid
          where i.inhparent = 'outbox_archive'::regclass",
    )
    .fetch_all(&mut *conn)
    .await?;
    for ahead in 0..=DAYS_AHEAD {
        let Some(day) = today.checked_add_days(Days::new(ahead)) else { break };
        let Some(next) = day.succ_opt() else { break };
        let name = name_of(day);
        if existing.contains(&name) {
            continue;
        }
        // Built from a date alone: nothing in it comes from outside.
        let sql = format!(
            "create table if not exists {name} partition of outbox_archive for values from ('{day}') to ('{next}')"
        );
        match sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut *conn).await {
            Ok(_) => upkeep.made.push(name),
            // The default partition holds rows of that day already; they stay there.
            Err(error) => tracing::warn!(partition = name, %error, "archive partition not made"),
        }
    }
    let Some(keep_from) = keep_from else { return Ok(upkeep) };
    for name in existing {
        let Some(day) = day_of(&name) else { continue };
        if day.succ_opt().is_some_and(|next| next <= keep_from.date_naive()) {
            sqlx::raw_sql(AssertSqlSafe(format!("drop table if exists {name}"))).execute(&mut *conn).await?;
            upkeep.dropped.push(name);
        }
    }
    Ok(upkeep)
}

fn name_of(day: NaiveDate) -> String {
    format!("outbox_archive_{}", day.format("%Y%m%d"))
}

/// `None` for the default partition, and for whatever an operator has attached.
fn day_of(name: &str) -> Option<NaiveDate> {
    NaiveDate::parse_from_str(name.strip_prefix("outbox_archive_")?, "%Y%m%d").ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_is_named_by_its_day_and_only_such_are_ever_dropped() {
        let day = NaiveDate::from_ymd_opt(2026, 3, 9).unwrap();
        assert_eq!(name_of(day), "outbox_archive_20260309");
        assert_eq!(day_of("outbox_archive_20260309"), Some(day));
        assert_eq!(day_of("outbox_archive_default"), None);
        assert_eq!(day_of("other_20260309"), None);
    }
}

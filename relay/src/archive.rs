//! The archive's daily partitions: made ahead of time, dropped by retention. Dropping a partition
//! costs nothing, however many rows it holds; deleting them one by one is what slows outboxes down.
//!
//! A day without a partition goes to the default one. Such a day gets none any more, since PostgreSQL would have to
//! move its rows under a lock that stops every delivery; its rows are deleted in slices when they are due.
//!
//! Rows without a position in Kafka could be written by earlier releases only: see [`unpositioned`].

use std::ops::RangeInclusive;

use chrono::{DateTime, Days, NaiveDate, Utc};
use sqlx::{AssertSqlSafe, Connection, PgConnection};

const DAYS_AHEAD: u64 = 7;

/// What housekeeping did to the archive.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Upkeep {
    /// Partitions made.
    pub made: Vec<String>,
    /// Partitions dropped, with the rows in them.
    pub dropped: Vec<String>,
    /// What could not be done now and is tried again at the next run, a sentence each.
    pub left: Vec<String>,
}

/// Makes the partitions of today and the next seven days, and drops those that lie wholly before
/// `keep_from`. Safe to run on many replicas at once; run it daily at least. A lock that isn't free
/// within a second is left for the next run: whoever waits for one makes all deliveries wait behind it.
///
/// # Errors
///
/// The database's. A partition that can't be made or dropped is none: the others are more important.
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
        if existing.contains(&name) || lies_in_default(conn, day, next).await? {
            continue;
        }
        // Built from a date alone: nothing in it comes from outside. Attached rather than made in place, which would
        // lock the archive as a whole.
        let made = [
            format!("create table {name} (like outbox_archive including defaults including constraints)"),
            format!("alter table outbox_archive attach partition {name} for values from ('{day}') to ('{next}')"),
        ];
        match briefly(conn, &made).await? {
            None => upkeep.made.push(name),
            Some(why) => upkeep.left.push(format!("{name} was not made: {why}")),
        }
    }
    let Some(keep_from) = keep_from else { return Ok(upkeep) };
    for name in existing {
        let Some(day) = day_of(&name) else { continue };
        if day.succ_opt().is_some_and(|next| next <= keep_from.date_naive()) {
            match briefly(conn, &[format!("drop table if exists {name}")]).await? {
                None => upkeep.dropped.push(name),
                Some(why) => upkeep.left.push(format!("{name} was not dropped: {why}")),
            }
        }
    }
    Ok(upkeep)
}

/// Deletes at most `most` rows published before `keep_from` that lie in the default partition. Answers how many.
///
/// # Errors
///
/// The database's.
pub async fn purge_default(conn: &mut PgConnection, keep_from: DateTime<Utc>, most: i64) -> Result<u64, sqlx::Error> {
    let purged = sqlx::query(
        "delete from outbox_archive_default where ctid = any(array(
             select ctid from outbox_archive_default where published_at < $1 order by published_at limit $2))",
    )
    .bind(keep_from)
    .bind(most)
    .execute(conn)
    .await?;
    Ok(purged.rows_affected())
}

/// Whether rows of that day came before it had a partition.
async fn lies_in_default(conn: &mut PgConnection, day: NaiveDate, next: NaiveDate) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from outbox_archive_default where published_at >= $1::timestamptz and published_at < $2)",
    )
    .bind(midnight(day))
    .bind(midnight(next))
    .fetch_one(conn)
    .await
}

/// Sessions are in UTC, and with them the bounds of partitions.
fn midnight(day: NaiveDate) -> DateTime<Utc> {
    day.and_time(chrono::NaiveTime::MIN).and_utc()
}

/// One transaction that waits for no lock longer than a second. `None` when it is done, else why it isn't.
async fn briefly(conn: &mut PgConnection, statements: &[String]) -> Result<Option<String>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    sqlx::raw_sql("set local lock_timeout = '1s'").execute(&mut *tx).await?;
    for statement in statements {
        match sqlx::raw_sql(AssertSqlSafe(statement.clone())).execute(&mut *tx).await {
            Ok(_) => {}
            // Not free, there already (another replica), not allowed: the connection is sound.
            Err(sqlx::Error::Database(error))
                if error.code().is_some_and(|code| code == "55P03" || code.starts_with("42")) =>
            {
                tx.rollback().await?;
                return Ok(Some(error.message().to_owned()));
            }
            Err(error) => return Err(error),
        }
    }
    tx.commit().await?;
    Ok(None)
}

/// Archived rows that name no position in Kafka. Their messages may never have been appended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unpositioned {
    /// How many there are that were not sent again.
    pub rows: i64,
    /// The ids of the first of them.
    pub ids: Vec<i64>,
    /// When the first and the last of them were taken for published.
    pub published: RangeInclusive<DateTime<Utc>>,
}

/// At most so many ids are listed.
const LISTED: i64 = 20;

/// Looks for rows without a position that were not sent again. When there is no row without one at all, the
/// database is told to rely on it, and is not searched again.
pub async fn unpositioned(conn: &mut PgConnection) -> Result<Option<Unpositioned>, sqlx::Error> {
    let validated: Option<bool> = sqlx::query_scalar(
        "select convalidated from pg_constraint
          where conrelid = to_regclass('outbox_archive') and conname = 'outbox_archive_position'",
    )
    .fetch_optional(&mut *conn)
    .await?;
    if validated == Some(true) {
        return Ok(None);
    }
    type Found = (i64, i64, Option<Vec<i64>>, Option<DateTime<Utc>>, Option<DateTime<Utc>>);
    let (all, rows, ids, first, last): Found = sqlx::query_as(
        "with bad as (
             select a.id, a.published_at,
                    exists (select from outbox_archive r
                             where r.key = a.key and r.seq = a.seq and r.replay_of = a.id
                               and r.partition >= 0 and r.\"offset\" >= 0) as sent_again
               from outbox_archive a
              where not (a.partition >= 0 and a.\"offset\" >= 0)
         ), open as (
             select id, published_at, row_number() over (order by id) as n from bad where not sent_again
         )
         select (select count(*) from bad), count(*), array_agg(id order by id) filter (where n <= $1),
                min(published_at), max(published_at)
           from open",
    )
    .bind(LISTED)
    .fetch_one(&mut *conn)
    .await?;
    if all == 0 && validated.is_some() {
        sqlx::query("alter table outbox_archive validate constraint outbox_archive_position").execute(conn).await?;
    }
    Ok(first.zip(last).map(|(first, last)| Unpositioned {
        rows,
        ids: ids.unwrap_or_default(),
        published: first..=last,
    }))
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

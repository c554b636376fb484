//! The parking lot: rows that can't be sent, and what of their key waits behind them.

use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::delivery::{LaneTerm, PendingRow};

/// Why a key's rows leave the hot table without being sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ParkCause {
    /// It can't be sent; the reason is for the operator.
    Unsendable(String),
    /// The row before it is missing, as far as was read.
    Gap(String),
    /// Its place in the sequence is out already. Nothing waits for it.
    Stale(String),
    /// An earlier row of the key is parked already.
    Behind,
}

impl ParkCause {
    /// For the operator; a row that is behind another has no reason of its own.
    pub(crate) fn reason(&self) -> Option<&str> {
        match self {
            ParkCause::Unsendable(reason) | ParkCause::Gap(reason) | ParkCause::Stale(reason) => Some(reason),
            ParkCause::Behind => None,
        }
    }
}

/// Parks a row that can't be sent, and everything of its key behind it; a replay or one that is
/// [`Stale`](ParkCause::Stale) alone, since nothing waits for it. What is before it stays: it may have been in the
/// transaction at the broker that this row has broken. Replays behind it stay too: they stand outside the
/// sequence, and one may be in flight. Answers how many rows moved; 0 when the lane was lost, when the row is not
/// there any more, when the key is free again ([`Behind`](ParkCause::Behind)), or when there is no gap
/// ([`Gap`](ParkCause::Gap)).
pub(crate) async fn park(
    conn: &mut PgConnection,
    relay_id: Uuid,
    lane: LaneTerm,
    row: &PendingRow,
    cause: &ParkCause,
) -> Result<u64, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let owned: Option<i16> =
        sqlx::query_scalar("select lane from outbox_lanes where lane = $1 and term = $2 and owner = $3 for share")
            .bind(lane.lane)
            .bind(lane.term)
            .bind(relay_id)
            .fetch_optional(&mut *tx)
            .await?;
    if owned.is_none() {
        return Ok(0);
    }
    let alone = row.replay_of.is_some() || matches!(cause, ParkCause::Stale(_));
    let head = if alone { Some(row.id) } else { lock_head(&mut tx, lane.lane, row, cause).await? };
    let Some(head) = head else { return Ok(0) };
    let moved = sqlx::query(
        "with gone as (delete from outbox where lane = $1 and key = $2
                          and case when $5 then id = $6 else id >= $3 and replay_of is null end returning *)
         insert into outbox_parked (id, lane, key, seq, message_id, topic, payload, headers, saga_id,
                                    replay_of, created_at, reason)
         select id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at,
                coalesce(case when id = $6 then $4 end,
                         'waits behind row ' || $3 || ' of the same key, which is parked')
           from gone",
    )
    .bind(lane.lane)
    .bind(&*row.key)
    .bind(head)
    .bind(cause.reason())
    .bind(alone)
    .bind(row.id)
    .execute(&mut *tx)
    .await?
    .rows_affected();
    tx.commit().await?;
    Ok(moved)
}

/// The row from which on the key is parked, and the lock on that: the key's row in outbox_blocked stands between
/// parking and an operator's replay. Without it a row could be parked behind a head that has just left the parking
/// lot, and wait for nothing. `None` when nothing is to be parked after all.
async fn lock_head(
    conn: &mut PgConnection,
    lane: i16,
    row: &PendingRow,
    cause: &ParkCause,
) -> Result<Option<i64>, sqlx::Error> {
    match cause {
        ParkCause::Behind => {
            sqlx::query_scalar("select row_id from outbox_blocked where key = $1 for update")
                .bind(&*row.key)
                .fetch_optional(conn)
                .await
        }
        ParkCause::Gap(_) if !has_gap(conn, &row.key).await? => Ok(None),
        _ => {
            sqlx::query_scalar(
                "insert into outbox_blocked as b (key, row_id) select key, id from outbox where lane = $1 and id = $2
                 on conflict (key) do update set row_id = least(b.row_id, excluded.row_id) returning row_id",
            )
            .bind(lane)
            .bind(row.id)
            .fetch_optional(conn)
            .await
        }
    }
}

/// Whether a key's first unsent row is not the next one. Asked of the database as a whole: a read that
/// began at a low mark may have passed over a row that became visible late.
async fn has_gap(conn: &mut PgConnection, key: &str) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select coalesce((select min(o.seq) from outbox o where o.key = $1 and o.replay_of is null)
                       > coalesce((select max(p.seq) from outbox_progress p where p.key = $1), 0) + 1, false)",
    )
    .bind(key)
    .fetch_one(conn)
    .await
}

//! Sending again: a parked key goes on in order, an archived message goes out once more under its
//! old message id. Both happen in the caller's transaction, so that the audit row stands beside
//! them.

use serde::Serialize;
use sqlx::{Connection, PgConnection};

use crate::message::lane_of;

/// What a replay did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase", tag = "replayed")]
pub enum Replayed {
    /// The parked key is free: these rows go out, in their order.
    Parked {
        /// Key.
        key: String,
        /// Rows put back into the outbox.
        rows: Vec<i64>,
    },
    /// The archived message goes out again.
    #[serde(rename_all = "camelCase")]
    Published {
        /// The new outbox row; the message id is the old one.
        row: i64,
        /// The archived row.
        replay_of: i64,
    },
}

/// Why a row is not sent again.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// No such row.
    #[error("there is no outbox row {0}")]
    NotFound(i64),
    /// It, or a replay of it, is on its way already.
    #[error("row {0} is on its way and goes out by itself")]
    Pending(i64),
    /// It was sent again before, and that could not be done.
    #[error("row {row} was sent again as row {replay}, which is parked: replay row {replay}")]
    ReplayParked {
        /// The row.
        row: i64,
        /// The parked one.
        replay: i64,
    },
    /// Later messages of its key exist.
    #[error(
        "row {row} is message {seq} of key {key:?}, and message {last} exists: sent again it would come after \
         messages that followed it (a user.create after its user.delete would raise the dead); \
         force it with the admin scope if that is what you want"
    )]
    Overtaken {
        /// The row.
        row: i64,
        /// Its key.
        key: String,
        /// Its place.
        seq: i64,
        /// The newest message's place.
        last: i64,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// Sends a row again. A parked row takes its whole key with it, since nothing behind it may come
/// before it. A published one, or a replay of it that is parked, goes alone, and is refused when later
/// messages of its key exist, unless `force`.
///
/// Wake the relay after the commit.
pub async fn replay(conn: &mut PgConnection, row_id: i64, force: bool) -> Result<Replayed, ReplayError> {
    let parked: Option<(String, i64, bool)> =
        sqlx::query_as("select key, seq, replay_of is not null from outbox_parked where id = $1")
            .bind(row_id)
            .fetch_optional(&mut *conn)
            .await?;
    match parked {
        Some((key, _, false)) => return Ok(unpark(conn, key).await?),
        Some((key, seq, true)) => return unpark_replay(conn, row_id, key, seq, force).await,
        None => {}
    }
    let archived: Option<(String, i64)> = sqlx::query_as("select key, seq from outbox_archive where id = $1")
        .bind(row_id)
        .fetch_optional(&mut *conn)
        .await?;
    match archived {
        Some((key, seq)) => send_again(conn, row_id, &key, seq, force).await,
        None => Err(match pending(conn, row_id).await? {
            true => ReplayError::Pending(row_id),
            false => ReplayError::NotFound(row_id),
        }),
    }
}

async fn unpark(conn: &mut PgConnection, key: String) -> Result<Replayed, sqlx::Error> {
    // The same lock the relay takes to park behind a parked row: see `parking::park`. Taken also where no row
    // is: another replay may have removed it, and the relay may park the key anew before the next statement.
    sqlx::query(
        "insert into outbox_blocked as b (key, row_id) values ($1, 0)
         on conflict (key) do update set row_id = b.row_id",
    )
    .bind(&key)
    .execute(&mut *conn)
    .await?;
    let rows = put_back(conn, &key, None).await?;
    sqlx::query("delete from outbox_blocked where key = $1").bind(&key).execute(conn).await?;
    Ok(Replayed::Parked { key, rows })
}

async fn unpark_replay(
    conn: &mut PgConnection,
    row_id: i64,
    key: String,
    seq: i64,
    force: bool,
) -> Result<Replayed, ReplayError> {
    refuse_overtaken(conn, row_id, &key, seq, force).await?;
    let rows = put_back(conn, &key, Some(row_id)).await?;
    match rows.is_empty() {
        true => Err(ReplayError::Pending(row_id)),
        false => Ok(Replayed::Parked { key, rows }),
    }
}

/// Puts this replay back into the outbox, or all of the key that is no replay. The rows keep their ids, and with
/// them their order: whatever was appended since has higher ones.
async fn put_back(conn: &mut PgConnection, key: &str, replay: Option<i64>) -> Result<Vec<i64>, sqlx::Error> {
    let mut rows: Vec<i64> = sqlx::query_scalar(
        "with freed as (delete from outbox_parked
                         where key = $1 and case when $2 is null then replay_of is null else id = $2 end returning *)
         insert into outbox (id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at)
         overriding system value
         select id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at from freed
         returning id",
    )
    .bind(key)
    .bind(replay)
    .fetch_all(conn)
    .await?;
    rows.sort_unstable();
    Ok(rows)
}

/// Locking the key's counter keeps a message from being appended between this look and the commit: it would have
/// a lower row id than the replay, and go out first.
async fn refuse_overtaken(
    conn: &mut PgConnection,
    row_id: i64,
    key: &str,
    seq: i64,
    force: bool,
) -> Result<(), ReplayError> {
    let last: Option<i64> = sqlx::query_scalar("select last_seq from outbox_keys where key = $1 for update")
        .bind(key)
        .fetch_optional(conn)
        .await?;
    match last.unwrap_or(seq) {
        last if last > seq && !force => Err(ReplayError::Overtaken { row: row_id, key: key.to_owned(), seq, last }),
        _ => Ok(()),
    }
}

async fn send_again(
    conn: &mut PgConnection,
    row_id: i64,
    key: &str,
    seq: i64,
    force: bool,
) -> Result<Replayed, ReplayError> {
    refuse_overtaken(conn, row_id, key, seq, force).await?;
    let mut tx = conn.begin().await?;
    let row: Option<i64> = sqlx::query_scalar(
        "insert into outbox (lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of)
         select lane, key, seq, message_id, topic, payload, headers, saga_id, coalesce(replay_of, id)
           from outbox_archive where id = $1 limit 1
         on conflict on constraint outbox_seq_unique do nothing
         returning id",
    )
    .bind(row_id)
    .fetch_optional(&mut *tx)
    .await?;
    let Some(row) = row else { return Err(ReplayError::Pending(row_id)) };
    // Asked after the insert, which waited for a relay that was just parking the replay before.
    let parked: Option<i64> = sqlx::query_scalar(
        "select p.id from outbox_parked p join outbox o on o.key = p.key and o.seq = p.seq and o.replay_of = p.replay_of
          where o.lane = $1 and o.id = $2",
    )
    .bind(lane_of(key))
    .bind(row)
    .fetch_optional(&mut *tx)
    .await?;
    if let Some(replay) = parked {
        tx.rollback().await?;
        return Err(ReplayError::ReplayParked { row: row_id, replay });
    }
    tx.commit().await?;
    Ok(Replayed::Published { row, replay_of: row_id })
}

async fn pending(conn: &mut PgConnection, row_id: i64) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from outbox where id = $1 and lane = any(array(select generate_series(0, 63)::smallint)))",
    )
    .bind(row_id)
    .fetch_one(conn)
    .await
}

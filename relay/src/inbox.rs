//! The inbox: every message taken from Kafka, once, in the transaction of its effects.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use serde::Serialize;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

/// A message on its way into the inbox.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// Who takes it in; each consumer has an inbox of its own.
    pub consumer: &'a str,
    /// The message's own id, else its place in Kafka with the cluster's id.
    pub message_key: &'a str,
    /// Topic.
    pub topic: &'a str,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It took effect.
    Applied,
    /// It waits for something that is under way; its bytes are kept.
    Deferred,
    /// It came after the fact and has no effect.
    Late,
    /// It says what was known.
    Duplicate,
    /// It names nothing that exists; its bytes are kept.
    Unknown,
    /// It should not have come; its bytes are kept.
    Unexpected,
    /// It was not understood; its bytes are kept.
    Rejected,
}

impl Outcome {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Applied => "applied",
            Outcome::Deferred => "deferred",
            Outcome::Late => "late",
            Outcome::Duplicate => "duplicate",
            Outcome::Unknown => "unknown",
            Outcome::Unexpected => "unexpected",
            Outcome::Rejected => "rejected",
        }
    }

    fn keeps_bytes(self) -> bool {
        !matches!(self, Outcome::Applied | Outcome::Duplicate)
    }
}

/// A message's bytes.
#[derive(Debug, Clone)]
pub struct Bytes {
    /// Key.
    pub key: Option<Vec<u8>>,
    /// Headers that are text.
    pub headers: BTreeMap<String, String>,
    /// Value.
    pub payload: Option<Vec<u8>>,
}

/// A message that waits in the inbox.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Its key in the inbox.
    pub message_key: String,
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
    /// Its bytes.
    pub bytes: Bytes,
}

/// Takes a message in, as applied. `false` when it was taken in before: nothing must be done again.
///
/// Two consumers that got the same message in a rebalance meet here: the second waits for the
/// first's transaction, then sees the row.
pub async fn insert(conn: &mut PgConnection, message: Incoming<'_>) -> Result<bool, sqlx::Error> {
    let inserted = sqlx::query(
        "insert into inbox (consumer, message_key, topic, partition, \"offset\", outcome)
         values ($1, $2, $3, $4, $5, 'applied') on conflict do nothing",
    )
    .bind(message.consumer)
    .bind(message.message_key)
    .bind(message.topic)
    .bind(message.partition)
    .bind(message.offset)
    .execute(conn)
    .await?;
    Ok(inserted.rows_affected() == 1)
}

/// Notes what became of a message that [`insert`] took in, and keeps its bytes unless there is
/// nothing left to find out about it.
pub async fn conclude(
    conn: &mut PgConnection,
    consumer: &str,
    message_key: &str,
    outcome: Outcome,
    detail: Option<&str>,
    saga_id: Option<Uuid>,
    bytes: &Bytes,
) -> Result<(), sqlx::Error> {
    let kept = outcome.keeps_bytes().then_some(bytes);
    sqlx::query(
        "update inbox set outcome = $3, detail = $4, saga_id = $5, raw_key = $6, raw_headers = $7, raw_payload = $8
          where consumer = $1 and message_key = $2",
    )
    .bind(consumer)
    .bind(message_key)
    .bind(outcome.as_str())
    .bind(detail)
    .bind(saga_id)
    .bind(kept.and_then(|bytes| bytes.key.as_deref()))
    .bind(kept.map(|bytes| Json(&bytes.headers)))
    .bind(kept.and_then(|bytes| bytes.payload.as_deref()))
    .execute(conn)
    .await?;
    Ok(())
}

#[derive(sqlx::FromRow)]
struct WaitingRow {
    message_key: String,
    topic: String,
    partition: i32,
    offset: i64,
    raw_key: Option<Vec<u8>>,
    raw_headers: Option<Json<BTreeMap<String, String>>>,
    raw_payload: Option<Vec<u8>>,
}

/// The messages that were deferred for this saga, oldest first.
pub async fn deferred(conn: &mut PgConnection, consumer: &str, saga_id: Uuid) -> Result<Vec<Waiting>, sqlx::Error> {
    let rows: Vec<WaitingRow> = sqlx::query_as(
        "select message_key, topic, partition, \"offset\", raw_key, raw_headers, raw_payload
           from inbox where saga_id = $2 and consumer = $1 and outcome = 'deferred' order by received_at",
    )
    .bind(consumer)
    .bind(saga_id)
    .fetch_all(conn)
    .await?;
    let waiting = |row: WaitingRow| Waiting {
        message_key: row.message_key,
        topic: row.topic,
        partition: row.partition,
        offset: row.offset,
        bytes: Bytes {
            key: row.raw_key,
            headers: row.raw_headers.map(|Json(headers)| headers).unwrap_or_default(),
            payload: row.raw_payload,
        },
    };
    Ok(rows.into_iter().map(waiting).collect())
}

/// How many messages of each outcome a person should look at.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
pub struct Attention {
    /// `unknown`, `unexpected` or `rejected`.
    pub outcome: String,
    /// How many.
    pub count: i64,
    /// The newest of them.
    pub newest_at: DateTime<Utc>,
}

/// Messages a person should look at.
pub async fn attention(conn: &mut PgConnection) -> Result<Vec<Attention>, sqlx::Error> {
    sqlx::query_as(
        "select outcome, count(*) as count, max(received_at) as newest_at from inbox
          where outcome in ('unknown', 'unexpected', 'rejected') group by outcome order by outcome",
    )
    .fetch_all(conn)
    .await
}

/// Forgets messages that are older than `keep` and need nobody's attention, `most` at a time.
/// `keep` must exceed the topics' retention: a message that can still be read again must be known.
pub async fn purge(conn: &mut PgConnection, keep: std::time::Duration, most: i64) -> Result<u64, sqlx::Error> {
    let purged = sqlx::query(
        "delete from inbox where (consumer, message_key) in (
             select consumer, message_key from inbox
              where received_at < clock_timestamp() - make_interval(secs => $1)
                and outcome in ('applied', 'duplicate', 'late')
              order by received_at limit $2)",
    )
    .bind(keep.as_secs_f64())
    .bind(most)
    .execute(conn)
    .await?;
    Ok(purged.rows_affected())
}

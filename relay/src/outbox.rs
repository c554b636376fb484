//! Appending to the outbox inside the caller's transaction, and asking later what became of it.

use std::collections::{HashMap, HashSet};

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use crate::message::{NewMessage, lane_of};

/// Where an appended message stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Appended {
    /// The outbox row. It keeps this id when it is parked, and when it is archived.
    pub row_id: i64,
    /// The message's place among all messages of its key, counted from 1 without a gap.
    pub seq: i64,
}

/// Why a message was not appended.
#[derive(Debug, thiserror::Error)]
pub enum AppendError {
    /// The topic's name is not one Kafka accepts.
    #[error("topic {0:?} is not a legal Kafka topic name (letters, digits, '.', '_', '-', at most 249)")]
    IllegalTopic(String),
    /// The database refused.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
}

/// What became of an outbox row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Publication {
    /// Not out yet.
    Pending,
    /// In Kafka since then, by the database's clock.
    Published(DateTime<Utc>),
    /// Held back, with the reason. It is out only after an operator's replay.
    Parked(String),
}

/// Appends a message. Takes effect when the caller's transaction commits; call
/// [`Wake::notify`](crate::Wake::notify) after that.
///
/// The row lock on the key's counter is held until the transaction ends. It makes the order of
/// `seq` the order of commits, and it makes two transactions that write to one key wait for each
/// other: append late in the transaction.
pub async fn append(conn: &mut PgConnection, message: &NewMessage) -> Result<Appended, AppendError> {
    if !message.has_legal_topic() {
        return Err(AppendError::IllegalTopic(message.topic.clone()));
    }
    let (row_id, seq) = sqlx::query_as::<_, (i64, i64)>(
        "with numbered as (
             insert into outbox_keys as k (key, last_seq) values ($2, 1)
             on conflict (key) do update set last_seq = k.last_seq + 1
             returning last_seq
         )
         insert into outbox (lane, key, seq, message_id, topic, payload, headers, saga_id)
         select $1, $2, last_seq, $3, $4, $5, $6, $7 from numbered
         returning id, seq",
    )
    .bind(lane_of(&message.key))
    .bind(&message.key)
    .bind(message.id)
    .bind(&message.topic)
    .bind(&message.payload)
    .bind(Json(message.stored_headers()))
    .bind(message.saga_id)
    .fetch_one(conn)
    .await?;
    Ok(Appended { row_id, seq })
}

/// A parked row that belongs to a saga.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct ParkedOfSaga {
    /// The outbox row.
    pub row_id: i64,
    /// Its key.
    pub key: String,
    /// Its message id.
    pub message_id: Uuid,
    /// The saga.
    pub saga_id: Uuid,
}

/// Parked rows that belong to sagas, oldest first, after the row `after`, `most` of them. Without replays: what they
/// send again was out before.
pub async fn parked_of_sagas(conn: &mut PgConnection, after: i64, most: i64) -> Result<Vec<ParkedOfSaga>, sqlx::Error> {
    sqlx::query_as(
        "select id as row_id, key, message_id, saga_id from outbox_parked
          where saga_id is not null and replay_of is null and id > $1 order by id limit $2",
    )
    .bind(after)
    .bind(most)
    .fetch_all(conn)
    .await
}

/// Those of these keys that have rows which are neither published nor given up.
pub async fn unpublished_keys(conn: &mut PgConnection, keys: &[&str]) -> Result<HashSet<String>, sqlx::Error> {
    let found: Vec<String> = sqlx::query_scalar(
        "select key from unnest($1::text[]) k (key)
          where exists (select from outbox o where o.key = k.key) or exists (select from outbox_parked p where p.key = k.key)",
    )
    .bind(keys)
    .fetch_all(conn)
    .await?;
    Ok(found.into_iter().collect())
}

/// What became of these rows, given with their keys. A row that is in none of the outbox's tables (its
/// archive partition was dropped by retention) is left out of the answer.
pub async fn publications(
    conn: &mut PgConnection,
    rows: &[(i64, &str)],
) -> Result<HashMap<i64, Publication>, sqlx::Error> {
    let (ids, lanes): (Vec<i64>, Vec<i16>) = rows.iter().map(|(id, key)| (*id, lane_of(key))).unzip();
    let rows: Vec<(i64, Option<DateTime<Utc>>, Option<String>)> = sqlx::query_as(
        "select id, published_at, null from outbox_archive where id = any($1)
         union all
         select id, null, reason from outbox_parked where id = any($1)
         union all
         select o.id, null, null
           from unnest($1, $2) as w(id, lane) join outbox o on o.lane = w.lane and o.id = w.id",
    )
    .bind(ids)
    .bind(lanes)
    .fetch_all(conn)
    .await?;
    Ok(rows
        .into_iter()
        .map(|(id, published_at, reason)| match (published_at, reason) {
            (Some(at), _) => (id, Publication::Published(at)),
            (None, Some(reason)) => (id, Publication::Parked(reason)),
            (None, None) => (id, Publication::Pending),
        })
        .collect())
}

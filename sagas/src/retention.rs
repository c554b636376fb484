//! Forgetting sagas that are closed, with everything in them that tells of a person.

use std::time::Duration;

use chrono::{DateTime, Utc};
use outbox_relay::unpublished_keys;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use crate::store;

/// Where the next slice begins.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PurgeCursor(DateTime<Utc>, Uuid);

/// What became of a slice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Purged {
    /// Sagas that are gone.
    pub sagas: u64,
    /// Where to go on; `None` at the end.
    pub next: Option<PurgeCursor>,
}

/// Forgets sagas that were completed or compensated longer than `keep` ago, at most `most` of them, with their log.
/// Begins after `after`. Their replies in the inbox have a retention of their own.
///
/// Stuck and open ones stay, and so does a saga whose subject still has messages to be published: they may be its own.
///
/// # Errors
///
/// The database's.
pub async fn purge_closed(
    conn: &mut PgConnection,
    keep: Duration,
    after: Option<PurgeCursor>,
    most: i64,
) -> Result<Purged, sqlx::Error> {
    let mut tx = conn.begin().await?;
    let due = store::closed_before(&mut tx, keep, after.map(|PurgeCursor(at, id)| (at, id)), most).await?;
    let next = due.last().filter(|_| due.len() as i64 == most).map(|last| PurgeCursor(last.created_at, last.saga_id));
    let subjects: Vec<&str> = due.iter().map(|saga| saga.subject.as_str()).collect();
    let waiting = unpublished_keys(&mut tx, &subjects).await?;
    let ids: Vec<Uuid> = due.iter().filter(|saga| !waiting.contains(&saga.subject)).map(|saga| saga.saga_id).collect();
    store::forget(&mut tx, &ids).await?;
    tx.commit().await?;
    Ok(Purged { sagas: ids.len() as u64, next })
}

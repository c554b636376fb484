//! What operators see of sagas.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::state::{Saga, Status};

/// Which sagas to list.
#[derive(Debug, Clone, Default)]
pub struct SagaFilter {
    /// Only with this status.
    pub status: Option<Status>,
    /// Only of this kind.
    pub name: Option<String>,
    /// Only about this subject (a user id).
    pub subject: Option<String>,
    /// Only older than this saga: the last one of the page before.
    pub cursor: Option<Uuid>,
    /// At most this many.
    pub limit: i64,
}

/// Sagas, newest first.
pub async fn list(conn: &mut PgConnection, filter: &SagaFilter) -> Result<Vec<Saga>, sqlx::Error> {
    sqlx::query_as(
        "select * from saga_state
          where ($1::text is null or status = $1)
            and ($2::text is null or name = $2)
            and ($3::text is null or subject = $3)
            and ($4::uuid is null
                 or (created_at, saga_id) < (select created_at, saga_id from saga_state where saga_id = $4))
          order by created_at desc, saga_id desc
          limit $5",
    )
    .bind(filter.status.map(Status::as_str))
    .bind(&filter.name)
    .bind(&filter.subject)
    .bind(filter.cursor)
    .bind(filter.limit)
    .fetch_all(conn)
    .await
}

/// One line of a saga's timeline.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct TimelineEntry {
    /// The saga's own clock.
    pub revision: i64,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
    /// What happened.
    pub event: String,
    /// Where the saga stood.
    pub from_status: Option<String>,
    /// Where it stood then.
    pub to_status: String,
    /// Who brought it.
    pub actor: String,
    /// What it said and brought about.
    pub detail: Value,
}

/// Everything that happened to a saga, oldest first.
pub async fn timeline(conn: &mut PgConnection, saga_id: Uuid) -> Result<Vec<TimelineEntry>, sqlx::Error> {
    sqlx::query_as(
        "select revision, at, event, from_status, to_status, actor, detail
           from saga_log where saga_id = $1 order by revision",
    )
    .bind(saga_id)
    .fetch_all(conn)
    .await
}

/// How many sagas of a kind have a status.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
pub struct SagaCount {
    /// The kind.
    pub name: String,
    /// The status.
    pub status: String,
    /// How many.
    pub count: i64,
    /// Creation of the oldest of them.
    pub oldest_at: DateTime<Utc>,
}

/// Sagas by kind and status. The closed ones are many and are counted by their log's counters, not
/// here.
pub async fn open_counts(conn: &mut PgConnection) -> Result<Vec<SagaCount>, sqlx::Error> {
    sqlx::query_as(
        "select name, status, count(*) as count, min(created_at) as oldest_at from saga_state
          where status in ('running', 'resolving', 'stuck') group by name, status order by name, status",
    )
    .fetch_all(conn)
    .await
}

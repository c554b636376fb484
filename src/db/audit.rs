//! `admin_audit`.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::PgConnection;

/// A line about to be written.
#[derive(Debug)]
pub struct NewLine<'a> {
    /// The operator's name.
    pub actor: &'a str,
    /// What they asked for, for example `outbox.replay`.
    pub action: &'a str,
    /// Of what.
    pub target: &'a str,
    /// Why; an attempt that was refused beforehand may have given none.
    pub reason: Option<&'a str>,
    /// What became of it.
    pub outcome: Outcome,
    /// What it did, or why it was refused.
    pub detail: &'a Value,
}

/// What became of an operator's attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It took effect.
    Done,
    /// It would have changed nothing.
    Unchanged,
    /// The system would not.
    Refused,
    /// The operator may not.
    Forbidden,
}

impl Outcome {
    /// As stored.
    pub const fn as_str(self) -> &'static str {
        match self {
            Outcome::Done => "done",
            Outcome::Unchanged => "unchanged",
            Outcome::Refused => "refused",
            Outcome::Forbidden => "forbidden",
        }
    }
}

/// A line of the log.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    /// Its number.
    pub id: i64,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
    /// Who.
    pub actor: String,
    /// What.
    pub action: String,
    /// Of what.
    pub target: String,
    /// Why.
    pub reason: Option<String>,
    /// What became of it.
    pub outcome: String,
    /// What it did, or why it was refused.
    pub detail: Value,
}

/// Which lines to list.
#[derive(Debug, Clone, Default)]
pub struct AuditFilter {
    /// Only of this operator.
    pub actor: Option<String>,
    /// Only this action.
    pub action: Option<String>,
    /// Only older lines: the last one of the page before.
    pub cursor: Option<i64>,
    /// At most this many.
    pub limit: i64,
}

/// Writes a line, in the transaction of the change it tells of.
pub async fn insert(conn: &mut PgConnection, line: &NewLine<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into admin_audit (actor, action, target, reason, outcome, detail) values ($1, $2, $3, $4, $5, $6)",
    )
    .bind(line.actor)
    .bind(line.action)
    .bind(line.target)
    .bind(line.reason)
    .bind(line.outcome.as_str())
    .bind(line.detail)
    .execute(conn)
    .await?;
    Ok(())
}

/// Lines, newest first.
pub async fn list(conn: &mut PgConnection, filter: &AuditFilter) -> Result<Vec<Line>, sqlx::Error> {
    sqlx::query_as(
        "select id, at, actor, action, target, reason, outcome, detail from admin_audit
          where ($1::text is null or actor = $1)
            and ($2::text is null or action = $2)
            and ($3::bigint is null or id < $3)
          order by id desc
          limit $4",
    )
    .bind(&filter.actor)
    .bind(&filter.action)
    .bind(filter.cursor)
    .bind(filter.limit)
    .fetch_all(conn)
    .await
}

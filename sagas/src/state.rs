//! Where a saga stands.

use std::fmt;

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::{FromRow, Row, postgres::PgRow};
use uuid::Uuid;

/// A saga's status. It rests only in `Completed`, `Compensated` or `Stuck`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// A command is out, or on its way out; the answer is awaited.
    Running,
    /// No answer came in time; the other service is being asked. Replies wait for the outcome.
    Resolving,
    /// Every step was carried out.
    Completed,
    /// A step was refused and everything was taken back.
    Compensated,
    /// A person is needed; the row says why.
    Stuck,
}

impl Status {
    /// All of them.
    pub const ALL: [Status; 5] =
        [Status::Running, Status::Resolving, Status::Completed, Status::Compensated, Status::Stuck];

    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Running => "running",
            Status::Resolving => "resolving",
            Status::Completed => "completed",
            Status::Compensated => "compensated",
            Status::Stuck => "stuck",
        }
    }

    /// From what was stored.
    pub fn parse(text: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|status| status.as_str() == text)
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// By what a saga was closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Evidence {
    /// A reply by Kafka.
    Reply,
    /// The other service was asked and answered.
    BackCheck,
    /// Nobody could be asked, and the configuration says to assume success.
    Assumption,
    /// An operator decided.
    Operator,
}

impl Evidence {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Evidence::Reply => "reply",
            Evidence::BackCheck => "back-check",
            Evidence::Assumption => "assumption",
            Evidence::Operator => "operator",
        }
    }
}

/// A saga as it stands in `saga_state`.
#[derive(Debug, Clone, PartialEq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Saga {
    /// Its identity, chosen before anything is written.
    pub saga_id: Uuid,
    /// The definition's name.
    pub name: String,
    /// The definition's version it was started with.
    pub definition_version: i32,
    /// Where it stands.
    pub status: Status,
    /// The step it is at, by name.
    pub step: String,
    /// What it is about: the Kafka key of its messages (a user id).
    pub subject: String,
    /// The flow's data.
    pub data: Value,
    /// What is carried along into every message: causation, trace.
    pub context: Value,
    /// Correlation id of its messages, unique over all sagas ever.
    pub correlation_id: String,
    /// The service made that id itself: nothing older carries it.
    pub correlation_made: bool,
    /// Message id of the command whose answer is awaited.
    pub command_id: Option<Uuid>,
    /// Outbox row of that command.
    pub command_row: Option<i64>,
    /// When silence is looked into. `None` while the command is not published.
    pub deadline_at: Option<DateTime<Utc>>,
    /// How often the other service was asked in vain.
    pub resolve_attempts: i32,
    /// By what it was closed.
    pub evidence: Option<String>,
    /// Why a person is needed.
    pub stuck_reason: Option<String>,
    /// Its steps were taken back (it may be stuck in doing so).
    pub undone: bool,
    /// The steps whose undo was refused or can't be sent, and has not come through since.
    pub refused_undos: Vec<String>,
    /// Counts everything that happened to it.
    pub revision: i64,
    /// When it began.
    pub created_at: DateTime<Utc>,
    /// When anything last happened.
    pub updated_at: DateTime<Utc>,
    /// When it was closed.
    pub finished_at: Option<DateTime<Utc>>,
}

impl FromRow<'_, PgRow> for Saga {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let status: String = row.try_get("status")?;
        Ok(Self {
            status: Status::parse(&status)
                .ok_or_else(|| sqlx::Error::Decode(format!("unknown saga status {status:?}").into()))?,
            saga_id: row.try_get("saga_id")?,
            name: row.try_get("name")?,
            definition_version: row.try_get("definition_version")?,
            step: row.try_get("step")?,
            subject: row.try_get("subject")?,
            data: row.try_get("data")?,
            context: row.try_get("context")?,
            correlation_id: row.try_get("correlation_id")?,
            correlation_made: row.try_get("correlation_made")?,
            command_id: row.try_get("command_id")?,
            command_row: row.try_get("command_row")?,
            deadline_at: row.try_get("deadline_at")?,
            resolve_attempts: row.try_get("resolve_attempts")?,
            evidence: row.try_get("evidence")?,
            stuck_reason: row.try_get("stuck_reason")?,
            undone: row.try_get("undone")?,
            refused_undos: row.try_get("refused_undos")?,
            revision: row.try_get("revision")?,
            created_at: row.try_get("created_at")?,
            updated_at: row.try_get("updated_at")?,
            finished_at: row.try_get("finished_at")?,
        })
    }
}

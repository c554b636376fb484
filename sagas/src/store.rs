//! `saga_state` and `saga_log`, and nothing else. Functions take the caller's connection; the
//! caller's transaction decides.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    machine::{Deadline, Transition},
    state::{Evidence, Saga, Status},
};

/// A saga about to be written.
#[derive(Debug)]
pub(crate) struct NewRow<'a> {
    pub saga_id: Uuid,
    pub name: &'a str,
    pub definition_version: i32,
    pub step: &'a str,
    pub subject: &'a str,
    pub data: &'a Value,
    pub context: &'a Value,
    pub correlation_id: &'a str,
    /// The id was made here; nothing older carries it.
    pub correlation_made: bool,
}

/// Writes a new saga. `false` when its correlation id was used before, by any saga ever.
pub(crate) async fn insert(conn: &mut PgConnection, new: &NewRow<'_>) -> Result<bool, sqlx::Error> {
    let written = sqlx::query(
        "insert into saga_state (saga_id, name, definition_version, status, step, subject, data, context, correlation_id,
                                 correlation_made)
         values ($1, $2, $3, 'running', $4, $5, $6, $7, $8, $9)
         on conflict on constraint saga_state_correlation_unique do nothing",
    )
    .bind(new.saga_id)
    .bind(new.name)
    .bind(new.definition_version)
    .bind(new.step)
    .bind(new.subject)
    .bind(new.data)
    .bind(new.context)
    .bind(new.correlation_id)
    .bind(new.correlation_made)
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Notes the command whose answer the saga awaits.
pub(crate) async fn set_command(
    conn: &mut PgConnection,
    saga_id: Uuid,
    command_id: Uuid,
    command_row: i64,
) -> Result<(), sqlx::Error> {
    sqlx::query("update saga_state set command_id = $2, command_row = $3 where saga_id = $1")
        .bind(saga_id)
        .bind(command_id)
        .bind(command_row)
        .execute(conn)
        .await?;
    Ok(())
}

/// The saga with this id.
pub async fn find(conn: &mut PgConnection, saga_id: Uuid) -> Result<Option<Saga>, sqlx::Error> {
    sqlx::query_as("select * from saga_state where saga_id = $1").bind(saga_id).fetch_optional(conn).await
}

/// The saga with this id, locked until the transaction ends.
pub(crate) async fn lock(conn: &mut PgConnection, saga_id: Uuid) -> Result<Option<Saga>, sqlx::Error> {
    sqlx::query_as("select * from saga_state where saga_id = $1 for update").bind(saga_id).fetch_optional(conn).await
}

/// The id of the saga with this correlation id.
pub(crate) async fn by_correlation(conn: &mut PgConnection, correlation_id: &str) -> Result<Option<Uuid>, sqlx::Error> {
    sqlx::query_scalar("select saga_id from saga_state where correlation_id = $1")
        .bind(correlation_id)
        .fetch_optional(conn)
        .await
}

/// The sagas of this kind about this subject that still await something.
pub(crate) async fn open_by_subject(
    conn: &mut PgConnection,
    name: &str,
    subject: &str,
) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "select saga_id from saga_state
          where subject = $1 and name = $2 and status in ('running', 'resolving', 'stuck')",
    )
    .bind(subject)
    .bind(name)
    .fetch_all(conn)
    .await
}

/// When the oldest saga began that still awaits something.
pub(crate) async fn oldest_open(conn: &mut PgConnection) -> Result<Option<DateTime<Utc>>, sqlx::Error> {
    sqlx::query_scalar("select min(created_at) from saga_state where status in ('running', 'resolving', 'stuck')")
        .fetch_one(conn)
        .await
}

/// Durations the deadlines are reckoned with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Patience {
    /// From a command's publication to the question.
    pub step: Duration,
    /// How long one question may take before somebody else may ask.
    pub asking: Duration,
    /// The first pause after a question nobody answered; doubles up to [`Patience::LONGEST_PAUSE`].
    pub back_off: Duration,
}

impl Patience {
    const LONGEST_PAUSE: Duration = Duration::from_secs(300);

    /// The pause before the question after `attempts` vain ones.
    pub(crate) fn pause(&self, attempts: i32) -> Duration {
        let doublings = attempts.clamp(1, 20) as u32 - 1;
        self.back_off.saturating_mul(1 << doublings).min(Self::LONGEST_PAUSE)
    }
}

/// Carries a transition out on the row. The revision guard makes a write that is late a no-op:
/// `false`.
pub(crate) async fn advance(
    conn: &mut PgConnection,
    saga: &Saga,
    to: &Transition,
    step: &str,
    refused_undos: &[&str],
    published_at: Option<DateTime<Utc>>,
    patience: Patience,
) -> Result<bool, sqlx::Error> {
    let attempts = match to.deadline {
        Deadline::BackOff => saga.resolve_attempts + 1,
        Deadline::AfterPublication => 0,
        Deadline::None | Deadline::Now | Deadline::WhileAsking => saga.resolve_attempts,
    };
    let (after_publication, back_off) = match to.deadline {
        Deadline::AfterPublication => (Some(patience.step.as_secs_f64()), None),
        Deadline::BackOff => (None, Some(patience.pause(attempts).as_secs_f64())),
        Deadline::Now => (None, Some(0.0)),
        Deadline::None | Deadline::WhileAsking => (None, None),
    };
    let asking = matches!(to.deadline, Deadline::WhileAsking).then(|| patience.asking.as_secs_f64());
    let written = sqlx::query(
        "update saga_state
            set status = $3, step = $4, stuck_reason = $5, evidence = $6, undone = undone or $3 = 'compensated',
                refused_undos = $12,
                deadline_at = case when $7::float8 is not null
                                       then coalesce($8, clock_timestamp()) + make_interval(secs => $7)
                                   when $9::float8 is not null
                                       then clock_timestamp() + make_interval(secs => $9)
                                   when $10::float8 is not null then deadline_at end,
                resolver_until = clock_timestamp() + make_interval(secs => $10),
                resolve_attempts = $11,
                finished_at = case when $6::text is not null then clock_timestamp() end,
                updated_at = clock_timestamp(), revision = revision + 1
          where saga_id = $1 and revision = $2",
    )
    .bind(saga.saga_id)
    .bind(saga.revision)
    .bind(to.to.as_str())
    .bind(step)
    .bind(&to.stuck_reason)
    .bind(to.evidence.map(Evidence::as_str))
    .bind(after_publication)
    .bind(published_at)
    .bind(back_off)
    .bind(asking)
    .bind(attempts)
    .bind(refused_undos)
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Counts an event that changed nothing, so that the log has a place for it.
pub(crate) async fn count_event(conn: &mut PgConnection, saga: &Saga) -> Result<(), sqlx::Error> {
    sqlx::query("update saga_state set revision = revision + 1 where saga_id = $1 and revision = $2")
        .bind(saga.saga_id)
        .bind(saga.revision)
        .execute(conn)
        .await?;
    Ok(())
}

/// One line of a saga's log.
#[derive(Debug)]
pub(crate) struct LogLine<'a> {
    pub saga_id: Uuid,
    pub revision: i64,
    pub event: &'a str,
    pub from: Option<Status>,
    pub to: Status,
    pub actor: &'a str,
    pub detail: Value,
}

/// Appends to the log. Written twice (a retried transaction), a line stands once.
pub(crate) async fn log(conn: &mut PgConnection, line: LogLine<'_>) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into saga_log (saga_id, revision, event, from_status, to_status, actor, detail)
         values ($1, $2, $3, $4, $5, $6, $7)
         on conflict do nothing",
    )
    .bind(line.saga_id)
    .bind(line.revision)
    .bind(line.event)
    .bind(line.from.map(Status::as_str))
    .bind(line.to.as_str())
    .bind(line.actor)
    .bind(line.detail)
    .execute(conn)
    .await?;
    Ok(())
}

/// A saga whose command is not known to be out, as it was read.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Unpublished {
    pub saga_id: Uuid,
    pub command_row: i64,
    pub subject: String,
    pub revision: i64,
}

/// Sagas whose command is not known to be out, oldest command first, after the row `after`.
/// Young ones are left alone: their reply is likely to come before anybody needs a deadline.
pub(crate) async fn unpublished(
    conn: &mut PgConnection,
    after: i64,
    most: i64,
) -> Result<Vec<Unpublished>, sqlx::Error> {
    sqlx::query_as(
        "(select saga_id, command_row, subject, revision from saga_state
           where status = 'running' and deadline_at is null and command_row > $1
             and updated_at < clock_timestamp() - interval '1 second'
           order by command_row limit $2)
         union all
         (select saga_id, command_row, subject, revision from saga_state
           where status = 'stuck' and stuck_reason like 'command parked:%' and command_row > $1
           order by command_row limit $2)
         order by command_row limit $2",
    )
    .bind(after)
    .bind(most)
    .fetch_all(conn)
    .await
}

/// Those of these sagas whose steps were taken back.
pub(crate) async fn undone_among(conn: &mut PgConnection, saga_ids: &[Uuid]) -> Result<Vec<Saga>, sqlx::Error> {
    sqlx::query_as("select * from saga_state where saga_id = any($1) and undone").bind(saga_ids).fetch_all(conn).await
}

/// Sagas whose deadline has passed, and sagas whose asker has vanished.
pub(crate) async fn overdue(conn: &mut PgConnection, most: i64) -> Result<Vec<Uuid>, sqlx::Error> {
    sqlx::query_scalar(
        "(select saga_id from saga_state
           where status = 'running' and deadline_at is not null and deadline_at <= clock_timestamp()
           order by deadline_at limit $1)
         union all
         (select saga_id from saga_state
           where status = 'resolving' and resolver_until <= clock_timestamp()
           order by resolver_until limit $1)
         limit $1",
    )
    .bind(most)
    .fetch_all(conn)
    .await
}

/// Whether this saga is overdue at this moment.
pub(crate) async fn overdue_now(conn: &mut PgConnection, saga_id: Uuid) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar(
        "select exists (select from saga_state
                         where saga_id = $1
                           and ((status = 'running' and deadline_at <= clock_timestamp())
                             or (status = 'resolving' and resolver_until <= clock_timestamp())))",
    )
    .bind(saga_id)
    .fetch_one(conn)
    .await
}

/// A closed saga that is old enough to be forgotten.
#[derive(Debug, sqlx::FromRow)]
pub(crate) struct Closed {
    pub saga_id: Uuid,
    pub subject: String,
    pub created_at: DateTime<Utc>,
}

/// Sagas that were closed longer than `keep` ago, oldest first, locked; without those that somebody has locked.
pub(crate) async fn closed_before(
    conn: &mut PgConnection,
    keep: Duration,
    after: Option<(DateTime<Utc>, Uuid)>,
    most: i64,
) -> Result<Vec<Closed>, sqlx::Error> {
    let (after_at, after_id) = after.unzip();
    sqlx::query_as(
        "select saga_id, subject, created_at from saga_state
          where status in ('completed', 'compensated')
            and finished_at < clock_timestamp() - make_interval(secs => $1)
            -- It began before it ended: this bounds the walk along the index.
            and created_at < clock_timestamp() - make_interval(secs => $1)
            and ($2::timestamptz is null or (created_at, saga_id) > ($2, $3))
          order by created_at, saga_id limit $4 for update skip locked",
    )
    .bind(keep.as_secs_f64())
    .bind(after_at)
    .bind(after_id)
    .bind(most)
    .fetch_all(conn)
    .await
}

/// Forgets these sagas and what happened to them.
pub(crate) async fn forget(conn: &mut PgConnection, saga_ids: &[Uuid]) -> Result<(), sqlx::Error> {
    sqlx::query("delete from saga_log where saga_id = any($1)").bind(saga_ids).execute(&mut *conn).await?;
    sqlx::query("delete from saga_state where saga_id = any($1)").bind(saga_ids).execute(conn).await?;
    Ok(())
}

/// Lets an hour pass for this saga alone, so that tests need not wait for its clocks.
#[cfg(feature = "suite")]
pub(crate) async fn age(conn: &mut PgConnection, saga_id: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update saga_state
            set updated_at = updated_at - interval '1 hour', deadline_at = deadline_at - interval '1 hour',
                resolver_until = resolver_until - interval '1 hour'
          where saga_id = $1",
    )
    .bind(saga_id)
    .execute(conn)
    .await?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_double_up_to_five_minutes() {
        let patience = Patience {
            step: Duration::from_secs(30),
            asking: Duration::from_secs(30),
            back_off: Duration::from_secs(5),
        };
        let seconds: Vec<u64> = (1..=8).map(|n| patience.pause(n).as_secs()).collect();
        assert_eq!(seconds, [5, 10, 20, 40, 80, 160, 300, 300]);
        assert_eq!(patience.pause(i32::MAX).as_secs(), 300);
    }
}

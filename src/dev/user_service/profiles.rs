//! The decisions, and the tables they are kept in. Each decision is one transaction.

use chrono::{DateTime, Utc};
use outbox_relay::Database;
use sqlx::PgConnection;
use uuid::Uuid;

/// A profile as it is kept.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct Profile {
    pub user_id: i64,
    pub username: String,
    pub email: String,
    pub saga_id: Option<Uuid>,
}

/// What this service does not take.
#[derive(Debug, Clone)]
pub(super) struct HouseRules {
    pub refused_prefixes: Vec<String>,
}

/// A decision, the first time and every time after.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct Decided {
    /// None: accepted and done.
    pub refusal: Option<String>,
    #[sqlx(rename = "decided_at")]
    pub at: DateTime<Utc>,
}

/// Why there will be no profile, ever.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum Refusal {
    #[error("a profile needs a username and an e-mail address")]
    Incomplete,
    #[error("usernames that begin with {0:?} are not welcome here")]
    Unwelcome(String),
    #[error("this user has been erased")]
    Erased,
    #[error("this user already has a profile")]
    Present,
}

impl HouseRules {
    fn check(&self, profile: &Profile) -> Result<(), Refusal> {
        if profile.username.is_empty() || profile.email.is_empty() {
            return Err(Refusal::Incomplete);
        }
        let username = profile.username.to_lowercase();
        match self.refused_prefixes.iter().find(|prefix| username.starts_with(&prefix.to_lowercase())) {
            Some(prefix) => Err(Refusal::Unwelcome(prefix.clone())),
            None => Ok(()),
        }
    }
}

/// Safe when several replicas start at once.
pub(super) async fn create_tables(db: &Database) -> Result<(), sqlx::Error> {
    db.transaction(|conn| {
        Box::pin(async move {
            sqlx::query("select pg_advisory_xact_lock(hashtext('user-service tables'))").execute(&mut *conn).await?;
            sqlx::raw_sql(include_str!("schema.sql")).execute(conn).await?;
            Ok(())
        })
    })
    .await
}

pub(super) async fn find(db: &Database, user_id: i64) -> Result<Option<Profile>, sqlx::Error> {
    db.run(move |conn| {
        Box::pin(
            sqlx::query_as("select user_id, username, email, saga_id from profiles where user_id = $1")
                .bind(user_id)
                .fetch_optional(conn),
        )
    })
    .await
}

/// Answers `user.create` of this saga.
pub(super) async fn create(
    db: &Database,
    saga_id: Uuid,
    profile: Profile,
    rules: &HouseRules,
) -> Result<Decided, sqlx::Error> {
    const COMMAND: &str = "user.create";
    let allowed = rules.check(&profile);
    db.transaction(move |conn| {
        Box::pin(async move {
            one_at_a_time(conn, profile.user_id).await?;
            if let Some(decided) = earlier(conn, saga_id, COMMAND).await? {
                return Ok(decided);
            }
            let outcome = match allowed {
                Ok(()) => try_insert(conn, &profile).await?,
                refused => refused,
            };
            remember(conn, saga_id, COMMAND, profile.user_id, outcome.err()).await
        })
    })
    .await
}

/// Answers `user.delete` of this saga: nothing about the user is left, whether or not there was
/// anything.
pub(super) async fn erase(db: &Database, saga_id: Uuid, user_id: i64) -> Result<Decided, sqlx::Error> {
    const COMMAND: &str = "user.delete";
    db.transaction(move |conn| {
        Box::pin(async move {
            one_at_a_time(conn, user_id).await?;
            if let Some(decided) = earlier(conn, saga_id, COMMAND).await? {
                return Ok(decided);
            }
            sqlx::query("insert into erased_users (user_id) values ($1) on conflict do nothing")
                .bind(user_id)
                .execute(&mut *conn)
                .await?;
            sqlx::query("delete from profiles where user_id = $1").bind(user_id).execute(&mut *conn).await?;
            remember(conn, saga_id, COMMAND, user_id, None).await
        })
    })
    .await
}

/// The original fleet's create, which names no saga.
pub(super) async fn create_without_saga(
    db: &Database,
    profile: Profile,
    rules: &HouseRules,
) -> Result<Result<(), Refusal>, sqlx::Error> {
    if let Err(refusal) = rules.check(&profile) {
        return Ok(Err(refusal));
    }
    db.transaction(move |conn| {
        Box::pin(async move {
            one_at_a_time(conn, profile.user_id).await?;
            try_insert(conn, &profile).await
        })
    })
    .await
}

/// A create and an erasure of one user can come at the same moment, one by gRPC and one by Kafka.
/// Without this the create could look for a tombstone just before it is laid, and insert just after.
async fn one_at_a_time(conn: &mut PgConnection, user_id: i64) -> Result<(), sqlx::Error> {
    sqlx::query("select pg_advisory_xact_lock($1)").bind(user_id).execute(conn).await.map(|_| ())
}

async fn try_insert(conn: &mut PgConnection, profile: &Profile) -> Result<Result<(), Refusal>, sqlx::Error> {
    let erased: bool = sqlx::query_scalar("select exists (select from erased_users where user_id = $1)")
        .bind(profile.user_id)
        .fetch_one(&mut *conn)
        .await?;
    if erased {
        return Ok(Err(Refusal::Erased));
    }
    let inserted = sqlx::query(
        "insert into profiles (user_id, username, email, saga_id) values ($1, $2, $3, $4) on conflict do nothing",
    )
    .bind(profile.user_id)
    .bind(&profile.username)
    .bind(&profile.email)
    .bind(profile.saga_id)
    .execute(conn)
    .await?
    .rows_affected();
    Ok(if inserted == 1 { Ok(()) } else { Err(Refusal::Present) })
}

async fn earlier(conn: &mut PgConnection, saga_id: Uuid, command: &str) -> Result<Option<Decided>, sqlx::Error> {
    sqlx::query_as("select refusal, decided_at from inbox where saga_id = $1 and command = $2")
        .bind(saga_id)
        .bind(command)
        .fetch_optional(conn)
        .await
}

async fn remember(
    conn: &mut PgConnection,
    saga_id: Uuid,
    command: &str,
    user_id: i64,
    refusal: Option<Refusal>,
) -> Result<Decided, sqlx::Error> {
    sqlx::query_as(
        "insert into inbox (saga_id, command, user_id, refusal) values ($1, $2, $3, $4)
         returning refusal, decided_at",
    )
    .bind(saga_id)
    .bind(command)
    .bind(user_id)
    .bind(refusal.map(|refusal| refusal.to_string()))
    .fetch_one(conn)
    .await
}

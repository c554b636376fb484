//! Bringing the schema up to date, safely when many replicas start at once, and seeing that it stays so.
//!
//! - [`schema`], [`comparison`]: what this program needs, and what a database lacks of it;
//! - [`inspection`]: a look at a live database; `repair`: what can be put back;
//! - [`server`]: what the server itself must be like;
//! - `adoption`: the accounts of the replaced service.

mod adoption;
pub mod comparison;
pub mod inspection;
mod repair;
pub mod schema;
pub mod server;

use std::time::Duration;

use outbox_relay::{
    archive::{self, Unpositioned},
    session,
};
use sqlx::{
    Connection, PgConnection,
    migrate::{MigrateError, Migrator},
    postgres::{PgAdvisoryLock, PgConnectOptions},
};

/// All migrations, in the binary.
static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

const LOCK: &str = "auth-service migrations";
const LOCK_POLL: Duration = Duration::from_millis(200);

/// Adopting a large table may take longer than a request may.
const SESSION: [(&str, &str); 3] =
    [("statement_timeout", "0"), ("lock_timeout", "0"), ("idle_in_transaction_session_timeout", "0")];

/// What was done.
#[derive(Debug, Default)]
pub struct Migrated {
    /// How many migrations were applied.
    pub applied: usize,
    /// What was lost and is back, a sentence each.
    pub put_back: Vec<String>,
}

/// Why the schema was not brought up to date.
#[derive(Debug, thiserror::Error)]
pub enum SchemaError {
    /// The database could not be reached or refused.
    #[error(transparent)]
    Database(#[from] sqlx::Error),
    /// A migration failed.
    #[error(transparent)]
    Migration(#[from] MigrateError),
    /// Accounts that differ only in case can't all stay.
    #[error(
        "nothing was changed: these accounts have names that differ only in case, and from now on those are one \
         and the same: {}. Rename or delete all but one of each, then migrate again", .0.join("; ")
    )]
    CaseDuplicates(
        /// `username ada: id 1, id 2`
        Vec<String>,
    ),
    /// The server, or a table that is there already, can't be used.
    #[error("nothing was changed: {}", .0.join("; "))]
    Unfit(
        /// A sentence for each reason.
        Vec<String>,
    ),
    /// Something is lost that can't be put back.
    #[error("the schema is not whole, and this can't be put back: {}", .0.join("; "))]
    Incomplete(
        /// A sentence for each thing.
        Vec<String>,
    ),
}

/// Migrates, and puts back what was lost of the schema.
///
/// A connection of its own, dropped on any error: sqlx's migrator leaves its session lock behind
/// when it fails, and a pooled connection would keep it for ever. The lock is polled for instead of
/// waited on, because a waiting session holds a snapshot that `create index concurrently` elsewhere
/// would wait for in turn.
///
/// # Errors
///
/// See [`SchemaError`].
pub async fn run(options: &PgConnectOptions) -> Result<Migrated, SchemaError> {
    if server::is_pooled_by_transaction(options).await? {
        return Err(SchemaError::Unfit(vec![server::POOLED_BY_TRANSACTION.to_owned()]));
    }
    let mut conn = PgConnection::connect_with(options).await?;
    session::configure(&mut conn, &SESSION).await?;
    let lock = PgAdvisoryLock::new(LOCK);
    loop {
        use sqlx::Either;
        match lock.try_acquire(conn).await? {
            Either::Left(mut guard) => {
                let migrated = migrate(guard.as_mut()).await;
                let conn = guard.release_now().await?;
                conn.close().await?;
                return migrated;
            }
            Either::Right(unlocked) => conn = unlocked,
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

async fn migrate(conn: &mut PgConnection) -> Result<Migrated, SchemaError> {
    let verdict = server::ask(conn, 0).await?;
    let unfit = [verdict.unfit, verdict.problems, wrong_place(conn).await?, adoption::unfit_ids(conn).await?].concat();
    if !unfit.is_empty() {
        return Err(SchemaError::Unfit(unfit));
    }
    adoption::name_accounts(conn).await?;
    let before = inspection::applied(conn).await?.len();
    let mut migrator = Migrator { migrations: MIGRATOR.migrations.clone(), ..Migrator::DEFAULT };
    // An older binary must be able to start beside a newer schema: deploys roll.
    migrator.set_ignore_missing(true).set_locking(false);
    migrator.run_direct(None, conn, false).await?;
    let applied = inspection::applied(conn).await?.len() - before;
    let repaired = repair::repair(conn).await?;
    if !repaired.left.is_empty() {
        return Err(SchemaError::Incomplete(repaired.left));
    }
    // Before the first event: a day that has rows in the default partition gets no partition of its own any more.
    archive::keep_up(conn, chrono::Utc::now().date_naive(), None).await?;
    Ok(Migrated { applied, put_back: repaired.put_back })
}

/// Events that are archived as published without a position in Kafka. The schema has to be up to date.
pub async fn unpositioned_events(options: &PgConnectOptions) -> Result<Option<Unpositioned>, sqlx::Error> {
    let mut conn = PgConnection::connect_with(options).await?;
    // A large archive takes a while to look through.
    session::configure(&mut conn, &SESSION).await?;
    let found = archive::unpositioned(&mut conn).await?;
    conn.close().await?;
    Ok(found)
}

/// New tables would hide those that are in use, all accounts with them: somebody has made a schema that comes first in
/// the search path.
async fn wrong_place(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    let (current, found): (Option<String>, Option<String>) = sqlx::query_as(
        "select current_schema()::text,
                (select n.nspname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
                  where c.oid in (to_regclass('_sqlx_migrations'), to_regclass('auth_users')) limit 1)",
    )
    .fetch_one(conn)
    .await?;
    Ok(match (current, found) {
        (None, _) => vec!["search_path names no schema that exists".to_owned()],
        (Some(current), Some(found)) if current != found => vec![format!(
            "the tables are in the schema {found}, and new ones would be made in the schema {current}, which comes \
             first in search_path and would hide them: set search_path to {found} for this role, or drop {current}"
        )],
        _ => vec![],
    })
}

//! Bringing the schema up to date, safely when many replicas start at once.

mod adoption;

use std::time::Duration;

use sqlx::{
    Connection, Executor, PgConnection,
    migrate::{MigrateError, Migrator},
    postgres::{PgAdvisoryLock, PgConnectOptions},
};

/// All migrations, in the binary.
static MIGRATOR: Migrator = sqlx::migrate!("./migrations");

const LOCK: &str = "auth-service migrations";
const LOCK_POLL: Duration = Duration::from_millis(200);

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
}

/// Migrates. Answers how many migrations were applied.
///
/// A connection of its own, dropped on any error: sqlx's migrator leaves its session lock behind
/// when it fails, and a pooled connection would keep it for ever. The lock is polled for instead of
/// waited on, because a waiting session holds a snapshot that `create index concurrently` elsewhere
/// would wait for in turn.
pub async fn run(options: &PgConnectOptions) -> Result<usize, SchemaError> {
    let mut conn = PgConnection::connect_with(options).await?;
    // Adopting a large table may take longer than a request may.
    conn.execute("set statement_timeout = 0; set lock_timeout = 0; set idle_in_transaction_session_timeout = 0")
        .await?;
    let lock = PgAdvisoryLock::new(LOCK);
    loop {
        use sqlx::Either;
        match lock.try_acquire(conn).await? {
            Either::Left(mut guard) => {
                let applied = apply(guard.as_mut()).await;
                let conn = guard.release_now().await?;
                conn.close().await?;
                return applied;
            }
            Either::Right(unlocked) => conn = unlocked,
        }
        tokio::time::sleep(LOCK_POLL).await;
    }
}

async fn apply(conn: &mut PgConnection) -> Result<usize, SchemaError> {
    adoption::name_accounts(conn).await?;
    let before = applied(conn).await?;
    let mut migrator = Migrator { migrations: MIGRATOR.migrations.clone(), ..Migrator::DEFAULT };
    // An older binary must be able to start beside a newer schema: deploys roll.
    migrator.set_ignore_missing(true).set_locking(false);
    migrator.run_direct(None, conn, false).await?;
    Ok(applied(conn).await? - before)
}

/// Whether every migration of this binary is applied.
pub async fn is_current(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    Ok(applied(conn).await? >= MIGRATOR.iter().count())
}

async fn applied(conn: &mut PgConnection) -> Result<usize, sqlx::Error> {
    let known: bool =
        sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(&mut *conn).await?;
    if !known {
        return Ok(0);
    }
    let versions: Vec<i64> = MIGRATOR.iter().map(|migration| migration.version).collect();
    let count: i64 = sqlx::query_scalar("select count(*) from _sqlx_migrations where success and version = any($1)")
        .bind(versions)
        .fetch_one(conn)
        .await?;
    Ok(count as usize)
}

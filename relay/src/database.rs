//! The one way to a pooled connection. A connection is lent for a piece of work, and comes back only when the work has
//! ended in order; in every other case it is closed.
//!
//! The driver (sqlx 0.9) rolls a transaction back when its handle is dropped, but counts a transaction only after the
//! server has answered BEGIN. If the future is dropped before that answer, nothing rolls back, the connection returns
//! to the pool inside a transaction, and whoever gets it next is answered for statements that never commit. So:
//!
//! - [`Database::run`] and [`Database::transaction`] do the work in a task of its own. Dropping the future that waits
//!   for it (a client that hangs up, a deadline above, a `select!`) drops nothing but the waiting. The work has a
//!   deadline of its own.
//! - A connection is given back when the work returned `Ok`, or an error that says the session is sound: a refusal of
//!   the values, a conflict, a lock that was not free. After a timeout, a panic or any other error it is closed.
//!   After a failover that is what lets go of the old server.
//! - Before a connection is lent again, the server itself is asked whether it is outside a transaction and whether it
//!   takes writes. That question takes the place of the driver's own ping and costs the same round trip.
//!
//! A pool can't be had around this: `.clippy.toml` forbids the driver's ways to make one and to take from one.

use std::{io, pin::Pin, sync::Arc, time::Duration};

use sqlx::{
    AssertSqlSafe, PgConnection, Postgres,
    pool::{PoolConnection, PoolConnectionMetadata},
    postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions},
};
use tokio::time::{error::Elapsed, timeout};
use tracing::Instrument;

use crate::session::{self, Setting};

/// A connection to a server that takes no writes is tried anew, but no more often than this: reads go on meanwhile.
const READ_ONLY_REST: Duration = Duration::from_secs(1);

/// A piece of work on a connection, as [`Database::run`] takes it.
pub type Work<'c, T, E> = Pin<Box<dyn Future<Output = Result<T, E>> + Send + 'c>>;

/// An error that work on a connection may end with.
pub trait WorkError: From<sqlx::Error> + Send + 'static {
    /// The database's own error, if that is what this is.
    fn database_error(&self) -> Option<&sqlx::Error>;
}

impl WorkError for sqlx::Error {
    fn database_error(&self) -> Option<&sqlx::Error> {
        Some(self)
    }
}

/// How many connections there may be, and how long anything may take.
#[derive(Debug, Clone, Copy)]
pub struct PoolSettings {
    /// Most connections at once.
    pub connections: u32,
    /// Longest wait for one.
    pub acquire_timeout: Duration,
    /// Longest time for one piece of work. The server has limits of its own; this one is for a connection that has
    /// fallen silent.
    pub work_timeout: Duration,
    /// What its sessions set beside what every session sets.
    pub session: &'static [Setting],
}

/// A pool of connections. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Database {
    pool: PgPool,
    /// What a session begins with.
    configuration: Arc<str>,
    work_timeout: Duration,
}

impl Database {
    /// Makes the pool. Nothing is connected before the first piece of work.
    #[expect(clippy::disallowed_methods, reason = "the one place where a pool is made")]
    pub fn new(options: PgConnectOptions, settings: PoolSettings) -> Self {
        // Leaves time to connect anew.
        let probe_timeout = settings.acquire_timeout * 2 / 3;
        let configuration: Arc<str> = session::statement(settings.session).into();
        let pool = PgPoolOptions::new()
            .max_connections(settings.connections)
            .acquire_timeout(settings.acquire_timeout)
            .after_connect(configuring(configuration.clone()))
            .test_before_acquire(false)
            .before_acquire(move |conn, about| {
                Box::pin(async move {
                    let usable = timeout(probe_timeout, probe(conn)).await;
                    Ok(match usable {
                        Ok(Ok(State { idle: true, writable })) => writable || about.age < READ_ONLY_REST,
                        Ok(Ok(State { idle: false, .. })) => {
                            tracing::error!("a pooled connection was inside a transaction; it is closed");
                            false
                        }
                        Ok(Err(_)) | Err(_) => false,
                    })
                })
            })
            .connect_lazy_with(options);
        Self { pool, configuration, work_timeout: settings.work_timeout }
    }

    /// Works on a connection, in a task of its own: the work goes on when the caller stops waiting for it.
    ///
    /// # Errors
    ///
    /// The work's own error; the pool's, when there is no connection; a timeout, when the work took too long.
    pub async fn run<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: WorkError,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        self.run_within(self.work_timeout, work).await
    }

    /// As [`run`](Self::run), with a deadline for this piece of work.
    ///
    /// # Errors
    ///
    /// See [`run`](Self::run).
    pub async fn run_within<T, E, W>(&self, limit: Duration, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: WorkError,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        // Who gives up here has begun nothing.
        let mut lent = self.take().await?;
        let task = async move {
            let result = timeout(limit, work(&mut lent.conn)).await;
            lent.settle(result)
        };
        match tokio::spawn(task.in_current_span()).await {
            Ok(result) => result,
            Err(failure) => match failure.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                Err(_) => Err(sqlx::Error::WorkerCrashed.into()),
            },
        }
    }

    /// Works in a transaction, in a task of its own: committed when the work returns `Ok`, else rolled back.
    ///
    /// # Errors
    ///
    /// See [`run`](Self::run).
    pub async fn transaction<T, E, W>(&self, work: W) -> Result<T, E>
    where
        T: Send + 'static,
        E: WorkError,
        W: for<'c> FnOnce(&'c mut PgConnection) -> Work<'c, T, E> + Send + 'static,
    {
        self.run(move |conn| {
            Box::pin(async move {
                let mut tx = sqlx::Connection::begin(conn).await?;
                let value = work(&mut tx).await?;
                tx.commit().await?;
                Ok(value)
            })
        })
        .await
    }

    /// Works on a connection where the caller stands. For tasks that nobody cancels but by ending the relay: if this
    /// future is dropped in its middle, the connection is closed.
    pub(crate) async fn lend<T, E: WorkError>(
        &self,
        limit: Duration,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T, E>,
    ) -> Result<T, E> {
        let mut lent = self.take().await?;
        let result = timeout(limit, work(&mut lent.conn)).await;
        lent.settle(result)
    }

    /// A listener on a connection of its own, which never comes to anybody else.
    #[expect(clippy::disallowed_methods, reason = "a pool of one, for the driver's listener to reconnect with")]
    pub(crate) async fn listener(&self) -> Result<PgListener, sqlx::Error> {
        let options = self.pool.connect_options().as_ref().clone();
        let pool = PgPoolOptions::new().max_connections(1).max_lifetime(None).idle_timeout(None);
        let pool = pool.after_connect(configuring(self.configuration.clone()));
        PgListener::connect_with(&pool.connect_lazy_with(options)).await
    }

    /// Refuses new work and waits for what is under way, also for work whose caller has gone.
    pub async fn close(&self) {
        self.pool.close().await;
    }

    /// How many connections there are, and how many of them are free.
    pub fn connections(&self) -> (u32, usize) {
        (self.pool.size(), self.pool.num_idle())
    }

    #[expect(clippy::disallowed_methods, reason = "the one place where a connection is taken")]
    async fn take(&self) -> Result<Lent, sqlx::Error> {
        Ok(Lent { conn: self.pool.acquire().await?, sound: false })
    }
}

/// A connection that is closed when it is dropped, unless the work on it ended in order.
struct Lent {
    conn: PoolConnection<Postgres>,
    sound: bool,
}

impl Lent {
    /// The work is over: gives the connection back, or not.
    fn settle<T, E: WorkError>(mut self, result: Result<Result<T, E>, Elapsed>) -> Result<T, E> {
        let Ok(result) = result else {
            return Err(sqlx::Error::from(io::Error::from(io::ErrorKind::TimedOut)).into());
        };
        self.sound = match &result {
            Ok(_) => true,
            Err(error) => error.database_error().is_none_or(leaves_sound),
        };
        result
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        if !self.sound {
            metrics::counter!("database_connections_condemned_total").increment(1);
            self.conn.close_on_drop();
        }
    }
}

/// Whether a session that gave this error can be used again. What is not known to be harmless is not.
fn leaves_sound(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::RowNotFound | sqlx::Error::ColumnDecode { .. } | sqlx::Error::Decode(_) => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| is_sound_code(&code)),
        _ => false,
    }
}

fn is_sound_code(code: &str) -> bool {
    const CLASSES: [&str; 7] = [
        "22", // a value
        "23", // a constraint
        "40", // a conflict, a deadlock
        "42", // a name, a right
        "54", // too much of something
        "55", // a lock that is not free
        "P0", // raised by a function
    ];
    const UNSOUND: [&str; 2] = [
        "40003", // whether the statement took effect is unknown
        "42P05", // the session has a prepared statement that the driver doesn't know
    ];
    code == "57014" || CLASSES.iter().any(|class| code.starts_with(class)) && !UNSOUND.contains(&code)
}

/// Does to a new connection what every one of a pool has to go through.
fn configuring(
    statement: Arc<str>,
) -> impl for<'c> Fn(&'c mut PgConnection, PoolConnectionMetadata) -> Work<'c, (), sqlx::Error> + Send + Sync + 'static
{
    move |conn, _| {
        let statement = statement.clone();
        Box::pin(async move {
            sqlx::raw_sql(AssertSqlSafe(&*statement)).execute(conn).await?;
            Ok(())
        })
    }
}

/// What the server says of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq, sqlx::FromRow)]
struct State {
    /// Outside a transaction.
    idle: bool,
    /// A transaction may write.
    writable: bool,
}

/// Asks the server. A transaction begins with its first statement: where this statement is the first, both clocks
/// agree. In a transaction that has failed, this fails too.
async fn probe(conn: &mut PgConnection) -> Result<State, sqlx::Error> {
    const PROBE: &str = "select now() = statement_timestamp() as idle,
                                current_setting('transaction_read_only') = 'off' as writable";
    // Unprepared: one round trip, and the same behind a pooler.
    sqlx::Executor::fetch_one(conn, sqlx::raw_sql(PROBE)).await.and_then(|row| sqlx::FromRow::from_row(&row))
}

//! SQL, one table a file: free functions on the caller's connection, which decides about the
//! transaction. A table is named by its own file only, with one exception: a session's statements
//! join `auth_users`, because a refresh has to look at the session and at its user at once.

pub mod audit;
pub mod sessions;
pub mod users;

use std::time::Duration;

use outbox_relay::{Database, PoolSettings};
use sqlx::PgConnection;

use crate::config::DatabaseConfig;

/// How long a use case waits for its statements. The server has its own limit; this one is for a
/// connection that has fallen silent.
const WORK_TIMEOUT: Duration = Duration::from_secs(6);

/// The pool for requests, sagas and housekeeping.
pub fn pool(config: &DatabaseConfig) -> Database {
    let settings = PoolSettings {
        connections: config.pool_size,
        acquire_timeout: config.acquire_timeout,
        work_timeout: WORK_TIMEOUT,
        session: &[],
    };
    Database::new(config.options.clone(), settings)
}

/// What became of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// It has taken effect.
    Committed,
    /// It never will.
    Aborted,
    /// Its backend is still at it, or this server does not remember.
    Unsettled,
}

/// Asks the server what became of a transaction whose COMMIT was not answered.
pub async fn fate_of(conn: &mut PgConnection, transaction: &str) -> Result<Fate, sqlx::Error> {
    let status: Option<String> =
        sqlx::query_scalar("select pg_xact_status($1::text::xid8)").bind(transaction).fetch_one(conn).await?;
    Ok(match status.as_deref() {
        Some("committed") => Fate::Committed,
        Some("aborted") => Fate::Aborted,
        _ => Fate::Unsettled,
    })
}

/// Whether the error says that the database can't serve just now: the same request may well
/// succeed later, unchanged.
pub fn is_away(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Io(_)
        | sqlx::Error::Tls(_)
        | sqlx::Error::Protocol(_)
        | sqlx::Error::PoolTimedOut
        | sqlx::Error::PoolClosed
        | sqlx::Error::WorkerCrashed
        | sqlx::Error::BeginFailed => true,
        sqlx::Error::Database(error) => error.code().is_some_and(|code| is_away_code(&code)),
        _ => false,
    }
}

fn is_away_code(code: &str) -> bool {
    const CLASSES: [&str; 6] = [
        "08", // connection
        "28", // not let in
        "3D", // no such database
        "40", // serialization failure, deadlock
        "53", // out of connections, memory, disk
        "57", // shutting down, starting up, statement cancelled
    ];
    const CODES: [&str; 6] = [
        "25006", // read-only: the server was demoted, or is not promoted yet
        "25P03", // idle in transaction for too long
        "42P01", // no such table: not migrated yet
        "54000", // no transaction ids left: the server takes no writes
        "55000", // the database takes no connections
        "55P03", // lock not available
    ];
    CLASSES.iter().any(|class| code.starts_with(class)) || CODES.contains(&code)
}

/// Whether a failed COMMIT may have taken effect all the same: nobody said that it did not.
pub fn leaves_doubt(error: &sqlx::Error) -> bool {
    match error {
        // Only a server that answers a COMMIT with an error of these kinds goes away over it; any
        // other error is its refusal.
        sqlx::Error::Database(error) => {
            error.code().is_none_or(|code| code.starts_with("08") || code.starts_with("57P") || code == "40003")
        }
        _ => true,
    }
}

/// The constraint an error names.
pub fn violated(error: &sqlx::Error) -> Option<&str> {
    error.as_database_error().and_then(|error| error.constraint())
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[test]
    fn silence_and_a_full_pool_are_absence_but_a_bug_is_not() {
        assert!(is_away(&io::Error::from(io::ErrorKind::ConnectionReset).into()));
        assert!(is_away(&sqlx::Error::PoolTimedOut));
        assert!(!is_away(&sqlx::Error::RowNotFound));
        assert!(!is_away(&sqlx::Error::ColumnNotFound("x".to_owned())));
    }

    #[test]
    fn codes_of_a_server_that_cannot_serve_are_told_from_refusals() {
        for code in ["57P01", "57P03", "53300", "08006", "40001", "25006", "42P01", "3D000", "54000"] {
            assert!(is_away_code(code), "{code}");
        }
        for code in ["23505", "22021", "42703", "25P02"] {
            assert!(!is_away_code(code), "{code}");
        }
    }

    #[test]
    fn a_commit_that_was_not_answered_is_in_doubt() {
        assert!(leaves_doubt(&io::Error::from(io::ErrorKind::UnexpectedEof).into()));
        assert!(leaves_doubt(&sqlx::Error::WorkerCrashed));
    }
}

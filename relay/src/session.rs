//! The settings of our database sessions, all in this place.
//!
//! What a server, a database or a role has as its default is somebody else's choice, made for other programs: a
//! stricter isolation would make every busy key a conflict, `synchronous_commit = off` would lose what was answered.
//! So a session sets for itself whatever the code takes for granted. It does so by a statement after connecting,
//! because PgBouncer refuses startup parameters. One default is left as it is: where somebody has made a database
//! read-only (a provider whose disk is full, say), it stays so, and readiness says it.

use sqlx::{AssertSqlSafe, PgConnection};

/// A setting and its value.
pub type Setting = (&'static str, &'static str);

/// What every session begins with.
const EVERY: [Setting; 15] = [
    // A request that has waited this long has nobody waiting for it any more.
    ("statement_timeout", "15s"),
    ("lock_timeout", "5s"),
    ("idle_in_transaction_session_timeout", "30s"),
    ("idle_session_timeout", "0"),
    ("transaction_timeout", "0"),
    // The server notices a client that is gone before its locks become a problem.
    ("tcp_keepalives_idle", "15"),
    ("tcp_keepalives_interval", "5"),
    ("tcp_keepalives_count", "3"),
    ("tcp_user_timeout", "30s"),
    // Statements look at what was committed when they begin: locks and guards are made for that.
    ("default_transaction_isolation", "read committed"),
    ("default_transaction_deferrable", "off"),
    // Rows that a policy hides are an error, not absent.
    ("row_security", "off"),
    ("standard_conforming_strings", "on"),
    ("IntervalStyle", "postgres"),
    // Definitions are compared as text.
    ("quote_all_identifiers", "off"),
];

/// What a relay's sessions have besides. Its statements are planned anew each time, because arrays of ids are known
/// only then, and never by a sequential scan: statistics taken while the outbox was empty would recommend one. Where
/// there is no other way, that makes a plan look so dear that PostgreSQL would compile it, for longer than any of them
/// runs. Its transactions wait for nothing but the database: one that stands open belongs to a process that is frozen,
/// and keeps others from the rows it has locked.
pub const RELAY: [Setting; 5] = [
    ("plan_cache_mode", "force_custom_plan"),
    ("enable_seqscan", "off"),
    ("jit", "off"),
    ("idle_in_transaction_session_timeout", "5s"),
    ("statement_timeout", "30s"),
];

/// Sets what every session has, and `more` over it.
///
/// # Errors
///
/// The database's.
pub async fn configure(conn: &mut PgConnection, more: &[Setting]) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(AssertSqlSafe(statement(more))).execute(conn).await?;
    Ok(())
}

/// One round trip. A setting that this server has not got yet is left out. Commits that wait for less than this
/// server's disk are made to wait for it and for a standby that stands guard; who has chosen more keeps it.
pub(crate) fn statement(more: &[Setting]) -> String {
    let kept = EVERY.iter().filter(|(name, _)| !more.iter().any(|(other, _)| other == name));
    let values: Vec<String> = kept.chain(more).map(|(name, value)| format!("('{name}', '{value}')")).collect();
    format!(
        "select set_config(name, value, false) from (values {}) s (name, value)
          where current_setting(name, true) is not null;
         select set_config('synchronous_commit', 'on', false)
          where current_setting('synchronous_commit') in ('off', 'local')",
        values.join(", ")
    )
}

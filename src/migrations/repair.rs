//! Puts back what a database has lost of the schema, where nothing has to be guessed for it.
//!
//! What stood in a column that was dropped is gone. Only what follows from other columns comes back: the names that
//! accounts are found under (`adoption`), and whose saga a user belongs to. A session whose state is gone is over: to
//! bring it back might bring back one that was ended. Every step stands or falls alone, so that one that the rows
//! contradict (a duplicate, say) keeps no other from being done.

use std::collections::HashMap;

use sqlx::{AssertSqlSafe, Connection, PgConnection};

use super::{
    comparison::{Difference, Mend},
    inspection::{Inspection, highest_sql, inspect},
    schema::{Fact, Kind},
};

/// A table, then what belongs to it, then a last look.
const ROUNDS: usize = 3;

const OF_USERS: [&str; 2] = ["status", "create_saga_id"];
const OF_SESSIONS: [&str; 13] = [
    "session_id",
    "generation",
    "jti",
    "kid",
    "issued_at",
    "expires_at",
    "absolute_expires_at",
    "rotated_at",
    "earlier_rotations",
    "revoked_at",
    "revoked_reason",
    "user_agent",
    "legacy_token_hash",
];

/// What was put back, and what could not be.
#[derive(Debug, Default)]
pub struct Repaired {
    /// A sentence for each thing that is as it was.
    pub put_back: Vec<String>,
    /// A sentence for each thing that is not, with the reason.
    pub left: Vec<String>,
}

/// Puts back what it can. Does nothing where a newer program has migrated: it knows better.
///
/// # Errors
///
/// The database's, where it can't be worked with at all.
pub async fn repair(conn: &mut PgConnection) -> Result<Repaired, sqlx::Error> {
    let mut repaired = Repaired::default();
    let found = inspect(conn).await?;
    if found.is_newer {
        return Ok(repaired);
    }
    if let Some(why) = refill(conn, &found).await? {
        repaired.left.push(why);
    }
    // Again, since what has come back may lack its constraints and indexes.
    let mut lost = found.differences;
    let mut reasons = HashMap::new();
    for _ in 0..ROUNDS {
        let still = inspect(conn).await?.differences;
        let back = lost.into_iter().filter(|difference| !still.contains(difference));
        repaired.put_back.extend(back.map(|difference| difference.what));
        lost = still;
        for difference in &lost {
            if let Some(why) = mend(conn, difference).await? {
                reasons.insert(difference.what.clone(), why);
            }
        }
    }
    for Difference { what, .. } in inspect(conn).await?.differences {
        let why = reasons.remove(&what).unwrap_or_else(|| "it did not stay".to_owned());
        repaired.left.push(format!("{what}: {why}"));
    }
    // Last: a column may have got its sequence a moment ago.
    for spent in inspect(conn).await?.spent {
        let (table, column, sequence) = (&spent.table, &spent.column, &spent.sequence);
        let highest = highest_sql(table, column);
        // Nobody may take a number meanwhile, which would be given out twice then.
        let steps = [
            format!("lock table {table} in share row exclusive mode"),
            format!(
                "select setval('{sequence}', greatest(({highest}), (select last_value from {sequence})))",
                sequence = sequence.replace('\'', "''")
            ),
        ];
        match run(conn, &steps).await? {
            None => repaired.put_back.push(spent.to_string()),
            Some(why) => repaired.left.push(format!("{spent}: {why}")),
        }
    }
    Ok(repaired)
}

/// `None` when it is done, else why it isn't.
async fn mend(conn: &mut PgConnection, difference: &Difference) -> Result<Option<String>, sqlx::Error> {
    match &difference.mend {
        Mend::Always(steps) => run(conn, steps).await,
        Mend::WhereEmpty(steps) => {
            let empty = format!("select not exists (select from {})", difference.needed.table);
            match sqlx::query_scalar(AssertSqlSafe(empty)).fetch_one(&mut *conn).await? {
                true => run(conn, steps).await,
                false => Ok(Some("what stood in it can only come from a backup".to_owned())),
            }
        }
        Mend::Never if difference.needed.kind == Kind::Table => {
            Ok(Some("its rows can only come from a backup".to_owned()))
        }
        Mend::Never => Ok(Some("to change it might change what it holds".to_owned())),
    }
}

/// One transaction. An error that is the statements' own is an answer.
async fn run(conn: &mut PgConnection, steps: &[String]) -> Result<Option<String>, sqlx::Error> {
    let mut tx = conn.begin().await?;
    for step in steps {
        match sqlx::raw_sql(AssertSqlSafe(step.clone())).execute(&mut *tx).await {
            Ok(_) => {}
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| !code.starts_with("57")) => {
                tx.rollback().await?;
                return Ok(Some(error.message().to_owned()));
            }
            Err(error) => return Err(error),
        }
    }
    tx.commit().await?;
    Ok(None)
}

/// The columns of users and sessions that the replaced service drops when it starts once more.
async fn refill(conn: &mut PgConnection, found: &Inspection) -> Result<Option<String>, sqlx::Error> {
    let missing = |table: &str, columns: &[&str]| -> Vec<&Fact> {
        let needed = found.differences.iter().filter(|d| matches!(d.mend, Mend::WhereEmpty(_))).map(|d| &d.needed);
        needed.filter(|fact| fact.table == table && columns.contains(&fact.name.as_str())).collect()
    };
    let (users, sessions) = (missing("auth_users", &OF_USERS), missing("refresh_tokens", &OF_SESSIONS));
    let mut steps: Vec<String> = users
        .iter()
        .chain(&sessions)
        .map(|Fact { table, name, definition, .. }| format!("alter table {table} add column {name} {definition}"))
        .collect();
    if !users.is_empty() {
        steps.push(include_str!("refill_users.sql").to_owned());
    }
    if !sessions.is_empty() {
        steps.push(include_str!("refill_sessions.sql").to_owned());
    }
    match steps.is_empty() {
        true => Ok(None),
        false => run(conn, &steps).await,
    }
}

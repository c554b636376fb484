//! What the server itself must be like. What a session can set for itself it sets (`outbox_relay::session`); what is
//! left is asked here.

use std::{io, time::Duration};

use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::time::timeout;

/// `nulls not distinct`, which the outbox needs, came with it.
const OLDEST: i32 = 15;
/// PostgreSQL takes no more writes when this many transaction ids are left, and warns when it is forty million.
const NO_IDS_LEFT: i64 = 3_000_000;
const FEW_IDS_LEFT: i64 = 40_000_000;

/// For two connections and a few statements.
const PATIENCE: Duration = Duration::from_secs(15);

/// What was found out about a server.
#[derive(Debug, Clone, sqlx::FromRow)]
struct Server {
    version: i32,
    encoding: String,
    is_standby: bool,
    replication_role: String,
    fsync: bool,
    full_page_writes: bool,
    connections: i32,
    ids_left: i64,
}

/// Reasons not to use a server, and reasons to worry, a sentence each.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Verdict {
    /// Nothing here would work, or not as promised. It does not get better by waiting.
    pub unfit: Vec<String>,
    /// It does not work now.
    pub problems: Vec<String>,
    /// To be known.
    pub warnings: Vec<String>,
}

/// Asks the server; `connections` is how many this process may want.
///
/// # Errors
///
/// The database's.
pub async fn ask(conn: &mut PgConnection, connections: u32) -> Result<Verdict, sqlx::Error> {
    let server: Server = sqlx::query_as(
        "select current_setting('server_version_num')::int / 10000 as version,
                current_setting('server_encoding') as encoding,
                pg_is_in_recovery() as is_standby,
                current_setting('session_replication_role') as replication_role,
                current_setting('fsync')::boolean as fsync,
                current_setting('full_page_writes')::boolean as full_page_writes,
                (select min(most) from (values
                    (current_setting('max_connections')::int - current_setting('superuser_reserved_connections')::int
                     - coalesce(current_setting('reserved_connections', true)::int, 0)),
                    ((select nullif(rolconnlimit, -1) from pg_roles where rolname = current_user)),
                    ((select nullif(datconnlimit, -1) from pg_database where datname = current_database()))) l (most)
                ) as connections,
                (select 2147483647 - max(age(datfrozenxid))::bigint from pg_database where datallowconn) as ids_left",
    )
    .fetch_one(conn)
    .await?;
    Ok(server.judged(connections))
}

impl Server {
    fn judged(&self, wanted: u32) -> Verdict {
        let mut verdict = Verdict::default();
        if self.version < OLDEST {
            let version = self.version;
            verdict.unfit.push(format!("the server is PostgreSQL {version}: {OLDEST} or newer is needed"));
        }
        if self.encoding != "UTF8" {
            verdict.unfit.push(format!(
                "the database's encoding is {}, which can't hold every name: make one with ENCODING 'UTF8' (and \
                 TEMPLATE template0)",
                self.encoding
            ));
        }
        if self.is_standby {
            verdict.problems.push("the server is a standby and takes no writes: name the primary".to_owned());
        }
        if self.replication_role == "replica" {
            verdict.problems.push(
                "session_replication_role is replica, so that no foreign key is enforced: alter role … reset \
                 session_replication_role"
                    .to_owned(),
            );
        }
        if self.ids_left < NO_IDS_LEFT {
            verdict.problems.push(
                "the server takes no writes, because its transaction ids are used up: vacuum every database".to_owned(),
            );
        } else if self.ids_left < FEW_IDS_LEFT {
            let left = self.ids_left / 1_000_000;
            verdict.warnings.push(format!(
                "the server has {left} million transaction ids left and will soon take no writes: vacuum every database"
            ));
        }
        for (is_on, setting) in [(self.fsync, "fsync"), (self.full_page_writes, "full_page_writes")] {
            if !is_on {
                verdict.warnings.push(format!(
                    "{setting} is off: when the server's machine crashes, registrations that were answered are lost"
                ));
            }
        }
        let connections = self.connections;
        if i64::from(wanted) > i64::from(connections) {
            verdict.warnings.push(format!(
                "this process may want {wanted} connections (DB_POOL_SIZE and RELAY_POOL_SIZE), and the server lets \
                 this role have {connections}"
            ));
        }
        verdict
    }
}

/// Refuses a pooler that gives each transaction another server connection: there, settings reach other clients,
/// prepared statements and LISTEN get lost. Two sessions leave a mark each, and read it while both are in a
/// transaction; whatever else uses that pooler, a session of its own finds its own mark.
///
/// # Errors
///
/// The database's, and a timeout where two connections at once are too many.
pub async fn is_pooled_by_transaction(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    timeout(PATIENCE, leave_marks(options)).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
}

async fn leave_marks(options: &PgConnectOptions) -> Result<bool, sqlx::Error> {
    let (mut one, mut other) = (PgConnection::connect_with(options).await?, PgConnection::connect_with(options).await?);
    for (conn, mark) in [(&mut one, "one"), (&mut other, "other")] {
        run(conn, &format!("select set_config('auth_service.session', '{mark}', false)")).await?;
    }
    run(&mut other, "begin").await?;
    let others = mark(&mut other).await;
    let ones = match &others {
        Ok(_) => mark(&mut one).await,
        Err(_) => Ok(None),
    };
    let _ = one.close().await;
    let _ = other.close().await;
    Ok(others?.as_deref() != Some("other") || ones?.as_deref() != Some("one"))
}

/// What is said of such a pooler.
pub const POOLED_BY_TRANSACTION: &str = "the pooler in front of PostgreSQL gives each transaction another connection \
    (PgBouncer's pool_mode = transaction): give this service a pool with pool_mode = session, or the server's own port";

/// Unprepared, as a pooler may pass nothing else on.
async fn run(conn: &mut PgConnection, sql: &str) -> Result<(), sqlx::Error> {
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql.to_owned())).execute(conn).await?;
    Ok(())
}

async fn mark(conn: &mut PgConnection) -> Result<Option<String>, sqlx::Error> {
    use sqlx::{Executor, Row};
    let sql = sqlx::raw_sql("select current_setting('auth_service.session', true)");
    conn.fetch_one(sql).await?.try_get(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn good() -> Server {
        Server {
            version: 15,
            encoding: "UTF8".to_owned(),
            is_standby: false,
            replication_role: "origin".to_owned(),
            fsync: true,
            full_page_writes: true,
            connections: 97,
            ids_left: 2_000_000_000,
        }
    }

    #[test]
    fn a_server_is_refused_warned_of_or_good() {
        assert_eq!(good().judged(16), Verdict::default());
        let old = Server { version: 14, encoding: "SQL_ASCII".to_owned(), ..good() }.judged(16);
        assert_eq!(old.unfit.len(), 2, "{old:?}");
        assert!(old.unfit[0].contains("PostgreSQL 14: 15 or newer"), "{old:?}");
        let down = Server { is_standby: true, replication_role: "replica".to_owned(), ids_left: 2_999_999, ..good() };
        assert_eq!(down.judged(16).problems.len(), 3);
        let risky = Server { fsync: false, full_page_writes: false, connections: 15, ids_left: 39_000_000, ..good() };
        let risky = risky.judged(16);
        assert_eq!((risky.warnings.len(), risky.problems.len(), risky.unfit.len()), (4, 0, 0), "{risky:?}");
    }
}

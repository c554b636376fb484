//! Taking the database away, and giving it back.

use sqlx::{AssertSqlSafe, Connection, Executor, PgConnection};

use super::{TestService, parts::PARTS};

impl TestService {
    /// Nobody gets in any more, and whoever was in is thrown out.
    pub async fn cut_database(&self) {
        let name = &self.database;
        admin(format!("alter database {name} with allow_connections false")).await;
        admin(format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{name}'")).await;
    }

    /// As before.
    pub async fn mend_database(&self) {
        admin(format!("alter database {} with allow_connections true", self.database)).await;
    }
}

async fn admin(sql: String) {
    let mut conn = PgConnection::connect_with(&PARTS.connect_options("postgres")).await.expect("the cluster");
    conn.execute(AssertSqlSafe(sql)).await.expect("the outage");
}

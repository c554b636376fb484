//! Whether this instance can serve. Being alive is another question, which no dependency answers.

use std::{
    fmt,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use tokio::time::timeout;

use crate::{app::App, migrations};

/// A probe that waits longer is a probe that fails.
const PATIENCE: Duration = Duration::from_secs(2);

/// Remembers what need not be asked again.
#[derive(Debug, Default)]
pub struct Health {
    /// A schema that was current stays so: migrations only go forward.
    schema_is_current: AtomicBool,
}

/// The answer. Brokers don't count: requests are served without them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    /// Send requests.
    Ready,
    /// It is being stopped; send requests elsewhere.
    Draining,
    /// The database does not answer.
    DatabaseAway,
    /// The database takes no writes: a standby, or a server that was demoted.
    DatabaseReadOnly,
    /// The database has not been migrated yet.
    SchemaBehind,
    /// These tasks of this process have failed and don't run yet.
    TasksDown(Vec<String>),
}

impl Health {
    /// Looks whether this instance can serve right now.
    pub async fn check(&self, app: &App) -> Readiness {
        if app.shutdown.draining.is_cancelled() {
            return Readiness::Draining;
        }
        let down: Vec<String> =
            app.supervisor.tasks().into_iter().filter(|(_, task)| !task.up).map(|(name, _)| name).collect();
        if !down.is_empty() {
            return Readiness::TasksDown(down);
        }
        let known = self.schema_is_current.load(Ordering::Relaxed);
        let asked = app.db.run(move |conn| {
            Box::pin(async move {
                let writable: bool = sqlx::query_scalar("select current_setting('transaction_read_only') = 'off'")
                    .fetch_one(&mut *conn)
                    .await?;
                Ok::<_, sqlx::Error>((writable, known || migrations::is_current(conn).await?))
            })
        });
        match timeout(PATIENCE, asked).await {
            Ok(Ok((false, _))) => {
                tracing::warn!("not ready: the database takes no writes");
                Readiness::DatabaseReadOnly
            }
            Ok(Ok((true, true))) => {
                self.schema_is_current.store(true, Ordering::Relaxed);
                Readiness::Ready
            }
            Ok(Ok((true, false))) => Readiness::SchemaBehind,
            Ok(Err(error)) => {
                tracing::warn!(%error, "not ready: the database does not answer");
                Readiness::DatabaseAway
            }
            Err(_) => {
                tracing::warn!("not ready: the database did not answer in time");
                Readiness::DatabaseAway
            }
        }
    }
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Readiness::Ready => f.write_str("ready"),
            Readiness::Draining => f.write_str("shutting down"),
            Readiness::DatabaseAway => f.write_str("the database does not answer"),
            Readiness::DatabaseReadOnly => f.write_str("the database takes no writes"),
            Readiness::SchemaBehind => f.write_str("the database's schema is behind: run `auth-service migrate`"),
            Readiness::TasksDown(names) => write!(f, "failed and not running again yet: {}", names.join(", ")),
        }
    }
}

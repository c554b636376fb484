//! Whether this instance can serve. Being alive is another question, which no dependency answers.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, Instant},
};

use outbox_relay::session;
use sqlx::{Connection, PgConnection, postgres::PgConnectOptions};
use tokio::{sync::Mutex, time::timeout};

use crate::{
    app::App,
    migrations::{inspection, server},
};

/// A probe that waits longer is a probe that fails.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a schema that was whole is taken to be so, and how long one that was not.
const WHOLE_FOR: Duration = Duration::from_secs(10);
const BROKEN_FOR: Duration = Duration::from_secs(1);

/// Remembers what need not be asked again at once.
#[derive(Debug, Default)]
pub struct Health {
    last: Mutex<Option<Look>>,
}

/// The last look at the server and the schema. Probes that come at once share one.
#[derive(Debug, Clone)]
struct Look {
    at: Instant,
    problems: Arc<[String]>,
}

impl Look {
    fn is_fresh(&self) -> bool {
        self.at.elapsed() < if self.problems.is_empty() { WHOLE_FOR } else { BROKEN_FOR }
    }
}

/// What was found at the start.
#[derive(Debug, Default)]
pub struct Examination {
    /// Not to be mended while this process runs, a sentence each.
    pub fatal: Vec<String>,
    /// To be known, a sentence each.
    pub warnings: Vec<String>,
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
    /// The database answers, and lacks something that is needed: a sentence each.
    DatabaseUnfit(Arc<[String]>),
    /// These tasks of this process have failed and don't run yet.
    TasksDown(Vec<String>),
}

impl Health {
    /// Looks at everything that is taken for granted later, before anything runs. `connections` is how many this
    /// process may want.
    ///
    /// # Errors
    ///
    /// The database's, where it can't be asked now.
    pub async fn examine(&self, options: &PgConnectOptions, connections: u32) -> Result<Examination, sqlx::Error> {
        if server::is_pooled_by_transaction(options).await? {
            return Ok(Examination { fatal: vec![server::POOLED_BY_TRANSACTION.to_owned()], ..Examination::default() });
        }
        let mut conn = PgConnection::connect_with(options).await?;
        session::configure(&mut conn, &[]).await?;
        let verdict = server::ask(&mut conn, connections).await?;
        if !verdict.unfit.is_empty() {
            return Ok(Examination { fatal: verdict.unfit, warnings: verdict.warnings });
        }
        let schema = inspection::inspect(&mut conn).await?;
        conn.close().await?;
        if schema.unapplied > 0 {
            return Ok(Examination { fatal: schema.problems(), warnings: verdict.warnings });
        }
        self.remember([verdict.problems, schema.problems()].concat()).await;
        Ok(Examination { fatal: vec![], warnings: verdict.warnings })
    }

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
        let known = {
            // Held while somebody looks.
            let Ok(last) = timeout(PATIENCE, self.last.lock()).await else { return Readiness::DatabaseAway };
            last.as_ref().filter(|look| look.is_fresh()).map(|look| look.problems.clone())
        };
        let asked = async {
            let writable = app.db.run(|conn| Box::pin(takes_writes(conn))).await?;
            match known {
                _ if !writable => Ok((false, Arc::default())),
                Some(problems) => Ok((true, problems)),
                None => self.look(app).await.map(|problems| (true, problems)),
            }
        };
        match timeout(PATIENCE, asked).await {
            Ok(Ok((false, _))) => {
                tracing::warn!("not ready: the database takes no writes");
                Readiness::DatabaseReadOnly
            }
            Ok(Ok((true, problems))) if problems.is_empty() => Readiness::Ready,
            Ok(Ok((true, problems))) => Readiness::DatabaseUnfit(problems),
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

    /// Looks, unless somebody else has done so a moment ago.
    async fn look(&self, app: &App) -> Result<Arc<[String]>, sqlx::Error> {
        let mut last = self.last.lock().await;
        if let Some(look) = last.as_ref().filter(|look| look.is_fresh()) {
            return Ok(look.problems.clone());
        }
        let problems = app.db.run(|conn| Box::pin(problems(conn))).await?;
        Ok(note(&mut last, problems))
    }

    async fn remember(&self, problems: Vec<String>) {
        note(&mut *self.last.lock().await, problems);
    }
}

async fn takes_writes(conn: &mut PgConnection) -> Result<bool, sqlx::Error> {
    sqlx::query_scalar("select current_setting('transaction_read_only') = 'off'").fetch_one(conn).await
}

async fn problems(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    let verdict = server::ask(conn, 0).await?;
    let schema = inspection::inspect(conn).await?;
    Ok([verdict.unfit, verdict.problems, schema.problems()].concat())
}

/// Says what has changed since the last look.
fn note(last: &mut Option<Look>, problems: Vec<String>) -> Arc<[String]> {
    let before = last.take().map(|look| look.problems).unwrap_or_default();
    for problem in problems.iter().filter(|problem| !before.contains(problem)) {
        tracing::error!("not ready: {problem}");
    }
    if problems.is_empty() && !before.is_empty() {
        tracing::info!("the database is again as it has to be");
    }
    metrics::describe_gauge!("auth_database_problems", "What the database lacks of what is needed; readiness names it");
    metrics::gauge!("auth_database_problems").set(problems.len() as f64);
    let problems: Arc<[String]> = problems.into();
    *last = Some(Look { at: Instant::now(), problems: problems.clone() });
    problems
}

impl fmt::Display for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Readiness::Ready => f.write_str("ready"),
            Readiness::Draining => f.write_str("shutting down"),
            Readiness::DatabaseAway => f.write_str("the database does not answer"),
            Readiness::DatabaseReadOnly => f.write_str("the database takes no writes"),
            Readiness::DatabaseUnfit(problems) => {
                let mut shown: String = problems.join("; ");
                if let Some((cut, _)) = shown.char_indices().nth(2000) {
                    shown.truncate(cut);
                    shown.push('…');
                }
                f.write_str(&shown)
            }
            Readiness::TasksDown(names) => write!(f, "failed and not running again yet: {}", names.join(", ")),
        }
    }
}

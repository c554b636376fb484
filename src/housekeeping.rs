//! Tidying up on a schedule: archive partitions, sessions that are over, the inbox, closed sagas.
//!
//! The scheduler fires on every replica, lets a job overlap itself and swallows panics; so each job
//! runs under a lock that only one process can hold, and says when it last succeeded. Nothing that a
//! promise hangs on is left to it. A job deletes in slices, each a short transaction of its own, and
//! ends after a while or when the process stops: what is left is for the next run.

use std::time::{Duration, Instant};

use chrono::Utc;
use outbox_relay::{Work, archive, inbox};
use saga_orchestrator::retention;
use sqlx::{Connection, PgConnection};
use tokio_cron_scheduler::{JobScheduler, JobSchedulerError};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{app::App, db};

/// Most rows a job deletes in one transaction: short enough not to hold anybody up.
const SLICE: i64 = 1000;
/// How long a job goes on deleting.
const LONGEST: Duration = Duration::from_secs(5 * 60);
/// Well above that: how long a run may take in all.
const PATIENCE: Duration = Duration::from_secs(15 * 60);

/// What is tidied up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Job {
    /// Partitions of days to come, and what `ARCHIVE_RETENTION` ends.
    Archive,
    /// Sessions that were over long ago.
    Sessions,
    /// `INBOX_RETENTION`.
    Inbox,
    /// `SAGA_RETENTION`.
    Sagas,
}

impl Job {
    const ALL: [Job; 4] = [Job::Archive, Job::Sessions, Job::Inbox, Job::Sagas];

    fn name(self) -> &'static str {
        match self {
            Job::Archive => "archive",
            Job::Sessions => "sessions",
            Job::Inbox => "inbox",
            Job::Sagas => "sagas",
        }
    }

    /// Seconds first. Spread over the hour, so that they don't meet.
    fn schedule(self) -> &'static str {
        match self {
            Job::Archive => "0 7 * * * *",
            Job::Sessions => "0 17 * * * *",
            Job::Inbox => "0 27 * * * *",
            Job::Sagas => "0 37 * * * *",
        }
    }

    async fn work(self, app: &App) -> Result<u64, sqlx::Error> {
        match self {
            Job::Archive => keep_archive(app).await,
            Job::Sessions => purge_sessions(app).await,
            Job::Inbox => purge_inbox(app).await,
            Job::Sagas => purge_sagas(app).await,
        }
    }
}

/// Runs the jobs until `shutdown`, and waits for one that is under way.
pub async fn run(app: App, shutdown: CancellationToken) -> Result<(), JobSchedulerError> {
    let mut scheduler = JobScheduler::new().await?;
    let running = TaskTracker::new();
    for job in Job::ALL {
        let (app, running) = (app.clone(), running.clone());
        let scheduled = tokio_cron_scheduler::Job::new_async(job.schedule(), move |_, _| {
            let app = app.clone();
            let work = running.track_future(async move { once(&app, job).await });
            Box::pin(work)
        })?;
        scheduler.add(scheduled).await?;
    }
    // The archive needs today's partition now, not at the next full hour.
    let first = app.clone();
    running.spawn(async move { once(&first, Job::Archive).await });
    scheduler.start().await?;
    shutdown.cancelled().await;
    scheduler.shutdown().await?;
    running.close();
    running.wait().await;
    Ok(())
}

/// One run of a job, if no other process (and no earlier run here) is at it.
pub async fn once(app: &App, job: Job) {
    let name = job.name();
    match guarded(app, job).await {
        Ok(Some(done)) => {
            tracing::info!(job = name, done, "housekeeping done");
            metrics::gauge!("housekeeping_last_success_seconds", "job" => name).set(Utc::now().timestamp() as f64);
        }
        Ok(None) => tracing::debug!(job = name, "housekeeping is under way elsewhere"),
        Err(error) => {
            tracing::warn!(job = name, %error, "housekeeping failed; it runs again at its next time");
            metrics::counter!("housekeeping_failures_total", "job" => name).increment(1);
        }
    }
}

async fn guarded(app: &App, job: Job) -> Result<Option<u64>, sqlx::Error> {
    let (db, app) = (app.db.clone(), app.clone());
    db.run_within(PATIENCE, move |conn| {
        Box::pin(async move {
            // Held by a transaction, so that it ends with the connection. It stands still for as long as the job works
            // on other connections, and holds nothing but the lock.
            let mut tx = conn.begin().await?;
            sqlx::raw_sql("set local idle_in_transaction_session_timeout = '15min'").execute(&mut *tx).await?;
            let free: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtext('housekeeping ' || $1))")
                .bind(job.name())
                .fetch_one(&mut *tx)
                .await?;
            if !free {
                return Ok(None);
            }
            let done = job.work(&app).await?;
            tx.commit().await?;
            Ok(Some(done))
        })
    })
    .await
}

async fn keep_archive(app: &App) -> Result<u64, sqlx::Error> {
    let now = Utc::now();
    let keep_from = now - app.config.retention.archive;
    let kept_up =
        app.db.run_within(LONGEST, move |conn| Box::pin(archive::keep_up(conn, now.date_naive(), Some(keep_from))));
    let upkeep = kept_up.await?;
    for left in &upkeep.left {
        tracing::warn!("archive partition {left}; it is tried again");
    }
    let made_and_dropped = (upkeep.made.len() + upkeep.dropped.len()) as u64;
    let purged = in_slices(app, move |conn| Box::pin(archive::purge_default(conn, keep_from, SLICE))).await?;
    Ok(made_and_dropped + purged)
}

async fn purge_sessions(app: &App) -> Result<u64, sqlx::Error> {
    in_slices(app, |conn| Box::pin(db::sessions::purge_ended(conn, SLICE))).await
}

async fn purge_inbox(app: &App) -> Result<u64, sqlx::Error> {
    let keep = app.config.retention.inbox;
    in_slices(app, move |conn| Box::pin(inbox::purge(conn, keep, SLICE))).await
}

async fn purge_sagas(app: &App) -> Result<u64, sqlx::Error> {
    let Some(keep) = app.config.retention.sagas else { return Ok(0) };
    let (since, mut done, mut after) = (Instant::now(), 0, None);
    while may_go_on(app, since) {
        let purged = app.db.run(move |conn| Box::pin(retention::purge_closed(conn, keep, after, SLICE))).await?;
        done += purged.sagas;
        after = purged.next;
        if after.is_none() {
            break;
        }
    }
    Ok(done)
}

/// A slice that isn't full is the last.
async fn in_slices(
    app: &App,
    purge: impl for<'c> Fn(&'c mut PgConnection) -> Work<'c, u64, sqlx::Error> + Copy + Send + 'static,
) -> Result<u64, sqlx::Error> {
    let (since, mut total) = (Instant::now(), 0);
    while may_go_on(app, since) {
        let purged = app.db.run(purge).await?;
        total += purged;
        if purged < SLICE as u64 {
            break;
        }
    }
    Ok(total)
}

fn may_go_on(app: &App, since: Instant) -> bool {
    since.elapsed() < LONGEST && !app.shutdown.stopping.is_cancelled()
}

//! Tidying up on a schedule: archive partitions, sessions that are over, the inbox.
//!
//! The scheduler fires on every replica, lets a job overlap itself and swallows panics; so each job
//! runs under a lock that only one process can hold, and says when it last succeeded. Nothing that a
//! promise hangs on is left to it.

use std::{future::Future, time::Duration};

use chrono::Utc;
use outbox_relay::{Work, archive, inbox};
use sqlx::{Connection, PgConnection};
use tokio_cron_scheduler::{Job, JobScheduler, JobSchedulerError};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{app::App, db};

/// Most rows a job deletes in one transaction: short enough not to hold anybody up.
const BATCH: i64 = 1000;

/// Longest run of a job. What is left is for the next one.
const JOB_TIMEOUT: Duration = Duration::from_secs(15 * 60);

/// Runs the jobs until `shutdown`, and waits for one that is under way.
pub async fn run(app: App, shutdown: CancellationToken) -> Result<(), JobSchedulerError> {
    let mut scheduler = JobScheduler::new().await?;
    let running = TaskTracker::new();
    // Seconds first. Spread over the hour, so that they don't meet.
    add(&scheduler, &app, &running, "archive", "0 7 * * * *", keep_archive).await?;
    add(&scheduler, &app, &running, "sessions", "0 17 * * * *", purge_sessions).await?;
    add(&scheduler, &app, &running, "inbox", "0 27 * * * *", purge_inbox).await?;
    // The archive needs today's partition now, not at the next full hour.
    running.spawn(once(app.clone(), "archive", keep_archive));
    scheduler.start().await?;
    shutdown.cancelled().await;
    scheduler.shutdown().await?;
    running.close();
    running.wait().await;
    Ok(())
}

async fn add<F, W>(
    scheduler: &JobScheduler,
    app: &App,
    running: &TaskTracker,
    name: &'static str,
    schedule: &str,
    work: W,
) -> Result<(), JobSchedulerError>
where
    W: Fn(App) -> F + Copy + Send + Sync + 'static,
    F: Future<Output = Result<u64, sqlx::Error>> + Send + 'static,
{
    let (app, running) = (app.clone(), running.clone());
    let job = Job::new_async(schedule, move |_, _| {
        let work = running.track_future(once(app.clone(), name, work));
        Box::pin(work)
    })?;
    scheduler.add(job).await?;
    Ok(())
}

/// One run of a job, if no other process (and no earlier run here) is at it.
async fn once<F, W>(app: App, name: &'static str, work: W)
where
    W: Fn(App) -> F + Send + 'static,
    F: Future<Output = Result<u64, sqlx::Error>> + Send,
{
    let db = app.db.clone();
    let result = db.run_within(JOB_TIMEOUT, move |conn| {
        Box::pin(async move {
            // Held by a transaction, so that it ends with the connection and works behind a pooler.
            let mut tx = conn.begin().await?;
            // It waits for the job, which works on connections of its own.
            sqlx::query("set local idle_in_transaction_session_timeout = 0").execute(&mut *tx).await?;
            let free: bool = sqlx::query_scalar("select pg_try_advisory_xact_lock(hashtext('housekeeping ' || $1))")
                .bind(name)
                .fetch_one(&mut *tx)
                .await?;
            if !free {
                return Ok(None);
            }
            let done = work(app).await?;
            tx.commit().await?;
            Ok::<_, sqlx::Error>(Some(done))
        })
    });
    match result.await {
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

async fn keep_archive(app: App) -> Result<u64, sqlx::Error> {
    let now = Utc::now();
    let keep_from = now - app.config.retention.archive;
    let upkeep = app.db.run(move |conn| Box::pin(archive::keep_up(conn, now.date_naive(), Some(keep_from)))).await?;
    Ok((upkeep.made.len() + upkeep.dropped.len()) as u64)
}

async fn purge_sessions(app: App) -> Result<u64, sqlx::Error> {
    in_batches(&app, |conn| Box::pin(db::sessions::purge_ended(conn, BATCH))).await
}

async fn purge_inbox(app: App) -> Result<u64, sqlx::Error> {
    let keep = app.config.retention.inbox;
    in_batches(&app, move |conn| Box::pin(inbox::purge(conn, keep, BATCH))).await
}

async fn in_batches(
    app: &App,
    purge: impl for<'c> Fn(&'c mut PgConnection) -> Work<'c, u64, sqlx::Error> + Copy + Send + 'static,
) -> Result<u64, sqlx::Error> {
    let mut total = 0;
    loop {
        let purged = app.db.run(purge).await?;
        total += purged;
        if purged < BATCH as u64 {
            return Ok(total);
        }
    }
}

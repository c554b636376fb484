//! Owns long-running tasks: one that ends or panics is started again, and whoever asks is told.
//!
//! A bare `tokio::spawn` loses a task without a word when it panics: the process looks alive and part of its
//! work is done by nobody. A task that a [`Supervisor`] runs is started again with back-off, is
//! [down](Supervisor::tasks) until it has run for a moment, and when it has failed again and again for too long,
//! [`Supervisor::gave_up`] tells the owner, who ends the process: a fresh one may do better, and an
//! orchestrator sees that this one did not.

use std::{
    collections::BTreeMap,
    fmt::Display,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::{
    sync::watch,
    time::{sleep, sleep_until},
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::{fault_points, logging::truncated};

/// When a task that failed is started again, and when that has been tried long enough.
#[derive(Debug, Clone, Copy)]
pub struct RestartPolicy {
    /// The wait before the first restart; it doubles with each one that follows.
    pub first_backoff: Duration,
    /// The longest wait.
    pub longest_backoff: Duration,
    /// A task that was started again counts as down until it has run for so long.
    pub up_after: Duration,
    /// A failing task that has run for so long counts as recovered: the next failure begins anew.
    pub recovered_after: Duration,
    /// A task that has been failing for so long, and fails once more, is given up.
    pub give_up_after: Duration,
}

impl Default for RestartPolicy {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self {
            first_backoff: Duration::from_millis(500),
            longest_backoff: seconds(30),
            up_after: seconds(2),
            recovered_after: seconds(60),
            give_up_after: seconds(300),
        }
    }
}

/// Runs tasks that must not end before they are told to. Cheap to clone; clones share what they know.
#[derive(Debug, Clone, Default)]
pub struct Supervisor {
    policy: RestartPolicy,
    tasks: Arc<Mutex<BTreeMap<String, TaskStatus>>>,
    gave_up: watch::Sender<Option<GaveUp>>,
}

/// How a task is doing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TaskStatus {
    /// Whether it runs, and has run for a moment since it last failed.
    pub up: bool,
    /// How often it was started again.
    pub restarts: u64,
    /// Why it last ended; `None` when it never did.
    pub last_failure: Option<String>,
}

/// A task that failed for too long.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{task} has been failing for {} s and was started again {restarts} times; the last time: {reason}", lasted.as_secs())]
pub struct GaveUp {
    /// Its name.
    pub task: String,
    /// Why it ended the last time.
    pub reason: String,
    /// How often it was started again.
    pub restarts: u64,
    /// Since it first failed.
    pub lasted: Duration,
}

impl Supervisor {
    /// A supervisor without tasks.
    pub fn new(policy: RestartPolicy) -> Self {
        Self { policy, ..Self::default() }
    }

    /// Runs what `start` makes until `stop`, and waits for its end then. Before that, an end, an error and a
    /// panic are failures, after which it is made and run again. `name` comes from a closed set: it labels metrics.
    pub async fn run<T, E>(&self, name: impl Into<String>, stop: CancellationToken, mut start: impl FnMut() -> T)
    where
        T: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let name = name.into();
        let mut failing = Failing::default();
        self.lock().insert(name.clone(), TaskStatus { up: true, restarts: 0, last_failure: None });
        while !stop.is_cancelled() {
            let reason = match catch_unwind(AssertUnwindSafe(&mut start)) {
                Ok(task) => self.run_once(&name, task, &mut failing).await,
                Err(_) => Err("it panicked before it began".to_owned()),
            };
            if stop.is_cancelled() {
                if let Err(reason) = reason {
                    tracing::warn!(task = name, reason, "failed while it was being stopped");
                }
                break;
            }
            let reason = reason.err().unwrap_or_else(|| "it ended, although nobody told it to".to_owned());
            let backoff = self.failed(&name, &reason, &mut failing);
            stop.run_until_cancelled(sleep(backoff)).await;
            if let Some(task) = self.lock().get_mut(&name) {
                task.restarts += 1;
            }
        }
        self.lock().remove(&name);
    }

    /// How each task is doing that runs now, by name.
    pub fn tasks(&self) -> BTreeMap<String, TaskStatus> {
        self.lock().clone()
    }

    /// Returns when a task has failed for too long, with the first one that did.
    pub async fn gave_up(&self) -> GaveUp {
        let mut gave_up = self.gave_up.subscribe();
        let first = gave_up.wait_for(Option::is_some).await;
        // The sender is a part of `self`.
        first.ok().and_then(|first| first.clone()).expect("a supervisor outlives its own future")
    }

    async fn run_once<T, E>(&self, name: &str, task: T, failing: &mut Failing) -> Result<(), String>
    where
        T: Future<Output = Result<(), E>> + Send + 'static,
        E: Display + Send + 'static,
    {
        let place = format!("task::{name}");
        let mut task = AbortOnDropHandle::new(tokio::spawn(async move {
            fault_points::task_started(&place);
            task.await.map_err(|error| error.to_string())
        }));
        let started = tokio::time::Instant::now();
        let ended = loop {
            let next = match failing.since {
                None => break (&mut task).await,
                Some(_) if !failing.up => started + self.policy.up_after,
                Some(_) => started + self.policy.recovered_after,
            };
            tokio::select! {
                ended = &mut task => break ended,
                () = sleep_until(next) => self.keeps_running(name, failing),
            }
        };
        match ended {
            Ok(result) => result.map_err(|error| truncated(&error).into_owned()),
            Err(panic) => Err(truncated(&format!("it panicked ({panic})")).into_owned()),
        }
    }

    fn keeps_running(&self, name: &str, failing: &mut Failing) {
        if failing.up {
            *failing = Failing::default();
            return;
        }
        failing.up = true;
        tracing::info!(task = name, "runs again");
        if let Some(task) = self.lock().get_mut(name) {
            task.up = true;
        }
    }

    /// Returns how long to wait before the restart.
    fn failed(&self, name: &str, reason: &str, failing: &mut Failing) -> Duration {
        let now = Instant::now();
        let since = *failing.since.get_or_insert(now);
        failing.up = false;
        failing.backoff = match failing.backoff {
            Duration::ZERO => self.policy.first_backoff,
            backoff => (backoff * 2).min(self.policy.longest_backoff),
        };
        let restarts = self.lock().get_mut(name).map_or(0, |task| {
            task.up = false;
            task.last_failure = Some(reason.to_owned());
            task.restarts
        });
        tracing::error!(task = name, reason, restart_in_ms = failing.backoff.as_millis() as u64, "a task failed");
        let lasted = now.duration_since(since);
        if lasted >= self.policy.give_up_after {
            self.gave_up.send_if_modified(|first| {
                let is_first = first.is_none();
                if is_first {
                    *first = Some(GaveUp { task: name.to_owned(), reason: reason.to_owned(), restarts, lasted });
                }
                is_first
            });
        }
        failing.backoff
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, TaskStatus>> {
        // Nothing that is done under this lock can panic half-way.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A task's failures since it last ran well.
#[derive(Debug, Default)]
struct Failing {
    since: Option<Instant>,
    backoff: Duration,
    up: bool,
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::*;

    fn quick(give_up_after: Duration) -> RestartPolicy {
        let ms = Duration::from_millis;
        RestartPolicy {
            first_backoff: ms(1),
            longest_backoff: ms(4),
            up_after: ms(20),
            recovered_after: ms(40),
            give_up_after,
        }
    }

    type Fail = fn() -> Result<(), String>;

    /// Runs a task that fails as `fail` says at its first `failures` starts, and then waits for the stop.
    async fn played(failures: u32, fail: Fail, policy: RestartPolicy) -> (Supervisor, Running) {
        let (supervisor, stop, starts) =
            (Supervisor::new(policy), CancellationToken::new(), Arc::<AtomicU32>::default());
        let (running, ended, counted) = (supervisor.clone(), stop.clone(), starts.clone());
        let handle = tokio::spawn(async move {
            running
                .run("task", ended.clone(), || {
                    let fails = counted.fetch_add(1, Ordering::SeqCst) < failures;
                    let ended = ended.clone();
                    async move {
                        if fails {
                            return fail();
                        }
                        ended.cancelled().await;
                        Ok(())
                    }
                })
                .await;
        });
        (supervisor, Running { stop, handle, starts })
    }

    struct Running {
        stop: CancellationToken,
        handle: tokio::task::JoinHandle<()>,
        starts: Arc<AtomicU32>,
    }

    async fn until(supervisor: &Supervisor, wanted: impl Fn(&TaskStatus) -> bool) -> TaskStatus {
        loop {
            if let Some(task) = supervisor.tasks().get("task").filter(|task| wanted(task)) {
                return task.clone();
            }
            tokio::task::yield_now().await;
        }
    }

    #[tokio::test]
    async fn a_task_that_panics_ends_or_fails_is_down_then_started_again_and_up() {
        let ways: [(Fail, &str); 3] = [
            (|| panic!("boom"), "boom"),
            (|| Ok(()), "nobody told it to"),
            (|| Err("the broker said no".to_owned()), "the broker said no"),
        ];
        for (fail, reason) in ways {
            let (supervisor, running) = played(2, fail, quick(Duration::from_secs(60))).await;
            let down = until(&supervisor, |task| !task.up).await;
            assert!(down.last_failure.as_ref().is_some_and(|said| said.contains(reason)), "{down:?}");
            let up = until(&supervisor, |task| task.up && task.restarts == 2).await;
            assert!(up.last_failure.is_some());
            assert_eq!(running.starts.load(Ordering::SeqCst), 3);
            running.stop.cancel();
            running.handle.await.expect("it stops");
            assert!(supervisor.tasks().is_empty());
        }
    }

    #[tokio::test]
    async fn a_task_that_never_recovers_is_given_up_and_said_once() {
        let (supervisor, running) = played(u32::MAX, || panic!("again"), quick(Duration::from_millis(30))).await;
        let gave_up = supervisor.gave_up().await;
        assert_eq!(gave_up.task, "task");
        assert!(gave_up.lasted >= Duration::from_millis(30) && gave_up.restarts > 1, "{gave_up:?}");
        assert!(gave_up.to_string().contains("again"), "{gave_up}");
        until(&supervisor, |task| task.restarts > gave_up.restarts + 2).await;
        assert_eq!(supervisor.gave_up().await, gave_up);
        running.stop.cancel();
        running.handle.await.expect("it stops");
    }

    #[tokio::test]
    async fn a_stop_during_the_back_off_does_not_wait_for_it() {
        let policy = RestartPolicy { first_backoff: Duration::from_secs(3600), ..quick(Duration::from_secs(3600)) };
        let (supervisor, running) = played(1, || panic!("boom"), policy).await;
        until(&supervisor, |task| !task.up).await;
        running.stop.cancel();
        tokio::time::timeout(Duration::from_secs(10), running.handle).await.expect("at once").expect("it stops");
    }

    #[tokio::test]
    async fn what_a_panic_says_is_cut() {
        let (supervisor, running) = played(1, || panic!("{}", "x".repeat(900_000)), quick(Duration::MAX)).await;
        let down = until(&supervisor, |task| task.last_failure.is_some()).await;
        assert!(down.last_failure.is_some_and(|said| said.len() < 400));
        running.stop.cancel();
        running.handle.await.expect("it stops");
    }
}

//! Keeps one process of the service running, as an orchestrator does: what dies is started again.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tokio::{sync::watch, time::sleep};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};

use crate::support::process::Replica;

/// What the process is to be.
#[derive(Clone, Default)]
pub struct Orders {
    /// In logs' file names.
    pub name: String,
    /// Its roles; all of them when empty.
    pub roles: &'static str,
    pub vars: Vec<(String, String)>,
    /// Armed fault points, as `FAILPOINTS` takes them.
    pub fail: String,
    /// In how many lives they are armed.
    pub armed_lives: u32,
}

/// A process that is kept running.
pub struct Keeper {
    state: Arc<State>,
    http: watch::Receiver<Option<String>>,
    stop: CancellationToken,
    keeping: AbortOnDropHandle<()>,
}

#[derive(Default)]
struct State {
    pid: Mutex<Option<Pid>>,
    deaths: AtomicU32,
    /// Rows that were in flight when it lost its lease.
    given_up: AtomicU64,
}

impl Keeper {
    pub fn start(orders: Orders) -> Self {
        let (publish, http) = watch::channel(None);
        let (state, stop) = (Arc::new(State::default()), CancellationToken::new());
        let keeping = tokio::spawn(keep(orders, state.clone(), publish, stop.clone()));
        Self { state, http, stop, keeping: AbortOnDropHandle::new(keeping) }
    }

    /// Returns when the process is up.
    pub async fn until_up(&self) {
        self.http.clone().wait_for(Option::is_some).await.expect("kept");
    }

    /// Where it serves REST now. Empty before it is up, and for a process without REST.
    pub fn http(&self) -> String {
        self.http.borrow().clone().unwrap_or_default()
    }

    /// How often it ended without being told to for good.
    pub fn deaths(&self) -> u32 {
        self.state.deaths.load(Ordering::SeqCst)
    }

    /// Rows in flight when its lease was not renewed in time, as it says itself, over all lives that have ended.
    pub fn given_up(&self) -> u64 {
        self.state.given_up.load(Ordering::SeqCst)
    }

    /// Sends a signal to the process of now, if there is one.
    pub fn signal(&self, signal: Signal) {
        if let Some(pid) = *self.state.pid.lock().unwrap() {
            let _ = kill(pid, signal);
        }
    }

    /// Returns when the process stands still, held by SIGSTOP.
    pub async fn until_frozen(&self) {
        let frozen = || {
            let pid = (*self.state.pid.lock().unwrap())?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The state is the first word after the program's name, which is in brackets.
            stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('T'))
        };
        while frozen() != Some(true) {
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Stops it for good, in good order.
    pub async fn stop(&mut self) {
        self.stop.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(20), &mut self.keeping).await;
    }
}

async fn keep(orders: Orders, state: Arc<State>, publish: watch::Sender<Option<String>>, stop: CancellationToken) {
    let arguments = if orders.roles.is_empty() { vec!["serve"] } else { vec!["serve", "--role", orders.roles] };
    for life in 0.. {
        let (mut vars, mut arguments) = (orders.vars.clone(), arguments.clone());
        if life < orders.armed_lives {
            arguments.push("--arm-fault-points");
            vars.push(("FAILPOINTS".to_owned(), orders.fail.clone()));
        }
        let replica = Replica::start(&arguments, &vars);
        let Logged { replica, .. } = &mut Logged { name: format!("{}-{life}", orders.name), replica };
        *state.pid.lock().unwrap() = replica.pid();
        loop {
            tokio::select! {
                _ = replica.exit_code() => break,
                () = sleep(Duration::from_millis(20)) => {
                    if publish.borrow().is_none() && let Some(address) = replica.address() {
                        publish.send_replace(Some(address.unwrap_or_default()));
                    }
                }
                () = stop.cancelled() => {
                    // A process that is held by SIGSTOP would not hear it.
                    replica.signal(Signal::SIGCONT);
                    replica.terminate();
                    let _ = tokio::time::timeout(Duration::from_secs(15), replica.exit_code()).await;
                    break;
                }
            }
        }
        *state.pid.lock().unwrap() = None;
        publish.send_replace(None);
        let rows = [("giving up what is in flight", "rows"), ("under a term that is over", "fenced")]
            .into_iter()
            .flat_map(|(line, field)| replica.logged(line).into_iter().filter_map(move |line| line[field].as_u64()))
            .sum();
        state.given_up.fetch_add(rows, Ordering::SeqCst);
        if stop.is_cancelled() {
            return;
        }
        state.deaths.fetch_add(1, Ordering::SeqCst);
    }
}

/// Leaves what the process said to whoever looks into a failure, also where the scenario ends before it.
struct Logged {
    name: String,
    replica: Replica,
}

impl Drop for Logged {
    fn drop(&mut self) {
        let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("faults");
        let lines: Vec<String> = self.replica.logged("").iter().map(ToString::to_string).collect();
        let _ = fs::create_dir_all(&folder);
        let _ = fs::write(folder.join(format!("{}.log", self.name)), lines.join("\n"));
    }
}

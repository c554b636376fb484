//! The built binary, run as an operator runs it. Whatever a test starts dies with it.

use std::{
    process::{Output, Stdio},
    sync::{Arc, Mutex},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    process::{Child, Command},
};

use super::{eventually, service::base_vars};

/// A `serve` with its log.
pub struct Replica {
    pub http: String,
    child: Child,
    log: Arc<Mutex<Vec<Value>>>,
    _watcher: Child,
}

/// A command of the binary, in an environment of nothing but `vars`, in a folder without a `.env`.
pub fn command(arguments: &[&str], vars: &[(String, String)]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_auth-service"));
    command.args(arguments).env_clear().envs(vars.iter().cloned()).current_dir(env!("CARGO_TARGET_TMPDIR"));
    command.stdin(Stdio::null()).kill_on_drop(true);
    command
}

/// Runs it to its end. Answers with its exit code, standard output and standard error.
pub async fn run(arguments: &[&str], vars: &[(String, String)]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = command(arguments, vars).output().await.expect("the binary runs");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

/// What a test's own instance is configured with, as far as production allows it.
pub fn production_vars(database: &str, prefix: &str, more: &[(&str, &str)]) -> Vec<(String, String)> {
    let mut vars = base_vars(database, prefix);
    let ours = [("SALT_ROUNDS", "10"), ("LOG_FORMAT", "json")];
    for (name, value) in ours.iter().chain(more) {
        vars.retain(|(known, _)| known != name);
        vars.push(((*name).to_owned(), (*value).to_owned()));
    }
    vars
}

impl Replica {
    /// Returns when it says that it is up.
    pub async fn serve(vars: &[(String, String)]) -> Self {
        let mut replica = Self::start(&["serve"], vars);
        replica.http = eventually("a replica is up", || async { replica.address() }).await.expect("it serves REST");
        replica
    }

    /// Returns at once.
    pub fn start(arguments: &[&str], vars: &[(String, String)]) -> Self {
        let mut child = command(arguments, vars).stderr(Stdio::piped()).spawn().expect("the binary runs");
        let mut lines = BufReader::new(child.stderr.take().expect("its log")).lines();
        let log = Arc::new(Mutex::new(vec![]));
        let kept = log.clone();
        tokio::spawn(async move {
            while let Ok(Some(line)) = lines.next_line().await {
                kept.lock().unwrap().push(serde_json::from_str(&line).unwrap_or(Value::String(line)));
            }
        });
        let _watcher = watcher(child.id().expect("it runs"));
        Self { http: String::new(), child, log, _watcher }
    }

    /// Where it serves REST, once it is up; `Some(None)` for one that does not.
    pub fn address(&self) -> Option<Option<String>> {
        let up = self.logged("is up").pop()?;
        Some(up["http"].as_str().map(|http| format!("http://{http}")))
    }

    /// Where it serves operators, once it is up.
    pub fn admin(&self) -> String {
        let up = self.logged("is up").pop().expect("it is up");
        format!("http://{}", up["admin"].as_str().expect("it serves operators"))
    }

    pub fn pid(&self) -> Option<Pid> {
        Some(Pid::from_raw(self.child.id()?.try_into().expect("a pid")))
    }

    /// Log lines whose message contains `text`.
    pub fn logged(&self, text: &str) -> Vec<Value> {
        let has = |line: &&Value| line["message"].as_str().or(line.as_str()).is_some_and(|said| said.contains(text));
        self.log.lock().unwrap().iter().filter(has).cloned().collect()
    }

    /// As a crash would: nothing is finished, nothing given back.
    pub fn kill(&self) {
        self.signal(Signal::SIGKILL);
    }

    pub fn terminate(&self) {
        self.signal(Signal::SIGTERM);
    }

    pub fn signal(&self, signal: Signal) {
        kill(self.pid().expect("it runs"), signal).expect("the signal");
    }

    pub async fn exit_code(&mut self) -> Option<i32> {
        self.child.wait().await.expect("its end").code()
    }
}

/// Ends the process when this one is gone, even killed: its standard input ends with us.
fn watcher(pid: u32) -> Child {
    let mut shell = Command::new("sh");
    shell.args(["-c", "read _; kill -9 $0 2>/dev/null", &pid.to_string()]);
    shell.stdin(Stdio::piped()).spawn().expect("a shell")
}

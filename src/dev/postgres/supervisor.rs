//! The server process, under a shell that stops it when we are gone.
//!
//! The shell reads from a pipe whose other end only this process holds. When we stop, crash or are
//! killed with -9, the kernel closes our end, the shell's read ends, and it shuts the server down.
//! Both are a process group of their own, so that Ctrl-C reaches us alone and we stop things in
//! order.

use std::{
    fs::{File, OpenOptions},
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::Path,
    process::Stdio,
    time::Duration,
};

use tokio::{
    process::{Child, ChildStdin},
    time::{Instant, sleep, timeout},
};

use super::{PostgresError, PostgresOptions, binaries::Binaries, home::Home};

/// `$@` is the server. Signals are for us to handle, hence the trap (the server sets its own
/// handlers). INT is PostgreSQL's fast shutdown, QUIT its immediate one, should that hang for 20 s.
const SUPERVISOR: &str = r#"
trap '' INT TERM HUP
exec 3<&0 </dev/null
"$@" 3<&- &
server=$!
{
    while read -r _; do :; done
    kill -INT "$server"
    tries=0
    while [ "$tries" -lt 200 ] && kill -0 "$server"; do
        sleep 0.1
        tries=$((tries + 1))
    done
    [ "$tries" -lt 200 ] || kill -QUIT "$server"
} <&3 2>/dev/null &
watcher=$!
exec 3<&-
wait "$server"
status=$?
kill -KILL "$watcher" 2>/dev/null
exit "$status"
"#;

/// Fast shutdown, the supervisor's own escalation, and a little more.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

/// A longer log starts anew with the server.
const LOG_LIMIT: u64 = 16 * 1024 * 1024;

/// A supervised server. Dropping it closes the pipe, which ends the server.
#[derive(Debug)]
pub(super) struct Server {
    supervisor: Child,
    /// Never written to: held, it keeps the server alive.
    lifeline: Option<ChildStdin>,
    log: File,
    log_start: u64,
}

/// Why a server ended by itself.
#[derive(Debug)]
pub(super) enum Ended {
    FolderTaken,
    PortTaken,
    Otherwise(String),
}

impl Server {
    pub fn launch(
        binaries: &Binaries,
        home: &Home,
        port: u16,
        options: PostgresOptions,
    ) -> Result<Self, PostgresError> {
        let io = |source| PostgresError::Io { what: format!("PostgreSQL's log {}", home.log().display()), source };
        let log = OpenOptions::new().create(true).read(true).append(true).mode(0o600).open(home.log()).map_err(io)?;
        let mut log_start = log.metadata().map_err(io)?.len();
        if log_start > LOG_LIMIT {
            log.set_len(0).map_err(io)?;
            log_start = 0;
        }

        let mut command = home.command(Path::new("/bin/sh"));
        command.args(["-c", SUPERVISOR, "auth-service-postgres"]);
        command.arg(binaries.program("postgres")).arg("-D").arg(home.data());
        let mut setting = |name: &str, value: &str| {
            command.arg("-c").arg(format!("{name}={value}"));
        };
        setting("listen_addresses", "127.0.0.1");
        setting("port", &port.to_string());
        // No socket file: TCP asks for the password, and a deep folder would exceed the path's limit.
        setting("unix_socket_directories", "");
        setting("max_connections", &options.max_connections.to_string());
        if !options.durable {
            setting("fsync", "off");
            setting("synchronous_commit", "off");
            setting("full_page_writes", "off");
        }
        command.stdin(Stdio::piped());
        command.stdout(log.try_clone().map_err(io)?).stderr(log.try_clone().map_err(io)?);
        command.process_group(0);
        let mut supervisor = command
            .spawn()
            .map_err(|source| PostgresError::Io { what: "/bin/sh could not be started".to_owned(), source })?;
        let lifeline = supervisor.stdin.take();
        Ok(Self { supervisor, lifeline, log, log_start })
    }

    /// Why it ended, when it has.
    pub fn ended(&mut self) -> Result<Option<Ended>, PostgresError> {
        let status = self
            .supervisor
            .try_wait()
            .map_err(|source| PostgresError::Io { what: "waiting for PostgreSQL".to_owned(), source })?;
        Ok(status.map(|status| {
            let said = self.said();
            // Neither text is translated: the server starts with LC_ALL=C.
            if said.contains("\"postmaster.pid\" already exists") || said.contains("shared memory block") {
                Ended::FolderTaken
            } else if said.contains("could not bind IPv4 address") {
                Ended::PortTaken
            } else {
                Ended::Otherwise(format!("{status}: {}", said.trim()))
            }
        }))
    }

    /// Waits until it has either taken its folder and port (its log says it is starting) or ended.
    pub async fn past_the_lock_file(&mut self) -> Result<Option<Ended>, PostgresError> {
        const PATIENCE: Duration = Duration::from_secs(10);
        let started = Instant::now();
        loop {
            if let Some(ended) = self.ended()? {
                return Ok(Some(ended));
            }
            if self.said().contains("listening on IPv4 address") || started.elapsed() > PATIENCE {
                return Ok(None);
            }
            sleep(Duration::from_millis(10)).await;
        }
    }

    /// Stops it and waits until it is gone.
    pub async fn stop(mut self) {
        drop(self.lifeline.take());
        match timeout(STOP_PATIENCE, self.supervisor.wait()).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(%error, "waiting for PostgreSQL to stop failed"),
            Err(_) => tracing::warn!("PostgreSQL did not stop in {} s", STOP_PATIENCE.as_secs()),
        }
    }

    /// The last few kilobytes it logged since it was launched.
    fn said(&mut self) -> String {
        const TAIL: u64 = 4096;
        let mut bytes = Vec::new();
        let read = self.log.metadata().and_then(|log| {
            self.log.seek(SeekFrom::Start(self.log_start.max(log.len().saturating_sub(TAIL))))?;
            self.log.read_to_end(&mut bytes)
        });
        match read {
            Ok(_) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(error) => format!("(its log can't be read: {error})"),
        }
    }
}

impl Ended {
    pub fn into_error(self, home: &Home, port: u16) -> PostgresError {
        match self {
            Self::FolderTaken => PostgresError::LeftBehind { root: home.root().to_owned(), pid: home.server_pid() },
            Self::PortTaken => PostgresError::PortTaken(port),
            Self::Otherwise(output) => PostgresError::Failed { program: "postgres", output },
        }
    }
}

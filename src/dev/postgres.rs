//! A private PostgreSQL cluster that lives and dies with this process.
//!
//! Promises: it listens on 127.0.0.1 only and asks for a generated password, since other users of
//! the machine can reach the loopback too; its data survives a stop, a crash and `kill -9`; no
//! server is left behind, however this process ends; one folder has one server. It runs as an
//! ordinary user and, where the process is root, as an unprivileged one (PostgreSQL refuses root).
//!
//! - [`home`]: the folder, whose it is, and the lock that makes it ours;
//! - [`binaries`]: finding PostgreSQL, or fetching it;
//! - [`supervisor`]: the server process and the shell that outlives us by a moment to stop it.

use std::{
    net::TcpListener,
    path::{Path, PathBuf},
    time::Duration,
};

use secrecy::{ExposeSecret, SecretString};
use sqlx::{
    AssertSqlSafe, Connection, PgConnection,
    postgres::{PgConnectOptions, PgSslMode},
};
use tokio::time::{Instant, sleep};

use self::{
    binaries::Binaries,
    home::Home,
    supervisor::{Ended, Server},
};

mod binaries;
mod home;
mod supervisor;
#[cfg(test)]
mod tests;

/// The cluster's only role.
const ROLE: &str = "auth";

/// A server killed a moment ago can hold its folder until its last backend is gone.
const PREDECESSOR_PATIENCE: Duration = Duration::from_secs(30);

/// Crash recovery included.
const START_PATIENCE: Duration = Duration::from_secs(120);

/// A running private cluster. Dropping it ends the server too, without waiting for it.
#[derive(Debug)]
pub struct PrivateCluster {
    server: Server,
    port: u16,
    password: SecretString,
    home: Home,
}

/// How the cluster runs.
#[derive(Debug, Clone, Copy)]
pub struct PostgresOptions {
    /// `false` trades crash safety for speed (tests).
    pub durable: bool,
    /// PostgreSQL's `max_connections`.
    pub max_connections: u16,
    /// 0 takes any free port.
    pub port: u16,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self { durable: true, max_connections: 100, port: 0 }
    }
}

/// Why there is no cluster. Each text says what to do.
#[derive(Debug, thiserror::Error)]
pub enum PostgresError {
    /// Not on this machine, and not to be had.
    #[error(
        "PostgreSQL {oldest} or newer is not on this machine and could not be downloaded from github.com ({cause}). Install it \
         (Debian, Ubuntu: apt install postgresql; Fedora: dnf install postgresql-server; macOS: brew install \
         postgresql@17), or set PG_BIN to the folder that holds initdb and postgres, or name a server with --database-url",
        oldest = binaries::OLDEST
    )]
    NotFound {
        /// What the download ran into.
        cause: String,
    },
    /// `PG_BIN` names a folder that does not serve.
    #[error("PG_BIN={}: {problem}; set it to the folder that holds initdb and postgres, or unset it", .dir.display())]
    BadBinFolder {
        /// The folder.
        dir: PathBuf,
        /// What is wrong with it.
        problem: String,
    },
    /// The data was made by another major version.
    #[error(
        "the data in {} was made by PostgreSQL {data}, but {} holds PostgreSQL {found}, which can't read it: install \
         PostgreSQL {data} (or set PG_BIN to its folder), choose another --data-dir, or delete that folder to start empty",
        .root.display(), .bin.display()
    )]
    OtherVersion {
        /// The cluster's folder.
        root: PathBuf,
        /// Major version of the data.
        data: u32,
        /// Where the binaries are.
        bin: PathBuf,
        /// Their major version.
        found: u32,
    },
    /// Another process of ours holds the folder.
    #[error("another auth-service{} is using {}: stop it, or choose another --data-dir", .pid.as_ref().map(|pid| format!(" (process {pid})")).unwrap_or_default(), .root.display())]
    InUse {
        /// The cluster's folder.
        root: PathBuf,
        /// The other process, where it could be learnt.
        pid: Option<String>,
    },
    /// A server without its supervisor holds the folder.
    #[error("a PostgreSQL server{} still runs in {} and did not go away: stop it (kill -INT), then start again", .pid.as_ref().map(|pid| format!(" (process {pid})")).unwrap_or_default(), .root.display())]
    LeftBehind {
        /// The cluster's folder.
        root: PathBuf,
        /// The server's process, where it could be learnt.
        pid: Option<String>,
    },
    /// The folder can't be used.
    #[error("{} can't hold the database: {problem}", .dir.display())]
    Folder {
        /// The folder.
        dir: PathBuf,
        /// What is wrong and what to do.
        problem: String,
    },
    /// The asked-for port is taken.
    #[error("port {0} is taken: choose another one, or 0 for any free port")]
    PortTaken(u16),
    /// A PostgreSQL program failed.
    #[error("{program} failed: {output}")]
    Failed {
        /// Which.
        program: &'static str,
        /// The end of what it said.
        output: String,
    },
    /// The server runs but does not let us in.
    #[error("the private PostgreSQL did not become ready; its log is {}", .log.display())]
    NotReady {
        /// The server's log.
        log: PathBuf,
        /// The last refusal.
        source: sqlx::Error,
    },
    /// A database name we would have to quote.
    #[error("{0:?} is no database name: lower-case letters, digits and underscores, a letter first, at most 63")]
    DatabaseName(String),
    /// The server refused.
    #[error("the private PostgreSQL refused")]
    Database(#[from] sqlx::Error),
    /// Running a program or touching a file failed.
    #[error("{what}")]
    Io {
        /// What was tried.
        what: String,
        /// How it failed.
        source: std::io::Error,
    },
}

impl PrivateCluster {
    /// Starts the cluster whose folder is `data_dir`, making it first where the folder is empty or
    /// missing. Where an unprivileged user has to run it and can't reach the folder, it lives
    /// elsewhere: see [`location`](Self::location).
    pub async fn start(data_dir: &Path, options: PostgresOptions) -> Result<Self, PostgresError> {
        let home = Home::open(data_dir).await?;
        let made_by = home.data_version()?;
        let binaries = Binaries::find(made_by).await?;
        let password = home.password()?;
        match made_by {
            None => binaries.initdb(&home, ROLE, options.durable).await?,
            Some(data) if data != binaries.major => {
                return Err(PostgresError::OtherVersion {
                    root: home.root().to_owned(),
                    data,
                    bin: binaries.dir,
                    found: binaries.major,
                });
            }
            Some(_) => {}
        }
        let (server, port) = launch(&binaries, &home, options).await?;
        let mut cluster = Self { server, port, password, home };
        cluster.until_ready().await?;
        Ok(cluster)
    }

    /// The folder the cluster really lives in: data, password and log.
    pub fn location(&self) -> &Path {
        self.home.root()
    }

    /// The port on 127.0.0.1.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Connection URL of a database; it holds the password.
    pub fn url(&self, database: &str) -> SecretString {
        let password = self.password.expose_secret();
        format!("postgres://{ROLE}:{password}@127.0.0.1:{}/{database}?sslmode=disable", self.port).into()
    }

    /// Creates a database. It may exist already.
    pub async fn create_database(&self, name: &str) -> Result<(), PostgresError> {
        const DUPLICATE_DATABASE: &str = "42P04";
        let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if !(1..=63).contains(&name.len())
            || !name.starts_with(|c: char| c.is_ascii_lowercase())
            || !name.chars().all(plain)
        {
            return Err(PostgresError::DatabaseName(name.to_owned()));
        }
        let mut conn = PgConnection::connect_with(&self.maintenance()).await?;
        let created = sqlx::query(AssertSqlSafe(format!("create database {name}"))).execute(&mut conn).await;
        conn.close().await?;
        match created {
            Err(sqlx::Error::Database(error)) if error.code().as_deref() == Some(DUPLICATE_DATABASE) => Ok(()),
            other => other.map(|_| ()).map_err(PostgresError::from),
        }
    }

    /// Stops the server and waits until it is gone.
    pub async fn stop(self) {
        self.server.stop().await;
    }

    /// Connected is ready: nothing but our own server knows our password.
    async fn until_ready(&mut self) -> Result<(), PostgresError> {
        const CANNOT_CONNECT_NOW: &str = "57P03";
        let started = Instant::now();
        loop {
            let error = match PgConnection::connect_with(&self.maintenance()).await {
                Ok(conn) => return Ok(conn.close().await?),
                Err(error) => error,
            };
            if let Some(ended) = self.server.ended()? {
                return Err(ended.into_error(&self.home, self.port));
            }
            // Starting, or recovering from a crash: patience. Any other refusal may still come from
            // a stranger on the port in the moment before our server finds it taken and ends.
            let patience = match &error {
                sqlx::Error::Database(e) if e.code().as_deref() != Some(CANNOT_CONNECT_NOW) => Duration::from_secs(2),
                _ => START_PATIENCE,
            };
            if started.elapsed() > patience {
                return Err(PostgresError::NotReady { log: self.home.log(), source: error });
            }
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn maintenance(&self) -> PgConnectOptions {
        PgConnectOptions::new_without_pgpass()
            .host("127.0.0.1")
            .port(self.port)
            .username(ROLE)
            .password(self.password.expose_secret())
            .database("postgres")
            .ssl_mode(PgSslMode::Disable)
    }
}

/// A server that got past its start-up checks, and its port.
async fn launch(binaries: &Binaries, home: &Home, options: PostgresOptions) -> Result<(Server, u16), PostgresError> {
    const FREE_PORT_TRIES: usize = 10;
    let give_up = Instant::now() + PREDECESSOR_PATIENCE;
    let mut tries = 0;
    loop {
        let port = match options.port {
            0 => free_port()?,
            fixed => fixed,
        };
        let mut server = Server::launch(binaries, home, port, options)?;
        let Some(ended) = server.past_the_lock_file().await? else {
            return Ok((server, port));
        };
        match ended {
            // Its predecessor is still going down.
            Ended::FolderTaken if Instant::now() < give_up => sleep(Duration::from_millis(200)).await,
            // Somebody took the free port between our asking and its binding.
            Ended::PortTaken if options.port == 0 && tries < FREE_PORT_TRIES => tries += 1,
            ended => return Err(ended.into_error(home, port)),
        }
    }
}

fn free_port() -> Result<u16, PostgresError> {
    TcpListener::bind(("127.0.0.1", 0))
        .and_then(|listener| listener.local_addr())
        .map(|address| address.port())
        .map_err(|source| PostgresError::Io { what: "no free port on 127.0.0.1".to_owned(), source })
}

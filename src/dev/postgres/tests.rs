//! Against the PostgreSQL of this machine. Run as root these also cover the drop of privileges.

use std::{
    env, fs,
    io::{BufRead, BufReader},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    process::{Command, Stdio},
    sync::mpsc,
};

use super::*;

const QUICK: PostgresOptions = PostgresOptions { durable: false, max_connections: 20, port: 0 };

/// Root's unprivileged user can reach it when it is `OPEN`, unlike a `TMPDIR` in somebody's home.
fn folder(mode: u32) -> tempfile::TempDir {
    let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(mode)).expect("permissions");
    folder
}

const OPEN: u32 = 0o755;

async fn start(dir: &Path) -> PrivateCluster {
    PrivateCluster::start(dir, QUICK).await.expect("a cluster")
}

async fn connect(cluster: &PrivateCluster, database: &str) -> PgConnection {
    PgConnection::connect(cluster.url(database).expose_secret()).await.expect("a connection")
}

#[tokio::test]
async fn a_second_start_continues_with_the_data() {
    let folder = folder(OPEN);
    let dir = folder.path().join("postgres");
    let cluster = start(&dir).await;
    cluster.create_database("auth").await.expect("created");
    cluster.create_database("auth").await.expect("there already");
    let mut conn = connect(&cluster, "auth").await;
    sqlx::raw_sql("create table t (n int); insert into t values (7)").execute(&mut conn).await.expect("written");
    let port = cluster.port();
    cluster.stop().await;
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err(), "stopped means gone");

    let cluster = start(&dir).await;
    let mut conn = connect(&cluster, "auth").await;
    let n: i32 = sqlx::query_scalar("select n from t").fetch_one(&mut conn).await.expect("read");
    assert_eq!(n, 7);
    cluster.stop().await;
}

#[tokio::test]
async fn other_users_of_the_machine_need_the_password() {
    let folder = folder(OPEN);
    let cluster = start(&folder.path().join("postgres")).await;
    let stranger = cluster.maintenance().password("guess");
    let refused = PgConnection::connect_with(&stranger).await.expect_err("refused");
    assert_eq!(refused.as_database_error().and_then(|e| e.code()).as_deref(), Some("28P01"));
    cluster.stop().await;
}

#[tokio::test]
async fn one_folder_has_one_server() {
    let folder = folder(OPEN);
    let dir = folder.path().join("postgres");
    let first = start(&dir).await;
    let second = PrivateCluster::start(&dir, QUICK).await.expect_err("in use");
    assert!(matches!(second, PostgresError::InUse { .. }), "{second}");
    assert!(second.to_string().contains(&format!("(process {})", std::process::id())), "{second}");
    first.stop().await;
}

#[tokio::test]
async fn data_of_another_version_is_named_with_the_way_out() {
    let folder = folder(OPEN);
    let dir = folder.path().join("postgres");
    let cluster = start(&dir).await;
    let version = cluster.location().join("data/PG_VERSION");
    cluster.stop().await;
    fs::write(version, "12\n").expect("written");
    let error = PrivateCluster::start(&dir, QUICK).await.expect_err("another version");
    assert!(matches!(error, PostgresError::OtherVersion { data: 12, .. }), "{error}");
    assert!(error.to_string().contains("delete that folder to start empty"), "{error}");
}

#[tokio::test]
async fn a_taken_port_is_named_and_not_waited_for() {
    let folder = folder(OPEN);
    let listener = TcpListener::bind(("127.0.0.1", 0)).expect("a port");
    let port = listener.local_addr().expect("an address").port();
    let error = PrivateCluster::start(&folder.path().join("postgres"), PostgresOptions { port, ..QUICK })
        .await
        .expect_err("taken");
    assert!(matches!(error, PostgresError::PortTaken(taken) if taken == port), "{error}");
}

#[tokio::test]
async fn a_folder_with_other_things_in_it_is_left_alone() {
    let folder = folder(OPEN);
    fs::write(folder.path().join("thesis.txt"), "").expect("written");
    let error = PrivateCluster::start(folder.path(), QUICK).await.expect_err("not ours");
    assert!(matches!(error, PostgresError::Folder { .. }), "{error}");
}

#[tokio::test]
async fn only_plain_names_become_databases() {
    let folder = folder(OPEN);
    let cluster = start(&folder.path().join("postgres")).await;
    for name in ["", "1a", "a\"; drop database postgres; --", "Auth", "a b"] {
        let error = cluster.create_database(name).await.expect_err("refused");
        assert!(matches!(error, PostgresError::DatabaseName(_)), "{name}: {error}");
    }
    cluster.stop().await;
}

#[tokio::test]
async fn where_root_s_server_can_not_reach_the_folder_it_lives_elsewhere() {
    if !nix::unistd::geteuid().is_root() {
        return;
    }
    let private = folder(0o700);
    let dir = private.path().join("postgres");
    let cluster = start(&dir).await;
    let location = cluster.location().to_owned();
    assert!(location.starts_with("/var/lib/auth-service-dev"), "{}", location.display());
    cluster.stop().await;
    let again = start(&dir).await;
    assert_eq!(again.location(), location, "found again");
    again.stop().await;
    fs::remove_dir_all(location).expect("removed");
}

#[tokio::test]
async fn dropped_the_cluster_ends_and_starts_again_at_once() {
    let folder = folder(OPEN);
    let dir = folder.path().join("postgres");
    drop(start(&dir).await);
    // The first server may still be going down here.
    start(&dir).await.stop().await;
}

const HOLD: &str = "AUTH_SERVICE_TEST_HOLD_CLUSTER";

/// The victim of the next test; nothing where that did not ask.
#[tokio::test]
async fn victim_that_holds_a_cluster() {
    let Some(dir) = env::var_os(HOLD) else { return };
    let cluster = start(Path::new(&dir)).await;
    println!("\nheld on {}", cluster.port());
    std::future::pending::<()>().await;
}

#[tokio::test]
async fn killed_with_9_it_leaves_no_server_behind_and_the_next_start_works() {
    let folder = folder(OPEN);
    let dir = folder.path().join("postgres");
    let this_module = module_path!().split_once("::").expect("a module of the crate").1;
    let mut victim = Command::new(env::current_exe().expect("this test"))
        .args(["--exact", &format!("{this_module}::victim_that_holds_a_cluster"), "--nocapture"])
        .env(HOLD, &dir)
        .stdout(Stdio::piped())
        .spawn()
        .expect("a victim");
    let (said, lines) = mpsc::channel();
    let stdout = BufReader::new(victim.stdout.take().expect("piped"));
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| said.send(line)));
    let port: u16 = loop {
        let line = lines.recv_timeout(Duration::from_secs(60)).expect("the victim speaks");
        if let Some(port) = line.strip_prefix("held on ") {
            break port.parse().expect("a port");
        }
    };
    assert!(TcpStream::connect(("127.0.0.1", port)).is_ok(), "it runs");
    victim.kill().expect("killed with 9");
    victim.wait().expect("reaped");

    // No waiting: the successor itself has to cope with a server that is still going down.
    let successor = start(&dir).await;
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err() || successor.port() == port, "the first is gone");
    successor.stop().await;
    let pid_file = dir.join("data/postmaster.pid");
    assert!(!pid_file.exists(), "stopped means gone");
}

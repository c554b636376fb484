//! Harm to PostgreSQL and to the way there.

use std::time::Duration;

use auth_service::{
    dev::postgres::{PostgresOptions, PrivateCluster},
    migrations,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use outbox_relay::append;
use secrecy::ExposeSecret;
use sqlx::Executor;
use tokio::time::sleep;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    keeper::Keeper,
    proxy::{Proxy, Wire},
    stage::Stage,
    support::parts::PARTS,
};

const PATIENCE: Duration = Duration::from_secs(120);

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("PostgreSQL crashes and recovers", "a backend killed with -9, twice", crashed),
        scenario!("PostgreSQL restarted", "stopped, away, started", restarted),
        scenario!("database connections terminated", "all of them, again and again", terminated),
        scenario!("database connections cut", "and new ones refused, again and again", cut),
        scenario!("the database falls silent", "connections stay, nothing passes", silent),
        scenario!("the database fails over", "old connections silent, new ones good", failed_over),
        scenario!("slow commits", "every packet late", slow),
        scenario!("the connection cut before COMMIT arrives", "not committed, and known not to be", commit_lost),
        scenario!("the connection cut after COMMIT", "committed, and known to be", answer_lost),
        scenario!("a locked table", "the pool is exhausted", locked),
        scenario!("a snapshot held under load", "nothing dead can be cleaned away, and some commit late", held),
        scenario!("the disk is full", "for the outbox, then for the archive", disk_full),
    ]
}

async fn load(fleet: &Fleet, all: &Keeper, stage: &Stage, harm: impl Future<Output = ()>) {
    fleet.load(&[all], stage.many(9), (8, stage.many(40)), harm).await;
}

async fn finish(fleet: Fleet, all: Keeper) -> Verdict {
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![all], Expected::default()).await
}

/// A cluster of its own, everything durable.
struct Cluster {
    folder: tempfile::TempDir,
    cluster: Option<PrivateCluster>,
    port: u16,
}

impl Cluster {
    async fn start() -> (Self, String) {
        let folder = tempfile::tempdir().expect("a folder");
        let mut this = Self { folder, cluster: None, port: 0 };
        this.up().await;
        let cluster = this.cluster.as_ref().expect("it runs");
        this.port = cluster.port();
        cluster.create_database("faults").await.expect("a database");
        let url = cluster.url("faults").expose_secret().to_owned();
        migrations::run(&url.parse().expect("a URL")).await.expect("the schema");
        (this, url)
    }

    async fn up(&mut self) {
        let options = PostgresOptions { durable: true, max_connections: 100, port: self.port };
        self.cluster = Some(PrivateCluster::start(self.folder.path(), options).await.expect("PostgreSQL starts"));
    }

    async fn down(&mut self) {
        self.cluster.take().expect("it runs").stop().await;
    }
}

/// The service's connections run through a wire; the checker's don't.
async fn wired(stage: &Stage) -> (Fleet, Proxy, Keeper) {
    let url = PARTS.database_url(&PARTS.database().await);
    let port = PARTS.connect_options("postgres").get_port();
    let wire = Proxy::to(format!("127.0.0.1:{port}")).await;
    let through = url.replace(&format!(":{port}/"), &format!(":{}/", wire.port));
    assert_ne!(url, through);
    let wishes = Wishes { database_url: Some(url), vars: vec![("DATABASE_URL", through)], ..Wishes::default() };
    let fleet = Fleet::new(stage, wishes).await;
    let all = fleet.all_roles().await;
    (fleet, wire, all)
}

async fn crashed(mut stage: Stage) -> Verdict {
    let (_cluster, url) = Cluster::start().await;
    let fleet = Fleet::new(&stage, Wishes { database_url: Some(url), ..Wishes::default() }).await;
    let all = fleet.all_roles().await;
    let rests: Vec<_> = (0..stage.many(2)).map(|_| stage.millis(300, 2000)).collect();
    load(&fleet, &all, &stage, async {
        for rest in rests {
            sleep(rest).await;
            fleet.disturbed();
            // One backend that dies so takes all others with it: PostgreSQL recovers from its log.
            let backend: Option<i32> = sqlx::query_scalar("select pg_backend_pid()").fetch_one(&fleet.db).await.ok();
            backend.inspect(|pid| kill(Pid::from_raw(*pid), Signal::SIGKILL).expect("may kill PostgreSQL"));
        }
    })
    .await;
    finish(fleet, all).await
}

async fn restarted(mut stage: Stage) -> Verdict {
    let (mut cluster, url) = Cluster::start().await;
    let fleet = Fleet::new(&stage, Wishes { database_url: Some(url), ..Wishes::default() }).await;
    let all = fleet.all_roles().await;
    let (before, away) = (stage.millis(200, 1500), stage.seconds(3, 60));
    fleet.disturbed();
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        cluster.down().await;
        sleep(away).await;
        cluster.up().await;
    })
    .await;
    finish(fleet, all).await
}

async fn terminated(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.all_roles().await;
    let rests: Vec<_> = (0..stage.many(5)).map(|_| stage.millis(100, 900)).collect();
    rests.iter().for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        for rest in rests {
            sleep(rest).await;
            fleet
                .count("select count(pg_terminate_backend(pid)) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()")
                .await;
        }
    })
    .await;
    finish(fleet, all).await
}

async fn cut(mut stage: Stage) -> Verdict {
    let (fleet, wire, all) = wired(&stage).await;
    let cuts: Vec<_> = (0..stage.many(4)).map(|_| (stage.millis(100, 900), stage.millis(10, 2500))).collect();
    cuts.iter().for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        for (before, length) in cuts {
            sleep(before).await;
            wire.set_for(Wire::Cut, length).await;
        }
    })
    .await;
    finish(fleet, all).await
}

async fn silent(mut stage: Stage) -> Verdict {
    let (fleet, wire, all) = wired(&stage).await;
    let (before, length) = (stage.millis(100, 900), stage.seconds(8, 90));
    fleet.disturbed();
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        wire.set_for(Wire::Silent, length).await;
    })
    .await;
    finish(fleet, all).await
}

async fn failed_over(mut stage: Stage) -> Verdict {
    let (fleet, wire, all) = wired(&stage).await;
    let before = stage.millis(100, 900);
    let length = stage.seconds(15, 60);
    fleet.disturbed();
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        wire.set_for(Wire::OldSilent, length).await;
        // The old server is gone for good: what still waits for it is told.
        wire.set_for(Wire::Cut, Duration::from_millis(100)).await;
    })
    .await;
    finish(fleet, all).await
}

async fn slow(mut stage: Stage) -> Verdict {
    let (fleet, wire, all) = wired(&stage).await;
    let (by, length) = (stage.millis(20, 120), stage.seconds(6, 60));
    load(&fleet, &all, &stage, wire.set_for(Wire::Slow(by), length)).await;
    finish(fleet, all).await
}

async fn commit_lost(stage: Stage) -> Verdict {
    losing_commits(stage, Wire::CommitLost).await
}

async fn answer_lost(stage: Stage) -> Verdict {
    losing_commits(stage, Wire::AnswerLost).await
}

async fn losing_commits(mut stage: Stage, fault: Wire) -> Verdict {
    let (fleet, wire, all) = wired(&stage).await;
    let losses: Vec<_> = (0..stage.many(6)).map(|_| (stage.millis(20, 400), stage.millis(50, 500))).collect();
    losses.iter().for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        for (before, length) in losses {
            sleep(before).await;
            wire.set_for(fault, length).await;
        }
    })
    .await;
    finish(fleet, all).await
}

async fn locked(mut stage: Stage) -> Verdict {
    let vars = vec![("DB_POOL_SIZE", "3".to_owned())];
    let fleet = Fleet::new(&stage, Wishes { vars, ..Wishes::default() }).await;
    let all = fleet.all_roles().await;
    let (before, length) = (stage.millis(0, 300), stage.seconds(5, 40));
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        let mut tx = fleet.db.begin().await.expect("a transaction");
        tx.execute("lock table auth_users, saga_state in access exclusive mode").await.expect("locked");
        sleep(length).await;
        tx.rollback().await.expect("let go");
    })
    .await;
    finish(fleet, all).await
}

async fn held(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.all_roles().await;
    let mut holder = fleet.db.begin().await.expect("a transaction");
    holder.execute("set transaction isolation level repeatable read").await.expect("set");
    holder.execute("select count(*) from outbox").await.expect("a snapshot");
    let until = tokio::time::Instant::now() + stage.seconds(10, 150);
    while tokio::time::Instant::now() < until {
        // One whose row has an early id, and commits when hundreds of later ones are out.
        let (mut late, message) = (fleet.db.begin().await.expect("a transaction"), fleet.event("late", 200));
        append(&mut late, &message).await.expect("appended");
        fleet.commit_events(8, 40).await;
        late.commit().await.expect("committed");
        fleet.was_told("late", message.id);
    }
    load(&fleet, &all, &stage, async {}).await;
    // Everything is out while the snapshot still stands.
    fleet.until_count("select count(*) from outbox", 0, PATIENCE).await;
    holder.rollback().await.expect("let go");
    finish(fleet, all).await
}

/// By a trigger that raises PostgreSQL's own error for it.
async fn disk_full(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.all_roles().await;
    let (before, length) = (stage.millis(100, 900), stage.seconds(3, 30));
    fleet
        .db
        .execute(
            "create function disk_full() returns trigger language plpgsql as $$
             begin raise exception 'could not extend file: No space left on device' using errcode = '53100'; end $$",
        )
        .await
        .expect("the function");
    (0..3).for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        for (fill, empty) in [
            (
                "create trigger full_disk before insert on outbox for each row execute function disk_full()",
                "drop trigger full_disk on outbox",
            ),
            (
                "create trigger full_disk before insert on outbox_archive for each row execute function disk_full()",
                "drop trigger full_disk on outbox_archive",
            ),
        ] {
            fleet.db.execute(fill).await.expect("full");
            sleep(length).await;
            fleet.db.execute(empty).await.expect("room again");
        }
    })
    .await;
    finish(fleet, all).await
}

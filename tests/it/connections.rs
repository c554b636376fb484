//! What becomes of a pooled connection: work that nobody waits for, work that ends badly, a server that was demoted.

use std::{sync::Arc, time::Duration};

use auth_service::app::Role;
use outbox_relay::{Database, PoolSettings};
use reqwest::Method;
use sqlx::{AssertSqlSafe, Executor, PgPool};
use tokio::sync::Barrier;

use crate::support::{TestService, browser::Browser, eventually, parts::PARTS, service::Wishes};

const SETTINGS: PoolSettings = PoolSettings {
    connections: 1,
    acquire_timeout: Duration::from_secs(30),
    work_timeout: Duration::from_secs(30),
    session: &[],
};

/// A pool of one, and a second look at the same database.
async fn pool_of_one(work_timeout: Duration) -> (Database, PgPool) {
    let options = PARTS.connect_options(&PARTS.bare_database().await);
    let observer = PgPool::connect_lazy_with(options.clone());
    observer.execute("create table noted (what text not null)").await.unwrap();
    (Database::new(options.application_name("lent"), PoolSettings { work_timeout, ..SETTINGS }), observer)
}

async fn note(db: &Database, what: &'static str) -> Result<i32, sqlx::Error> {
    db.run(move |conn| {
        Box::pin(async move {
            sqlx::query("insert into noted (what) values ($1)").bind(what).execute(&mut *conn).await?;
            sqlx::query_scalar("select pg_backend_pid()").fetch_one(conn).await
        })
    })
    .await
}

async fn noted(observer: &PgPool) -> Vec<String> {
    sqlx::query_scalar("select what from noted order by what").fetch_all(observer).await.unwrap()
}

/// Sessions of the pool that are in the middle of something.
async fn until_none_is_in_a_transaction(observer: &PgPool) {
    eventually("no session is in a transaction", || async {
        let busy: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and application_name = 'lent'
                and state like '%in transaction%'",
        )
        .fetch_one(observer)
        .await
        .unwrap();
        (busy == 0).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_inside_a_transaction_is_not_lent_again() {
    let (db, observer) = pool_of_one(SETTINGS.work_timeout).await;
    for left in ["begin", "begin; insert into noted (what) values ('of another')"] {
        // As the driver leaves it when it is dropped before the answer to BEGIN: it knows of no transaction.
        db.run(move |conn| Box::pin(conn.execute(left))).await.unwrap();
        note(&db, "mine").await.unwrap();
        assert_eq!(noted(&observer).await, ["mine"], "after {left:?}");
        observer.execute("delete from noted").await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_in_a_failed_transaction_is_not_lent_again() {
    let (db, observer) = pool_of_one(SETTINGS.work_timeout).await;
    db.run(|conn| {
        Box::pin(async move {
            conn.execute("begin").await?;
            assert!(conn.execute("select 1 / 0").await.is_err());
            Ok::<_, sqlx::Error>(())
        })
    })
    .await
    .unwrap();
    note(&db, "mine").await.unwrap();
    assert_eq!(noted(&observer).await, ["mine"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn work_goes_on_when_nobody_waits_for_it_and_a_close_waits_for_the_work() {
    let (db, observer) = pool_of_one(SETTINGS.work_timeout).await;
    let mut lock = observer.begin().await.unwrap();
    lock.execute("lock table noted").await.unwrap();
    let waiting = tokio::spawn({
        let db = db.clone();
        async move { note(&db, "left alone").await }
    });
    eventually("the work has begun", || async {
        let blocked: i64 = sqlx::query_scalar(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
        )
        .fetch_one(&observer)
        .await
        .unwrap();
        (blocked == 1).then_some(())
    })
    .await;
    waiting.abort();
    assert!(waiting.await.unwrap_err().is_cancelled());
    lock.rollback().await.unwrap();
    db.close().await;
    assert_eq!(noted(&observer).await, ["left alone"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_whose_work_took_too_long_or_panicked_is_closed_and_holds_nothing() {
    let (db, observer) = pool_of_one(Duration::from_millis(500)).await;
    let first = note(&db, "first").await.unwrap();
    let slow = db.transaction(|conn| {
        Box::pin(async move {
            conn.execute("insert into noted (what) values ('half')").await?;
            std::future::pending::<Result<(), sqlx::Error>>().await
        })
    });
    assert!(matches!(slow.await, Err(sqlx::Error::Io(error)) if error.kind() == std::io::ErrorKind::TimedOut));
    let second = note(&db, "second").await.unwrap();
    let panicking = tokio::spawn({
        let db = db.clone();
        async move {
            db.transaction::<(), sqlx::Error, _>(|conn| {
                Box::pin(async move {
                    conn.execute("insert into noted (what) values ('half')").await?;
                    panic!("a bug")
                })
            })
            .await
        }
    });
    assert!(panicking.await.unwrap_err().is_panic(), "the panic reaches who waits");
    let third = note(&db, "third").await.unwrap();
    assert!(first != second && second != third, "{first}, {second} and {third} are the same session");
    until_none_is_in_a_transaction(&observer).await;
    assert_eq!(noted(&observer).await, ["first", "second", "third"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_of_the_values_costs_no_connection() {
    let (db, observer) = pool_of_one(SETTINGS.work_timeout).await;
    let first = note(&db, "first").await.unwrap();
    let refused = db.transaction(|conn| Box::pin(conn.execute("insert into noted (what) values (null)")));
    assert_eq!(refused.await.unwrap_err().as_database_error().unwrap().code().unwrap(), "23502");
    assert_eq!(note(&db, "second").await.unwrap(), first);
    until_none_is_in_a_transaction(&observer).await;
    assert_eq!(noted(&observer).await, ["first", "second"]);
}

/// Every connection of the service's pool stays with a server that takes no writes any more.
async fn demote(service: &TestService, connections: usize) {
    let all = Arc::new(Barrier::new(connections));
    let demoted = (0..connections).map(|_| {
        let (db, all) = (service.running.app.db.clone(), all.clone());
        tokio::spawn(async move {
            db.run(move |conn| {
                Box::pin(async move {
                    all.wait().await;
                    conn.execute("set default_transaction_read_only = on").await
                })
            })
            .await
        })
    });
    for demoted in crate::support::join_all(demoted).await {
        demoted.unwrap().unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_to_a_demoted_server_are_let_go_of_at_once() {
    let vars = vec![("DB_POOL_SIZE", "4".to_owned())];
    let service =
        TestService::with(Wishes { roles: Some(vec![Role::Http]), vars, no_topics: true, ..Wishes::default() }).await;
    demote(&service, 4).await;
    // One more at most than there are connections, and those that are old enough without a single refusal.
    let mut refused = 0;
    while service.register(&format!("ada{refused}")).await.status() != 201 {
        refused += 1;
        assert!(refused <= 4, "the connections are kept");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_instance_whose_database_takes_no_writes_is_not_ready_still_reads_and_heals() {
    let service = TestService::rest().await;
    let ada = Browser::registered(&service, "ada").await;
    let database = &service.database;
    let server = PgPool::connect_lazy_with(PARTS.connect_options("postgres"));
    let set = async |sql: String| server.execute(AssertSqlSafe(sql)).await.unwrap();
    set(format!("alter database {database} set default_transaction_read_only = on")).await;
    set(format!("select pg_terminate_backend(pid) from pg_stat_activity where datname = '{database}'")).await;

    let ready = async || service.request(Method::GET, "/auth/health/ready").send().await.unwrap();
    eventually("the instance says why it is not ready", || async {
        let answer = ready().await;
        let unready = answer.status() == 503;
        (unready && answer.text().await.unwrap().contains("takes no writes")).then_some(())
    })
    .await;
    assert_eq!(service.register("bob").await.status(), 503);
    assert_eq!(ada.get(&service, "/auth/me").await.status(), 200);

    // Promoted. The sessions that are open keep what they began with.
    set(format!("alter database {database} reset default_transaction_read_only")).await;
    eventually("the instance is ready again", || async { (ready().await.status() == 200).then_some(()) }).await;
    // Another connection may be less than a second old, and with the old server still.
    eventually("a registration is taken again", || async {
        (service.register("bob").await.status() == 201).then_some(())
    })
    .await;
    service.stop().await;
}

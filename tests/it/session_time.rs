//! When a token is too old: time inside the service, COMMITs that hang, clocks that differ.

use std::{collections::BTreeSet, fs, process::Command};

use auth_service::app::Role;
use reqwest::{Client, Method, header};
use serde_json::Value;
use sqlx::{Connection, Executor, PgConnection};

use crate::support::{
    TestService,
    browser::{Browser, code},
    eventually,
    gate::Gate,
    join_all,
    parts::PARTS,
    process::{Replica, production_vars},
    service::Wishes,
};

async fn start(window: &str, beside: Option<(String, String)>, more: &[(&'static str, String)]) -> TestService {
    let mut vars = vec![("REST_REFRESH_ENABLED", "true".to_owned()), ("REFRESH_REUSE_WINDOW", window.to_owned())];
    vars.extend_from_slice(more);
    TestService::with(Wishes { roles: Some(vec![Role::Http]), vars, beside, no_topics: true }).await
}

fn holder(token: &str) -> Browser {
    let browser = Browser::default();
    browser.set("refreshToken", token);
    browser
}

async fn refresh(service: &TestService, token: &str) -> Result<String, (u16, String)> {
    let browser = holder(token);
    let response = browser.send(service, Method::POST, "/auth/refresh", None).await;
    match response.status().as_u16() {
        200 => Ok(browser.cookie("refreshToken")),
        status => Err((status, code(&response.json().await.unwrap()).to_owned())),
    }
}

/// Until so many sessions of this database wait for one another.
async fn until_waiting(service: &TestService, wanted: i64) {
    service
        .until_count(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'",
            wanted,
        )
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn racers_that_wait_for_a_lock_longer_than_the_window_all_get_the_same_token() {
    let service = start("200ms", None, &[]).await;
    let token = Browser::registered(&service, "ada").await.cookie("refreshToken");
    let mut conn = PgConnection::connect_with(&PARTS.connect_options(&service.database)).await.unwrap();
    let mut held = conn.begin().await.unwrap();
    held.execute("select from refresh_tokens for update").await.unwrap();
    let racing = join_all((0..4).map(|_| refresh(&service, &token)));
    let release = async {
        until_waiting(&service, 4).await;
        eventually("the window is over", || async {
            let over: bool = sqlx::query_scalar(
                "select min(query_start) < clock_timestamp() - interval '1 s' from pg_stat_activity
                  where datname = current_database() and wait_event_type = 'Lock'",
            )
            .fetch_one(&service.db)
            .await
            .unwrap();
            over.then_some(())
        })
        .await;
        held.rollback().await.unwrap();
    };
    let (answers, ()) = tokio::join!(racing, release);
    let tokens: BTreeSet<_> = answers.into_iter().map(|answer| answer.expect("a token")).collect();
    assert_eq!(tokens.len(), 1);
    assert_eq!(service.count("select generation::bigint from refresh_tokens where revoked_at is null").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_was_current_when_it_came_is_good_however_long_its_way_to_the_database() {
    let service = start("100ms", None, &[]).await;
    let gate = Gate::before(&service.database).await;
    let far = start("100ms", service.beside(), &[("DATABASE_URL", gate.url.clone())]).await;
    let first = Browser::registered(&service, "ada").await.cookie("refreshToken");
    assert_eq!(holder(&first).get(&far, "/auth/me").await.status(), 200);
    gate.shut();
    let late = refresh(&far, &first);
    let meanwhile = async {
        gate.until_somebody_waits().await;
        let second = refresh(&service, &first).await.unwrap();
        let third = refresh(&service, &second).await.unwrap();
        eventually("the window is over", || async {
            let over = "select (rotated_at < now() - interval '1 s')::int::bigint from refresh_tokens";
            (service.count(over).await == 1).then_some(())
        })
        .await;
        gate.open();
        third
    };
    let (late, third) = tokio::join!(late, meanwhile);
    assert_eq!(late, Ok(third), "two generations behind by now, and no reuse");
    assert_eq!(refresh(&far, &first).await, Err((401, "REFRESH_TOKEN_REUSED".to_owned())));
    far.stop().await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_hangs_for_longer_than_the_window_costs_no_session() {
    let database = PARTS.database().await;
    let mut admin = PgConnection::connect_with(&PARTS.connect_options("postgres")).await.unwrap();
    // Of all databases of this cluster, only this one waits for a standby.
    admin
        .execute(sqlx::AssertSqlSafe(format!("alter database {database} set synchronous_commit = 'on'")))
        .await
        .unwrap();
    let service = start("1s", Some((database, "standby.".to_owned())), &[]).await;
    let browser = Browser::registered(&service, "ada").await;
    let token = browser.cookie("refreshToken");

    admin.execute("alter system set synchronous_standby_names = '*'").await.unwrap();
    admin.execute("select pg_reload_conf()").await.unwrap();
    eventually("commits wait for a standby", || async {
        // A transaction without writes never waits.
        let names: String = sqlx::query_scalar("show synchronous_standby_names").fetch_one(&service.db).await.unwrap();
        (names == "*").then_some(())
    })
    .await;
    assert_eq!(refresh(&service, &token).await, Err((503, "SERVICE_UNAVAILABLE".to_owned())));
    assert_eq!(refresh(&service, &token).await, Err((503, "SERVICE_UNAVAILABLE".to_owned())), "the client tries again");
    assert_eq!(browser.get(&service, "/auth/me").await.status(), 200, "reading waits for nobody");
    admin.execute("alter system reset synchronous_standby_names").await.unwrap();
    admin.execute("select pg_reload_conf()").await.unwrap();

    service.until_count("select generation::bigint from refresh_tokens", 1).await;
    assert_eq!(service.count("select count(rotated_at) from refresh_tokens").await, 0, "nobody has seen it yet");
    let next = refresh(&service, &token).await.expect("the answer that was lost, once more");
    assert_eq!(service.count("select generation::bigint from refresh_tokens").await, 1);
    // From here on the window is open, and no longer than any other.
    eventually("the window is over", || async {
        let over = "select (rotated_at < now() - interval '2 s')::int::bigint from refresh_tokens";
        (service.count(over).await == 1).then_some(())
    })
    .await;
    assert_eq!(refresh(&service, &token).await, Err((401, "REFRESH_TOKEN_REUSED".to_owned())));
    assert_eq!(refresh(&service, &next).await, Err((401, "SESSION_ENDED".to_owned())));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_opens_its_window_itself_and_so_does_whoever_reads_the_row() {
    let service = start("30s", None, &[]).await;
    let browser = Browser::registered(&service, "ada").await;
    let old = browser.cookie("refreshToken");
    browser.send(&service, Method::POST, "/auth/refresh", None).await;
    assert_eq!(service.count("select count(rotated_at) from refresh_tokens").await, 1);
    for look in [Method::POST, Method::GET] {
        sqlx::query("update refresh_tokens set rotated_at = null").execute(&service.db).await.unwrap();
        let path = if look == Method::GET { "/auth/me" } else { "/auth/refresh" };
        let response = holder(&old).send(&service, look, path, None).await;
        assert_eq!(response.status(), 200, "{path}");
        assert_eq!(service.count("select count(rotated_at) from refresh_tokens").await, 1, "{path}");
    }
    service.stop().await;
}

/// As the fault suite has it: a library of ten lines before libc's clock.
fn clock_shifter() -> Vec<(String, String)> {
    const SOURCE: &str = r#"
        #define _GNU_SOURCE
        #include <stdlib.h>
        #include <sys/syscall.h>
        #include <time.h>
        #include <unistd.h>
        int clock_gettime(clockid_t clock, struct timespec *now) {
            long failed = syscall(SYS_clock_gettime, clock, now);
            const char *shift = getenv("CLOCK_SHIFT_SECONDS");
            if (!failed && clock == CLOCK_REALTIME && shift) now->tv_sec += atol(shift);
            return (int)failed;
        }"#;
    let folder = tempfile::tempdir().unwrap().keep();
    let (source, library) = (folder.join("clock.c"), folder.join("clock.so"));
    fs::write(&source, SOURCE).unwrap();
    let built = Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(built.expect("a C compiler").success());
    vec![("LD_PRELOAD".to_owned(), library.to_str().expect("UTF-8").to_owned())]
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_whose_clocks_are_an_hour_apart_agree_on_every_token() {
    let database = PARTS.database().await;
    let more = [("REST_REFRESH_ENABLED", "true"), ("COOKIE_SECURE", "false"), ("ACCESS_TOKEN_EXPIRES_IN", "4s")];
    let mut replicas = vec![];
    for shift in ["3600", "-3600"] {
        let mut vars = production_vars(&database, "clocks.", &more);
        vars.extend(clock_shifter());
        vars.push(("CLOCK_SHIFT_SECONDS".to_owned(), shift.to_owned()));
        replicas.push(Replica::serve(&vars).await);
    }
    let db = sqlx::PgPool::connect_lazy_with(PARTS.connect_options(&database));
    let client = Client::new();
    let ask = |replica: usize, method: Method, path: &str, cookies: String| {
        let url = format!("{}{path}", replicas[replica].http);
        client.request(method, url).header(header::COOKIE, cookies).send()
    };
    let body = serde_json::json!({ "username": "ada", "email": "ada@example.com", "password": "a long enough secret" });
    let registered = client.post(format!("{}/register", replicas[0].http)).json(&body).send().await.unwrap();
    assert_eq!(registered.status(), 201);
    let mut cookies = crate::support::browser::set_cookies(&registered);
    for turn in 0..6 {
        let pairs: Vec<String> = cookies.iter().map(|cookie| cookie.split(';').next().unwrap().to_owned()).collect();
        for (cookie, life) in cookies.iter().zip([4, 604_800]) {
            assert!(cookie.ends_with(&format!("Max-Age={life}")), "{cookie}");
        }
        for replica in [0, 1] {
            let me = ask(replica, Method::GET, "/me", pairs.join("; ")).await.unwrap();
            assert_eq!(me.status(), 200, "turn {turn}, replica {replica}");
        }
        let refreshed = ask(turn % 2, Method::POST, "/auth/refresh", pairs[1].clone()).await.unwrap();
        assert_eq!(refreshed.status(), 200, "turn {turn}");
        cookies = crate::support::browser::set_cookies(&refreshed);
    }
    // The last second of both tokens is the same everywhere.
    let access = cookies[0].split(';').next().unwrap().to_owned();
    eventually("the access token is over", || async {
        let me = ask(0, Method::GET, "/me", access.clone()).await.unwrap();
        (me.status() == 401).then_some(())
    })
    .await;
    for replica in [0, 1] {
        let me = ask(replica, Method::GET, "/me", access.clone()).await.unwrap();
        assert_eq!(code(&me.json::<Value>().await.unwrap()), "TOKEN_EXPIRED");
    }
    let seconds: f64 =
        sqlx::query_scalar("select abs(extract(epoch from now() - issued_at))::float8 from refresh_tokens")
            .fetch_one(&db)
            .await
            .unwrap();
    assert!(seconds < 600.0, "the row has the database's time: {seconds} s off");
    let refresh = cookies[1].split(';').next().unwrap().to_owned();
    sqlx::query("update refresh_tokens set expires_at = now()").execute(&db).await.unwrap();
    for replica in [0, 1] {
        let refused = ask(replica, Method::POST, "/auth/refresh", refresh.clone()).await.unwrap();
        assert_eq!(code(&refused.json::<Value>().await.unwrap()), "SESSION_ENDED");
    }
}

//! A client that goes away at any moment. Every request and every job is dropped at its first await, at its second, and
//! so on until it is through. After each drop every connection of the pool is as a new one, and nothing is half written.

use std::{
    future::poll_fn,
    pin::pin,
    task::Poll,
    time::{Duration, Instant},
};

use auth_service::{
    accounts::{self, RequestContext},
    admin,
    app::{App, Role},
    domain::{Identifier, UserId},
    http,
    sessions::{self, Arrived, Carried},
};
use axum::{
    body::{Body, to_bytes},
    http::{Request, header},
};
use futures_util::future::join;
use outbox_relay::inbox::Bytes;
use reqwest::Method;
use saga_orchestrator::{deadlines::SweepCursor, reply::Received};
use secrecy::{ExposeSecret, SecretString};
use serde_json::{Value, json};
use sqlx::Executor;
use tower::ServiceExt;
use uuid::Uuid;

use crate::support::{
    TestService,
    outbox::Outbox,
    service::{ADMIN_TOKEN, Wishes, registration},
};

/// No request has so many awaits.
const MOST: usize = 400;

/// Drops the future at its `n`th await.
async fn dropped_at<F: Future>(n: usize, future: F) -> Option<F::Output> {
    let mut future = pin!(future);
    let mut awaits = 0;
    poll_fn(|cx| match future.as_mut().poll(cx) {
        Poll::Ready(value) => Poll::Ready(Some(value)),
        Poll::Pending if awaits == n => Poll::Ready(None),
        Poll::Pending => {
            awaits += 1;
            Poll::Pending
        }
    })
    .await
}

async fn service() -> TestService {
    let vars = vec![("DB_POOL_SIZE", "2".to_owned())];
    let service =
        TestService::with(Wishes { roles: Some(vec![Role::Http]), vars, no_topics: true, ..Wishes::default() }).await;
    service.db.execute("create table answered (n bigint generated always as identity)").await.unwrap();
    service
}

/// Drops what `make` makes at each of its awaits, and looks at what is left each time. Answers with what the last one
/// came to, which was not dropped. One whose every await was over at once is made anew.
async fn at_every_await<F: Future>(service: &TestService, what: &str, mut make: impl FnMut(usize) -> F) -> F::Output {
    let mut awaits = 0;
    for attempt in 0..MOST {
        let done = dropped_at(awaits, make(attempt)).await;
        untouched(service, &format!("{what}, dropped at await {awaits}")).await;
        match done {
            Some(done) if awaits > 0 => return done,
            Some(_) => {}
            None => awaits += 1,
        }
    }
    panic!("{what} awaits nothing, or does not end");
}

async fn untouched(service: &TestService, place: &str) {
    const SESSIONS: &str = "
        select count(*) from pg_stat_activity a
         where datname = current_database() and application_name = 'auth-service'
           and (state like '%in transaction%'
                or state = 'idle' and exists (select from pg_locks l where l.pid = a.pid and l.locktype <> 'virtualxid'))";
    let db = &service.running.app.db;
    let since = Instant::now();
    loop {
        // Work that goes on, connections that are on their way back or being closed.
        let (open, idle) = db.connections();
        let quiet = open as usize == idle;
        if quiet && service.count(SESSIONS).await == 0 {
            break;
        }
        assert!(
            since.elapsed() < Duration::from_secs(10),
            "{place}: {open} connections, {idle} of them idle; {} in a transaction or with a lock",
            service.count(SESSIONS).await
        );
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    // What is answered is committed, on each of them.
    let before = service.count("select count(*) from answered").await;
    let answered = || db.run(|conn| Box::pin(conn.execute("insert into answered default values")));
    let (one, other) = join(answered(), answered()).await;
    one.and(other).unwrap_or_else(|error| panic!("{place}: {error}"));
    assert_eq!(service.count("select count(*) from answered").await, before + 2, "{place}: answered and not committed");
    let half = service
        .count(
            "select (select count(*) from auth_users u
                      where not exists (select from refresh_tokens r where r.user_id = u.id)
                         or not exists (select from saga_state s where s.saga_id = u.create_saga_id)
                         or not exists (select from outbox o where o.key = u.id::text
                                         union all select from outbox_parked p where p.key = u.id::text))
                  + (select count(*) from saga_state s
                      where s.status = 'running' and not exists (select from auth_users u where u.create_saga_id = s.saga_id))
                  + (select count(*) from outbox o
                      where o.topic like '%user.create'
                        and not exists (select from auth_users u where u.id::text = o.key))",
        )
        .await;
    assert_eq!(half, 0, "{place}: something is half written");
}

fn rest(method: Method, path: &str, cookies: &str, body: Option<Value>) -> Request<Body> {
    let request = Request::builder().method(method.as_str()).uri(path).header(header::COOKIE, cookies);
    match body {
        Some(body) => {
            request.header(header::CONTENT_TYPE, "application/json").body(Body::from(body.to_string())).unwrap()
        }
        None => request.body(Body::empty()).unwrap(),
    }
}

fn operator(method: Method, path: &str, body: Option<Value>) -> Request<Body> {
    let mut request = rest(method, path, "", body);
    request.headers_mut().insert(header::AUTHORIZATION, format!("Bearer {ADMIN_TOKEN}").parse().unwrap());
    request
}

/// The status and the body.
async fn answer(router: axum::Router, request: Request<Body>) -> (u16, Value) {
    let response = router.oneshot(request).await.unwrap();
    let status = response.status().as_u16();
    let body = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    (status, serde_json::from_slice(&body).unwrap_or_default())
}

/// A request that carries nothing.
fn carried() -> Carried {
    Carried::new(Arrived(Instant::now()))
}

struct SignedIn {
    access: String,
    refresh: String,
}

impl SignedIn {
    async fn new(app: &App, name: &str) -> Self {
        let password = SecretString::from("a long enough secret");
        let context = RequestContext::default();
        let signed_in = accounts::login(app, Identifier::parse(name), password, &carried(), &context).await;
        let tokens = signed_in.unwrap().tokens;
        Self {
            access: tokens.access.token.expose_secret().to_owned(),
            refresh: tokens.refresh.token.expose_secret().to_owned(),
        }
    }

    fn cookies(&self) -> String {
        format!("accessToken={}; refreshToken={}", self.access, self.refresh)
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_hangs_up_on_rest_leaves_nothing_behind() {
    let service = service().await;
    let app = &service.running.app;
    let router = http::router(app.clone());
    let register = |name: String, key: Option<&str>| {
        let mut request = rest(Method::POST, "/auth/register", "", Some(registration(&name)));
        if let Some(key) = key {
            request.headers_mut().insert("idempotency-key", key.parse().unwrap());
        }
        answer(router.clone(), request)
    };
    assert_eq!(register("ada".to_owned(), Some("the-one")).await.0, 201);

    let (status, _) = at_every_await(&service, "register", |n| register(format!("bob{n}"), None)).await;
    assert_eq!(status, 201);
    let (status, _) = at_every_await(&service, "register, keyed", |n| register(format!("eve{n}"), Some("key"))).await;
    assert_eq!(status, 201);
    let (status, _) = at_every_await(&service, "register, repeated", |_| register("ada".into(), Some("the-one"))).await;
    assert_eq!(status, 201);
    let (status, _) = at_every_await(&service, "register, taken", |_| register("ada".into(), None)).await;
    assert_eq!(status, 409);

    let held = SignedIn::new(app, "ada").await;
    let login = json!({ "identifier": "ada", "password": "a long enough secret" });
    let (status, _) = at_every_await(&service, "login", |_| {
        answer(router.clone(), rest(Method::POST, "/auth/login", &held.cookies(), Some(login.clone())))
    })
    .await;
    assert_eq!(status, 200);

    let ada = SignedIn::new(app, "ada").await;
    for (what, cookies) in [("me", ada.cookies()), ("me, renewed", format!("refreshToken={}", ada.refresh))] {
        let request = || answer(router.clone(), rest(Method::GET, "/auth/me", &cookies, None));
        assert_eq!(at_every_await(&service, what, |_| request()).await.0, 200);
    }
    for path in ["/auth/health", "/auth/health/ready"] {
        let request = || answer(router.clone(), rest(Method::GET, path, "", None));
        assert_eq!(at_every_await(&service, path, |_| request()).await.0, 200);
    }
    for scope in ["this", "others", "all"] {
        let ada = SignedIn::new(app, "ada").await;
        let path = format!("/auth/logout?scope={scope}");
        let request = || answer(router.clone(), rest(Method::DELETE, &path, &ada.cookies(), None));
        // An earlier one may have ended the session although nobody waited for its answer.
        let (status, _) = at_every_await(&service, &path, |_| request()).await;
        assert!([200, 400].contains(&status), "{path}: {status}");
        let ended = sessions::validate(app, &carried().with_access(&*ada.access)).await.is_err();
        assert_eq!(ended, scope != "others", "{path}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_caller_of_a_use_case_that_hangs_up_leaves_nothing_behind() {
    let service = service().await;
    let app = &service.running.app;
    service.registered("ada").await;
    let id = UserId(i32::try_from(service.count("select id::bigint from auth_users").await).unwrap());
    let ada = SignedIn::new(app, "ada").await;
    let (access, refresh) = (carried().with_access(&*ada.access), carried().with_refresh(&*ada.refresh));
    assert!(at_every_await(&service, "validate", |_| sessions::validate(app, &access)).await.is_ok());
    assert!(at_every_await(&service, "signed in", |_| sessions::signed_in(app, &access)).await.is_ok());
    let renewed = at_every_await(&service, "legacy refresh", |_| sessions::access_from_refresh(app, &refresh));
    assert!(renewed.await.is_ok());
    assert!(at_every_await(&service, "refresh", |_| sessions::refresh(app, &refresh)).await.is_ok());
    assert!(at_every_await(&service, "get account", |_| accounts::get_account(app, id)).await.unwrap().is_some());
    assert!(
        at_every_await(&service, "mark verified", |_| accounts::mark_verified(app, id, "a test"))
            .await
            .unwrap()
            .is_some()
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_who_hangs_up_leaves_nothing_behind() {
    let service = service().await;
    service.registered("ada").await;
    service.registered("bob").await;
    service
        .db
        .execute(
            "insert into outbox_blocked (key, row_id) select key, id from outbox;
             insert into outbox_parked (id, lane, key, seq, message_id, topic, payload, headers, saga_id, created_at, reason)
             select id, lane, key, seq, message_id, topic, payload, headers, saga_id, created_at, 'too large' from outbox;
             delete from outbox",
        )
        .await
        .unwrap();
    let router = admin::router(service.running.app.clone());
    let row = service.count("select min(id) from outbox_parked").await;
    let saga: Uuid = sqlx::query_scalar("select saga_id from saga_state limit 1").fetch_one(&service.db).await.unwrap();
    for path in [
        "/admin/outbox".to_owned(),
        format!("/admin/outbox/{row}"),
        "/admin/sagas".to_owned(),
        format!("/admin/sagas/{saga}"),
        "/admin/relay".to_owned(),
        "/admin/audit".to_owned(),
        "/metrics".to_owned(),
    ] {
        let request = || answer(router.clone(), operator(Method::GET, &path, None));
        assert_eq!(at_every_await(&service, &path, |_| request()).await.0, 200, "{path}");
    }
    for (path, dry_run) in [
        ("/admin/relay/pause".to_owned(), true),
        ("/admin/relay/pause".to_owned(), false),
        ("/admin/relay/resume".to_owned(), false),
        (format!("/admin/outbox/{row}/replay"), true),
        (format!("/admin/outbox/{row}/replay"), false),
        ("/admin/outbox/replay".to_owned(), true),
        ("/admin/outbox/replay".to_owned(), false),
    ] {
        let body = json!({ "reason": "a test", "dryRun": dry_run });
        let request = || answer(router.clone(), operator(Method::POST, &path, Some(body.clone())));
        let (status, body) = at_every_await(&service, &path, |_| request()).await;
        // 409: an earlier one has replayed the row although nobody waited for its answer.
        assert!(status == 200 || status == 409 && path.ends_with(&format!("{row}/replay")), "{path}: {status} {body}");
    }
    assert_eq!(service.count("select count(*) from outbox_parked").await, 0);
    let replays = service.count("select count(*) from admin_audit where action = 'outbox.replay' and outcome = 'done'");
    assert!(replays.await >= 2, "what happened is in the audit log");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_of_the_sagas_that_is_dropped_leaves_nothing_behind() {
    let service = service().await;
    let app = &service.running.app;
    let ada = service.registered("ada").await;
    service.registered("bob").await;
    service.db.execute("update saga_state set updated_at = updated_at - interval '1 hour'").await.unwrap();
    at_every_await(&service, "sweep", async |_| app.sagas.sweep(&app.db, &mut SweepCursor::default()).await.unwrap())
        .await;
    let done = Received {
        topic: "user.create.done".to_owned(),
        partition: 0,
        offset: 0,
        kafka_at: None,
        cluster_id: "none".to_owned(),
        bytes: Bytes {
            headers: vec![("saga-id".to_owned(), Some(ada["sagaId"].as_str().unwrap().into()))],
            payload: Some(b"{}".to_vec()),
            ..Bytes::default()
        },
    };
    at_every_await(&service, "reply", |_| app.sagas.receive(&app.db, &done)).await.unwrap();
    let taken: Vec<(String, Option<String>)> =
        sqlx::query_as("select outcome, detail from inbox").fetch_all(&service.db).await.unwrap();
    assert_eq!(taken, [("applied".to_owned(), None)]);
    assert_eq!(service.saga_status(ada["sagaId"].as_str().unwrap()).await, "completed");
    assert_eq!(service.count("select count(*) from auth_users where status = 'active'").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_that_is_dropped_at_any_moment_leaves_no_session_in_a_transaction() {
    let outbox = Outbox::without_topic().await;
    for n in 0..8 {
        outbox.append(&n.to_string(), "x").await;
    }
    for n in 0..20 {
        let relay = outbox.relay_without_broker("dropped");
        tokio::time::sleep(Duration::from_millis(4 * n)).await;
        relay.kill().await;
    }
    let left = "select count(*) from pg_stat_activity
                 where datname = current_database() and state like '%in transaction%' and pid <> pg_backend_pid()";
    outbox.until(left, 0).await;
    assert_eq!(outbox.count("select count(*) from outbox").await, 8);
}

//! What leaves a trace although it had no effect, and what is bounded however often it is repeated.

use auth_service::{app::Role, db};
use reqwest::{Client, Method, header};
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::{Browser, set_cookies},
    eventually, join_all,
    original::{BCRYPTJS_2, Original},
    parts::PARTS,
    process::{Replica, production_vars},
    service::{Wishes, registration},
};

const LIVE: &str = "select count(*) from refresh_tokens where revoked_at is null";

#[tokio::test(flavor = "multi_thread")]
async fn wrong_passwords_show_in_log_metric_and_audit_without_what_was_typed() {
    let database = PARTS.database().await;
    let vars = production_vars(&database, "traces.", &[("COOKIE_SECURE", "false"), ("REST_REFRESH_ENABLED", "true")]);
    let replica = Replica::serve(&vars).await;
    let db = sqlx::PgPool::connect_lazy_with(PARTS.connect_options(&database));
    let client = Client::new();
    let post = |path: &str, body: Value| client.post(format!("{}{path}", replica.http)).json(&body).send();
    let registered = post("/register", registration("ada")).await.unwrap();
    assert_eq!(registered.status(), 201);
    let cookies: Vec<String> =
        set_cookies(&registered).iter().map(|cookie| cookie.split(';').next().unwrap().to_owned()).collect();

    let wrong = |name: &str| json!({ "identifier": name, "password": "a-wrong-secret" });
    for _ in 0..11 {
        assert_eq!(post("/login", wrong("ada@example.com")).await.unwrap().status(), 401);
    }
    assert_eq!(post("/login", wrong("who-is-this")).await.unwrap().status(), 401);
    let audited = eventually("the tenth is audited", || async {
        let rows: Vec<(String, String, Value)> =
            sqlx::query_as("select actor, target, detail from admin_audit").fetch_all(&db).await.unwrap();
        (!rows.is_empty()).then_some(rows)
    })
    .await;
    assert_eq!(audited, [("service".to_owned(), "user 1".to_owned(), json!({ "count": 10, "withinSeconds": 900 }))]);
    let lines = replica.logged("a password let nobody in");
    let known: Vec<_> =
        lines.iter().filter(|line| line["user.id"] == "1" && line["reason"] == "wrong_password").collect();
    assert_eq!((known.len(), lines.len()), (11, 12));
    assert_eq!(replica.logged("is somebody guessing?").len(), 1);

    // A logout of nothing, a refresh that is refused, a token used again.
    let send = |method: Method, path: &str, cookies: &str| {
        client.request(method, format!("{}{path}", replica.http)).header(header::COOKIE, cookies.to_owned()).send()
    };
    assert_eq!(send(Method::DELETE, "/auth/logout", "accessToken=x").await.unwrap().status(), 400);
    assert_eq!(send(Method::POST, "/auth/refresh", "refreshToken=x").await.unwrap().status(), 401);
    assert_eq!(send(Method::POST, "/auth/refresh", &cookies[1]).await.unwrap().status(), 200);
    sqlx::query("update refresh_tokens set rotated_at = now() - interval '1 hour'").execute(&db).await.unwrap();
    for _ in 0..2 {
        assert_eq!(send(Method::POST, "/auth/refresh", &cookies[1]).await.unwrap().status(), 401);
    }
    let session: String =
        sqlx::query_scalar("select session_id::text from refresh_tokens").fetch_one(&db).await.unwrap();
    assert_eq!(replica.logged("a logout named no session")[0]["reason"], "TOKEN_INVALID");
    assert_eq!(replica.logged("tokens were refused")[0]["reason"], "TOKEN_INVALID");
    assert_eq!(replica.logged("was used again; its session is ended")[0]["session.id"], session.as_str());
    let refused = &replica.logged("a refresh token was refused")[0];
    assert_eq!((&refused["session.id"], &refused["reason"]), (&json!(session), &json!("SESSION_ENDED")));

    let metrics = client.get(format!("{}/metrics", replica.admin())).bearer_auth(crate::support::service::READ_TOKEN);
    let metrics = metrics.send().await.unwrap().text().await.unwrap();
    for line in [
        "auth_login_failures_total{reason=\"wrong_password\"} 11",
        "auth_login_failures_total{reason=\"unknown_user\"} 1",
        "auth_logouts_total{outcome=\"nothing\",scope=\"this\"} 1",
        "auth_token_refusals_total{request=\"refresh\",reason=\"TOKEN_INVALID\"} 1",
        "auth_token_refusals_total{request=\"refresh\",reason=\"SESSION_ENDED\"} 1",
        "auth_refresh_reuse_total 1",
    ] {
        assert!(metrics.contains(line), "{line} is not in {metrics}");
    }
    let log = replica.logged("").iter().map(Value::to_string).collect::<String>();
    for typed in ["a-wrong-secret", "who-is-this", "ada@example.com", cookies[1].as_str()] {
        assert!(!log.contains(typed), "{typed} is in the log");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn however_a_session_comes_to_be_a_user_has_no_more_than_fifty() {
    let vars = vec![
        ("HASH_QUEUE", "200".to_owned()),
        ("HASH_MAX_WAIT", "30s".to_owned()),
        ("DB_ACQUIRE_TIMEOUT", "20s".to_owned()),
    ];
    let service =
        TestService::with(Wishes { roles: Some(vec![Role::Http]), vars, no_topics: true, ..Wishes::default() }).await;
    let register = || service.request(Method::POST, "/auth/register").header("idempotency-key", "one");
    let first = Browser::default();
    let keyed = register().json(&registration("ada")).send().await.unwrap();
    first.set("refreshToken", set_cookies(&keyed)[1].split(';').next().unwrap().split_once('=').unwrap().1);
    // While the first session lives, a repeat is answered with it; afterwards each opens one.
    assert_eq!(first.send(&service, Method::DELETE, "/auth/logout", None).await.status(), 200);
    let answers = join_all((0..70).map(|_| register().json(&registration("ada")).send())).await;
    for answer in answers {
        assert_eq!(answer.unwrap().status(), 201);
    }
    assert_eq!(service.count(LIVE).await, 50);
    let logins = join_all((0..20).map(|_| Browser::logged_in(&service, "ada"))).await;
    assert_eq!(service.count(LIVE).await, 50);
    assert_eq!(logins[0].get(&service, "/me").await.status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sessions_of_an_adopted_user_are_capped_at_the_first_exchange() {
    let original = Original::new().await;
    let ada = original.user("ada", "ada@example.com", BCRYPTJS_2).await;
    let mut tokens = vec![];
    for n in 0..60 {
        tokens.push(original.session(ada, 60 + n).await);
    }
    let service = original.adopted().await;
    let browser = Browser::default();
    browser.set("refreshToken", &tokens[0]);
    assert_eq!(browser.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
    assert_eq!(service.count(LIVE).await, 50);
    assert_eq!(browser.get(&service, "/me").await.status(), 200);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 60, "no row is lost");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_token_of_ninety_days_serves_for_ninety_days() {
    use auth_proto::legacy::token::{RefreshTokenRequest, token_client::TokenClient};
    let original = Original::new().await;
    let ada = original.user("ada", "ada@example.com", BCRYPTJS_2).await;
    // Made so that its seven days end in fifty.
    let token = original.session(ada, -50 * 86_400).await;
    let service = original.adopted().await;
    sqlx::query(
        "update refresh_tokens set issued_at = now() - interval '90 days', expires_at = now() - interval '83 days',
                                   absolute_expires_at = now() - interval '60 days' - interval '1 s'",
    )
    .execute(&service.db)
    .await
    .unwrap();
    let mut conn = service.db.acquire().await.unwrap();
    assert_eq!(db::sessions::purge_ended(&mut conn, 100).await.unwrap(), 0, "the token may still come");
    let mut legacy = TokenClient::connect(service.grpc.clone()).await.unwrap();
    let answer = legacy.refresh_token(RefreshTokenRequest { refresh_token: token.clone() }).await.unwrap();
    let access = answer.into_inner().access_token;
    let browser = Browser::default();
    browser.set("accessToken", access);
    assert_eq!(browser.get(&service, "/me").await.status(), 200, "the access token is good");
    browser.forget("accessToken");
    browser.set("refreshToken", token);
    assert_eq!(browser.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
    sqlx::query("update refresh_tokens set generation = 0, issued_at = now() - interval '431 days', expires_at = now() - interval '31 days'")
        .execute(&service.db)
        .await
        .unwrap();
    assert_eq!(db::sessions::purge_ended(&mut conn, 100).await.unwrap(), 1, "no such token is good any more");
    service.stop().await;
}

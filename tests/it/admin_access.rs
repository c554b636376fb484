//! Who gets in at the operators' port, and what nobody is shown there.

use auth_service::app::Role;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::{Browser, code},
    parts::PARTS,
    service::{ADMIN_TOKEN, CALLER_TOKEN, READ_TOKEN, Wishes, base_vars, sha2_hex},
};

const OPERATE_TOKEN: &str = "adm_test_token_that_may_operate";
const RETIRED_TOKEN: &str = "adm_test_token_of_somebody_who_left";

/// From the weakest on.
const TOKENS: [(Option<&str>, &str); 5] = [
    (None, "nobody"),
    (Some(RETIRED_TOKEN), "a stranger"),
    (Some(READ_TOKEN), "viewer"),
    (Some(OPERATE_TOKEN), "ops"),
    (Some(ADMIN_TOKEN), "root"),
];
const READS: usize = 2;
const OPERATES: usize = 3;
const ADMINISTERS: usize = 4;

async fn service() -> TestService {
    let tokens = [("root", "admin", ADMIN_TOKEN), ("viewer", "read", READ_TOKEN), ("ops", "operate", OPERATE_TOKEN)]
        .map(|(name, scope, token)| format!("{name}:{scope}:{}", sha2_hex(token)));
    let vars = vec![("ADMIN_TOKENS", tokens.join(",")), ("METRICS_TOKEN_REQUIRED", "true".to_owned())];
    let roles = Some(vec![Role::Http, Role::Admin]);
    TestService::with(Wishes { roles, vars, no_topics: true, ..Wishes::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn every_route_wants_its_scope_and_every_refused_change_is_in_the_log() {
    let service = service().await;
    service.registered("ada").await;
    let saga: String = sqlx::query_scalar("select saga_id::text from saga_state").fetch_one(&service.db).await.unwrap();
    let row: i64 = sqlx::query_scalar("select id from outbox").fetch_one(&service.db).await.unwrap();
    let reason = json!({ "reason": "to see whether I may" });
    let forced = json!({ "reason": "to see whether I may", "force": true });
    let routes = [
        (Method::GET, "/admin/outbox".to_owned(), READS, Value::Null),
        (Method::GET, format!("/admin/outbox/{row}"), READS, Value::Null),
        (Method::GET, "/admin/sagas".to_owned(), READS, Value::Null),
        (Method::GET, format!("/admin/sagas/{saga}"), READS, Value::Null),
        (Method::GET, "/admin/relay".to_owned(), READS, Value::Null),
        (Method::GET, "/admin/audit".to_owned(), READS, Value::Null),
        (Method::GET, "/metrics".to_owned(), READS, Value::Null),
        (Method::POST, format!("/admin/outbox/{row}/replay"), OPERATES, reason.clone()),
        (Method::POST, "/admin/outbox/replay".to_owned(), OPERATES, reason.clone()),
        (Method::POST, "/admin/relay/pause".to_owned(), OPERATES, reason.clone()),
        (Method::POST, "/admin/relay/resume".to_owned(), OPERATES, reason),
        (Method::POST, format!("/admin/outbox/{row}/replay"), ADMINISTERS, forced.clone()),
        (Method::POST, "/admin/outbox/replay".to_owned(), ADMINISTERS, forced),
    ];
    for (method, path, needed, body) in routes {
        for (rank, (token, who)) in TOKENS.into_iter().enumerate() {
            let refused = "select count(*) from admin_audit where outcome = 'forbidden'";
            let before = service.count(refused).await;
            let mut request = service.client.request(method.clone(), format!("{}{path}", service.admin));
            if let Some(token) = token {
                request = request.bearer_auth(token);
            }
            if body != Value::Null {
                request = request.json(&body);
            }
            let response = request.send().await.unwrap();
            let (status, what) = (response.status(), format!("{method} {path} {body} by {who}"));
            let noted = service.count(refused).await - before;
            if rank >= needed {
                // 409: a row that is on its way is not sent again, whoever asks.
                assert!(matches!(status, StatusCode::OK | StatusCode::CONFLICT), "{what}: {status}");
                assert_eq!(noted, 0, "{what}");
                continue;
            }
            let (expected, word) = match rank < READS {
                true => (StatusCode::UNAUTHORIZED, "UNAUTHORIZED"),
                false => (StatusCode::FORBIDDEN, "FORBIDDEN"),
            };
            assert_eq!(status, expected, "{what}");
            assert_eq!(code(&response.json().await.unwrap()), word, "{what}");
            assert_eq!(noted, i64::from(expected == StatusCode::FORBIDDEN), "{what}: strangers fill no log");
        }
    }
    assert_eq!(service.count("select count(*) from outbox").await, 1, "nothing was done by anyone who may not");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_secret_is_in_any_answer_figure_or_log_of_changes() {
    let service = service().await;
    let browser = Browser::registered(&service, "ada").await;
    let pairs = ["accessToken", "refreshToken"].map(|name| browser.cookie(name));
    browser.send(&service, Method::DELETE, "/auth/logout", None).await;
    let again = Browser::logged_in(&service, "ada").await;
    service.post("/auth/login", json!({ "identifier": "ada", "password": "a wrong and telling secret" })).await;
    let pause = json!({ "reason": "for the log" });
    service.admin(Method::POST, "/admin/relay/pause", OPERATE_TOKEN).await.json(&pause).send().await.unwrap();
    // A secret where none belongs is not repeated.
    let misplaced = format!("/admin/outbox?token={ADMIN_TOKEN}");

    let mut shown = String::new();
    let row: i64 = sqlx::query_scalar("select id from outbox").fetch_one(&service.db).await.unwrap();
    let saga: String = sqlx::query_scalar("select saga_id::text from saga_state").fetch_one(&service.db).await.unwrap();
    let (row, saga) = (format!("/admin/outbox/{row}"), format!("/admin/sagas/{saga}"));
    for path in ["/admin/outbox", &row, "/admin/sagas", &saga, "/admin/relay", "/admin/audit", "/metrics", &misplaced] {
        let response = service.admin(Method::GET, path, READ_TOKEN).await.send().await.unwrap();
        assert!(!response.headers().contains_key("set-cookie"), "{path}");
        assert_eq!(response.headers()["cache-control"], "no-store", "{path}");
        shown.push_str(&response.text().await.unwrap());
    }
    for part in ["ada", "create_user", "auth_outbox_pending", "for the log"] {
        assert!(shown.contains(part), "{part:?} should be in what is searched");
    }
    let hash: String = sqlx::query_scalar("select password_hash from auth_users").fetch_one(&service.db).await.unwrap();
    let mut secrets = vec![hash, "a long enough secret".to_owned(), "a wrong and telling secret".to_owned()];
    for token in pairs.into_iter().chain([again.cookie("accessToken"), again.cookie("refreshToken")]) {
        secrets.push(token.rsplit('.').next().expect("a signature").to_owned());
    }
    for token in [ADMIN_TOKEN, OPERATE_TOKEN, READ_TOKEN, CALLER_TOKEN] {
        secrets.extend([token.to_owned(), sha2_hex(token)]);
    }
    for (name, value) in base_vars(&service.database, "") {
        if name.ends_with("PRIVATE_KEY") {
            secrets.push(value.lines().nth(1).expect("a line of the key").to_owned());
        }
    }
    let url = PARTS.database_url(&service.database);
    secrets.push(url.split(['@', '/', ':']).nth(4).expect("a password").to_owned());
    for secret in secrets {
        assert!(secret.len() > 8 && !shown.contains(&secret), "{secret:?} is shown");
    }
    service.stop().await;
}

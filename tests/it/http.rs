//! REST as clients see it.

use auth_service::app::Role;
use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::{Browser, code, set_cookies},
    join_all,
    service::{Wishes, registration},
};

/// One bad request and its documented answer.
struct Bad {
    what: &'static str,
    method: Method,
    path: &'static str,
    headers: &'static [(&'static str, &'static str)],
    body: &'static str,
    status: u16,
    code: &'static str,
}

const JSON: &[(&str, &str)] = &[("content-type", "application/json")];

fn bad(what: &'static str, method: Method, path: &'static str, body: &'static str, status: u16, code: &'static str) -> Bad {
    Bad { what, method, path, headers: JSON, body, status, code }
}

fn bad_requests() -> Vec<Bad> {
    let post = |what, path, body| bad(what, Method::POST, path, body, 400, "VALIDATION_ERROR");
    let with = |bad: Bad, headers| Bad { headers, ..bad };
    let login = r#"{"identifier":"ada","password":"a long enough secret"}"#;
    vec![
        post("no body", "/auth/register", ""),
        post("cut JSON", "/auth/register", r#"{"username":"ada""#),
        post("no JSON", "/auth/register", "username=ada"),
        post("an array", "/auth/register", "[]"),
        post("a string", "/register", "\"ada\""),
        post("null", "/auth/register", "null"),
        post("no field", "/auth/register", "{}"),
        post("numbers", "/auth/register", r#"{"username":1,"email":2,"password":3}"#),
        post("objects", "/auth/register", r#"{"username":{},"email":[],"password":true}"#),
        post("a field twice", "/auth/register", r#"{"username":"ada","username":"eve","email":"a@b.cd","password":"a long enough secret"}"#),
        post("a NUL in the name", "/auth/register", r#"{"username":"a\u0000da","email":"a@b.cd","password":"a long enough secret"}"#),
        post("a lone surrogate", "/auth/register", r#"{"username":"\ud800","email":"a@b.cd","password":"a long enough secret"}"#),
        post("an @ in the name", "/auth/register", r#"{"username":"a@b","email":"a@b.cd","password":"a long enough secret"}"#),
        post("a short name", "/auth/register", r#"{"username":"a","email":"a@b.cd","password":"a long enough secret"}"#),
        post("no address", "/auth/register", r#"{"username":"ada","email":"ada","password":"a long enough secret"}"#),
        post("two @", "/auth/register", r#"{"username":"ada","email":"a@b@c.de","password":"a long enough secret"}"#),
        post("an empty password", "/auth/register", r#"{"username":"ada","email":"a@b.cd","password":""}"#),
        post("a short password", "/auth/register", r#"{"username":"ada","email":"a@b.cd","password":"short"}"#),
        with(post("an empty key", "/auth/register", "{}"), &[("content-type", "application/json"), ("idempotency-key", "")]),
        post("login without a name", "/auth/login", r#"{"password":"x"}"#),
        post("login without a password", "/auth/login", r#"{"identifier":"ada"}"#),
        post("login with an empty name", "/login", r#"{"identifier":" ","password":"x"}"#),
        post("login with a number", "/auth/login", r#"{"identifier":7,"password":"x"}"#),
        bad("unknown user", Method::POST, "/auth/login", login, 401, "INVALID_CREDENTIALS"),
        bad("a NUL in a login", Method::POST, "/auth/login", r#"{"identifier":"a\u0000","password":"x"}"#, 401, "INVALID_CREDENTIALS"),
        with(bad("a form", Method::POST, "/auth/login", "identifier=ada", 415, "UNSUPPORTED_MEDIA_TYPE"), &[("content-type", "application/x-www-form-urlencoded")]),
        with(bad("plain text", Method::POST, "/auth/register", login, 415, "UNSUPPORTED_MEDIA_TYPE"), &[("content-type", "text/plain")]),
        with(bad("no type", Method::POST, "/auth/login", login, 415, "UNSUPPORTED_MEDIA_TYPE"), &[]),
        bad("logout without a cookie", Method::DELETE, "/auth/logout", "", 400, "TOKEN_NOT_FOUND"),
        with(bad("logout with rubbish", Method::DELETE, "/logout", "", 400, "TOKEN_NOT_FOUND"), &[("cookie", "refreshToken=rubbish; accessToken=a.b.c")]),
        bad("an unknown scope", Method::DELETE, "/auth/logout?scope=everything", "", 400, "VALIDATION_ERROR"),
        bad("nobody", Method::GET, "/auth/me", "", 401, "TOKEN_NOT_FOUND"),
        with(bad("a forged token", Method::GET, "/me", "", 401, "TOKEN_INVALID"), &[("cookie", "accessToken=eyJhbGciOiJub25lIn0.e30.")]),
        with(bad("a cookie twice", Method::GET, "/auth/me", "", 400, "VALIDATION_ERROR"), &[("cookie", "accessToken=a; accessToken=b")]),
        bad("no such route", Method::GET, "/auth/nothing", "", 404, "NOT_FOUND"),
        bad("no such bare route", Method::POST, "/nothing", "{}", 404, "NOT_FOUND"),
        bad("refresh is off", Method::POST, "/auth/refresh", "", 404, "NOT_FOUND"),
        bad("a slash too many", Method::GET, "/auth/me/", "", 404, "NOT_FOUND"),
        bad("a wrong method", Method::GET, "/auth/register", "", 405, "METHOD_NOT_ALLOWED"),
        bad("a wrong bare method", Method::PUT, "/login", "{}", 405, "METHOD_NOT_ALLOWED"),
        bad("TRACE", Method::TRACE, "/auth/me", "", 405, "METHOD_NOT_ALLOWED"),
        bad("logout by GET", Method::GET, "/auth/logout", "", 405, "METHOD_NOT_ALLOWED"),
        with(bad("a foreign site", Method::POST, "/auth/login", login, 403, "FOREIGN_ORIGIN"), &[("content-type", "application/json"), ("sec-fetch-site", "cross-site")]),
        with(bad("a foreign origin", Method::DELETE, "/auth/logout", "", 403, "FOREIGN_ORIGIN"), &[("origin", "https://evil.test")]),
        with(bad("a sandboxed page", Method::POST, "/auth/register", "{}", 403, "FOREIGN_ORIGIN"), &[("content-type", "application/json"), ("origin", "null")]),
    ]
}

/// REST alone: nothing here needs a broker.
async fn rest() -> TestService {
    rest_with(&[]).await
}

async fn rest_with(vars: &[(&'static str, &str)]) -> TestService {
    let vars = vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    TestService::with(Wishes { roles: Some(vec![Role::Http]), vars, no_topics: true, ..Wishes::default() }).await
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_their_documented_answers() {
    let service = rest().await;
    for bad in bad_requests() {
        for problem in [false, true] {
            let mut request = service.request(bad.method.clone(), bad.path).body(bad.body);
            for (name, value) in bad.headers {
                request = request.header(*name, *value);
            }
            if problem {
                request = request.header(header::ACCEPT, "application/problem+json");
            }
            let response = request.send().await.unwrap();
            assert_eq!(response.status(), bad.status, "{}", bad.what);
            let headers = response.headers().clone();
            let body: Value = response.json().await.unwrap();
            match problem {
                false => {
                    assert_eq!(headers[header::CONTENT_TYPE], "application/json", "{}", bad.what);
                    assert_eq!(code(&body), bad.code, "{}", bad.what);
                    assert_eq!(body["statusCode"], bad.status);
                    assert_eq!(body["errors"].is_array(), bad.code == "VALIDATION_ERROR", "{}: {body}", bad.what);
                }
                true => {
                    assert_eq!(headers[header::CONTENT_TYPE], "application/problem+json", "{}", bad.what);
                    assert_eq!((&body["code"], &body["status"]), (&json!(bad.code), &json!(bad.status)));
                    assert_eq!(body["requestId"], headers["x-request-id"].to_str().unwrap());
                }
            }
            for name in ["x-request-id", "x-correlation-id"] {
                assert!(!headers[name].is_empty(), "{}", bad.what);
            }
            assert_eq!(headers[header::CACHE_CONTROL], "no-store", "{}", bad.what);
            assert_eq!(headers[header::X_CONTENT_TYPE_OPTIONS], "nosniff");
            assert_eq!(headers[header::CONTENT_SECURITY_POLICY], "default-src 'none'; frame-ancestors 'none'");
            assert_eq!(headers.contains_key(header::ALLOW), bad.status == 405, "{}", bad.what);
        }
    }
    assert_eq!(service.count("select count(*) from auth_users").await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_gets_an_answer_and_no_reset() {
    let service = rest().await;
    for (size, expected) in [(16 * 1024 + 1, 413), (8 * 1024 * 1024, 413)] {
        let response = service
            .request(Method::POST, "/auth/register")
            .header(header::CONTENT_TYPE, "application/json")
            .body("x".repeat(size))
            .send()
            .await
            .unwrap_or_else(|error| panic!("{size} bytes: {error:?}"));
        assert_eq!(response.status(), expected);
        assert_eq!(code(&response.json().await.unwrap()), "PAYLOAD_TOO_LARGE");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_of_just_the_limit_is_read() {
    let service = rest().await;
    let mut body = registration("ada").to_string();
    body.push_str(&" ".repeat(16 * 1024 - body.len()));
    let request = service.request(Method::POST, "/auth/register").header(header::CONTENT_TYPE, "application/json");
    assert_eq!(request.body(body).send().await.unwrap().status(), 201);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_signs_in_with_two_cookies() {
    let service = rest().await;
    let response = service.register("Ada.L").await;
    assert_eq!(response.status(), StatusCode::CREATED);
    let cookies = set_cookies(&response);
    assert_eq!(cookies.len(), 2);
    for (cookie, name, life) in [(&cookies[0], "accessToken", 900), (&cookies[1], "refreshToken", 604_800)] {
        assert!(cookie.starts_with(&format!("{name}=eyJ")), "{cookie}");
        assert!(cookie.ends_with(&format!("; HttpOnly; SameSite=Lax; Path=/; Max-Age={life}")), "{cookie}");
    }
    let body: Value = response.json().await.unwrap();
    assert_eq!(body["statusCode"], 201);
    assert!(body["message"].is_string());
    let data = &body["data"];
    assert_eq!((&data["username"], &data["email"]), (&json!("Ada.L"), &json!("Ada.L@example.com")));
    assert_eq!(data["isVerified"], false);
    assert!(data["id"].is_u64() && data["sagaId"].is_string());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_taken_name_is_taken_in_any_spelling() {
    let service = rest().await;
    service.registered("ada").await;
    let mut same_email = registration("eve");
    same_email["email"] = json!("ADA@Example.COM");
    let mut same_name = registration("ADA");
    same_name["email"] = json!("other@example.com");
    for (body, expected) in [(same_email, "EMAIL_ALREADY_EXISTS"), (same_name, "USERNAME_ALREADY_EXISTS")] {
        let response = service.post("/register", body).await;
        assert_eq!(response.status(), 409);
        assert_eq!(code(&response.json().await.unwrap()), expected);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_equal_registrations_at_once_one_succeeds() {
    let service = rest().await;
    let answers = join_all((0..50).map(|_| service.register("ada"))).await;
    let created = answers.iter().filter(|answer| answer.status() == 201).count();
    let refused = answers.iter().filter(|answer| answer.status() == 409).count();
    assert_eq!((created, refused), (1, 49));
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_registration_under_one_key_gets_the_first_answer() {
    let service = rest().await;
    let register = |key: &'static str, body: Value| {
        service.request(Method::POST, "/auth/register").header("idempotency-key", key).json(&body).send()
    };
    // At once, and again later: one registration, one session, one answer.
    let racing = join_all((0..8).map(|_| register("k-1", registration("ada")))).await;
    let mut answers = vec![];
    for answer in racing.into_iter().chain([register("k-1", registration("ada")).await]) {
        let answer = answer.unwrap();
        assert_eq!(answer.status(), 201);
        let refresh = set_cookies(&answer)[1].clone();
        let refresh = refresh.split(';').next().unwrap().to_owned();
        answers.push((answer.json::<Value>().await.unwrap()["data"].clone(), refresh));
    }
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]), "{answers:?}");
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 1);

    let mut other_password = registration("ada");
    other_password["password"] = json!("another long secret");
    assert_eq!(register("k-1", other_password).await.unwrap().status(), 409);
    assert_eq!(register("k-2", registration("ada")).await.unwrap().status(), 409);

    sqlx::query("delete from auth_users").execute(&service.db).await.unwrap();
    let taken_back = register("k-1", registration("ada")).await.unwrap();
    assert_eq!(taken_back.status(), 409);
    assert_eq!(code(&taken_back.json().await.unwrap()), "REGISTRATION_TAKEN_BACK");
    assert_eq!(register("k-3", registration("ada")).await.unwrap().status(), 201);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_takes_either_name_in_any_field() {
    let service = rest().await;
    let id = service.registered("ada").await["id"].clone();
    for (field, name) in [
        ("identifier", "ada"),
        ("identifier", " ADA@example.com "),
        ("email", "ada@example.com"),
        ("username", "Ada"),
    ] {
        let response = service.post("/login", json!({ field: name, "password": "a long enough secret" })).await;
        assert_eq!(response.status(), 200, "{field}={name}");
        assert_eq!(set_cookies(&response).len(), 2);
        let data = response.json::<Value>().await.unwrap()["data"].clone();
        assert_eq!(data, json!({ "id": id, "username": "ada", "email": "ada@example.com", "isVerified": false }));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_unknown_user_and_a_wrong_password_get_one_answer() {
    let service = rest().await;
    service.registered("ada").await;
    sqlx::query("update auth_users set status = 'active'").execute(&service.db).await.unwrap();
    service.registered("gone").await;
    sqlx::query("update auth_users set status = 'closing' where username = 'gone'").execute(&service.db).await.unwrap();
    let mut bodies = vec![];
    for (name, password) in [("ada", "a wrong secret"), ("nobody", "a long enough secret"), ("gone", "a long enough secret")] {
        let response = service.post("/auth/login", json!({ "identifier": name, "password": password })).await;
        assert_eq!(response.status(), 401);
        assert!(set_cookies(&response).is_empty());
        bodies.push(response.text().await.unwrap());
    }
    assert!(bodies.windows(2).all(|pair| pair[0] == pair[1]), "{bodies:?}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_weak_stored_hash_is_replaced_at_login() {
    let service = rest().await;
    service.registered("ada").await;
    // As bcryptjs stored it.
    let old = bcrypt::hash("a long enough secret", 5).unwrap();
    sqlx::query("update auth_users set password_hash = $1").bind(&old).execute(&service.db).await.unwrap();
    let browser = Browser::logged_in(&service, "ada").await;
    assert_eq!(browser.get(&service, "/me").await.status(), 200);
    assert_eq!(service.count("select count(*) from auth_users where password_hash like 'v1$%'").await, 1);
    Browser::logged_in(&service, "ada").await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_login_ends_the_session_whose_cookie_it_replaces() {
    let service = rest().await;
    let browser = Browser::registered(&service, "ada").await;
    let other = Browser::logged_in(&service, "ada").await;
    let login = json!({ "email": "ada@example.com", "password": "a long enough secret" });
    assert_eq!(browser.send(&service, Method::POST, "/auth/login", Some(login)).await.status(), 200);
    assert_eq!(service.count("select count(*) from refresh_tokens where revoked_reason = 'replaced by a new login'").await, 1);
    for browser in [browser, other] {
        assert_eq!(browser.get(&service, "/auth/me").await.status(), 200);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logout_ends_as_many_sessions_as_it_was_asked_to() {
    let service = rest().await;
    let first = Browser::registered(&service, "ada").await;
    let second = Browser::logged_in(&service, "ada").await;
    let third = Browser::logged_in(&service, "ada").await;

    let response = first.send(&service, Method::DELETE, "/auth/logout", None).await;
    assert_eq!(response.status(), 200);
    assert_eq!(set_cookies(&response), [
        "accessToken=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0",
        "refreshToken=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0",
    ]);
    let body: Value = response.json().await.unwrap();
    assert_eq!((&body["statusCode"], &body["message"]), (&json!(200), &json!("Logged out successfully")));
    assert_eq!(second.get(&service, "/me").await.status(), 200);

    assert_eq!(second.send(&service, Method::DELETE, "/logout?scope=others", None).await.status(), 200);
    assert_eq!(second.get(&service, "/me").await.status(), 200);
    assert_eq!(third.get(&service, "/me").await.status(), 401);

    let fourth = Browser::logged_in(&service, "ada").await;
    assert_eq!(second.send(&service, Method::DELETE, "/logout?scope=all", None).await.status(), 200);
    assert_eq!(fourth.get(&service, "/me").await.status(), 401);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_that_finds_nothing_clears_the_cookies_all_the_same() {
    let service = rest().await;
    let browser = Browser::registered(&service, "ada").await;
    let stale = browser.request(&service, Method::DELETE, "/auth/logout");
    assert_eq!(browser.send(&service, Method::DELETE, "/auth/logout", None).await.status(), 200);
    let again = stale.send().await.unwrap();
    assert_eq!(again.status(), 400);
    assert_eq!(set_cookies(&again).len(), 2);
    let body: Value = again.json().await.unwrap();
    assert_eq!((code(&body), &body["message"]), ("TOKEN_NOT_FOUND", &json!("Failed to log out. Token not found")));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn me_renews_the_access_token_and_leaves_the_refresh_token_alone() {
    let service = rest().await;
    let browser = Browser::registered(&service, "ada").await;
    assert!(set_cookies(&browser.get(&service, "/me").await).is_empty());
    browser.set("accessToken", "rubbish");
    let response = browser.get(&service, "/auth/me").await;
    assert_eq!(response.status(), 200);
    let cookies = set_cookies(&response);
    assert_eq!(cookies.len(), 1);
    assert!(cookies[0].starts_with("accessToken=eyJ"), "{cookies:?}");
    assert_eq!(response.json::<Value>().await.unwrap()["data"]["username"], "ada");
    assert_eq!(service.count("select max(generation)::bigint from refresh_tokens").await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clients_correlation_id_is_kept_and_rubbish_is_replaced() {
    let service = rest().await;
    for (given, kept) in [("shop-7", true), ("has a space", false)] {
        let response = service.request(Method::GET, "/auth/me").header("x-correlation-id", given).send().await.unwrap();
        assert_eq!(response.headers()["x-correlation-id"] == given, kept, "{given}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_alive_from_ready() {
    let service = rest().await;
    for path in ["/auth/health", "/health", "/auth/health/ready", "/auth/health/live", "/health/live"] {
        let response = service.request(Method::GET, path).send().await.unwrap();
        assert_eq!(response.status(), 200, "{path}");
        let body: Value = response.json().await.unwrap();
        assert_eq!((&body["status"], &body["service"]), (&json!(200), &json!("auth-service")));
        assert!(body["uptime"].is_f64() && body["timestamp"].is_string() && body["version"].is_string(), "{body}");
    }
    let head = service.request(Method::HEAD, "/auth/health").send().await.unwrap();
    assert_eq!(head.status(), 200);

    service.cut_database().await;
    assert_eq!(service.request(Method::GET, "/auth/health/live").send().await.unwrap().status(), 200);
    let response = service.request(Method::GET, "/auth/health/ready").send().await.unwrap();
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key(header::RETRY_AFTER));
    let body: Value = response.json().await.unwrap();
    assert_eq!((&body["status"], code(&body)), (&json!(503), "SERVICE_UNAVAILABLE"));
    service.mend_database().await;
    assert_eq!(service.request(Method::GET, "/auth/health").send().await.unwrap().status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_logs_nobody_out() {
    let service = rest_with(&[("REST_REFRESH_ENABLED", "true"), ("DB_ACQUIRE_TIMEOUT", "1s")]).await;
    let browser = Browser::registered(&service, "ada").await;
    let (access, refresh) = (browser.cookie("accessToken"), browser.cookie("refreshToken"));
    service.cut_database().await;
    let login = json!({ "identifier": "ada", "password": "a long enough secret" });
    for (method, path, body) in [
        (Method::POST, "/auth/register", Some(registration("eve"))),
        (Method::POST, "/auth/login", Some(login)),
        (Method::GET, "/auth/me", None),
        (Method::POST, "/auth/refresh", None),
        (Method::DELETE, "/auth/logout", None),
    ] {
        let response = browser.send(&service, method, path, body).await;
        assert_eq!(response.status(), 503, "{path}");
        assert!(response.headers().contains_key(header::RETRY_AFTER), "{path}");
        assert!(set_cookies(&response).is_empty(), "{path}");
        assert_eq!(code(&response.json().await.unwrap()), "SERVICE_UNAVAILABLE", "{path}");
    }
    service.mend_database().await;
    assert_eq!((browser.cookie("accessToken"), browser.cookie("refreshToken")), (access, refresh));
    for (method, path) in [(Method::GET, "/auth/me"), (Method::POST, "/auth/refresh"), (Method::DELETE, "/auth/logout")] {
        assert_eq!(browser.send(&service, method, path, None).await.status(), 200, "{path}");
    }
    assert_eq!(service.count("select count(*) from auth_users").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn origins_the_operator_named_may_call() {
    let service = rest_with(&[("CORS_ORIGINS", "https://app.example")]).await;
    let ask = |origin: &'static str| {
        service
            .request(Method::OPTIONS, "/auth/login")
            .header(header::ORIGIN, origin)
            .header(header::ACCESS_CONTROL_REQUEST_METHOD, "POST")
            .header(header::ACCESS_CONTROL_REQUEST_HEADERS, "content-type")
            .send()
    };
    let ours = ask("https://app.example").await.unwrap();
    assert_eq!(ours.status(), 200);
    assert_eq!(ours.headers()[header::ACCESS_CONTROL_ALLOW_ORIGIN], "https://app.example");
    assert_eq!(ours.headers()[header::ACCESS_CONTROL_ALLOW_CREDENTIALS], "true");
    assert!(!ask("https://evil.test").await.unwrap().headers().contains_key(header::ACCESS_CONTROL_ALLOW_ORIGIN));

    let register = service
        .request(Method::POST, "/auth/register")
        .header(header::ORIGIN, "https://app.example")
        .header("sec-fetch-site", "cross-site")
        .json(&registration("ada"));
    assert_eq!(register.send().await.unwrap().status(), 201);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn anyone_can_verify_an_access_token_with_the_published_key() {
    let service = rest().await;
    let browser = Browser::registered(&service, "ada").await;
    let response = service.request(Method::GET, "/.well-known/jwks.json").send().await.unwrap();
    assert_eq!(response.headers()[header::CACHE_CONTROL], "public, max-age=300");
    let tag = response.headers()[header::ETAG].clone();
    let keys: jsonwebtoken::jwk::JwkSet = response.json().await.unwrap();
    assert_eq!(keys.keys.len(), 1);
    let token = browser.cookie("accessToken");
    let kid = jsonwebtoken::decode_header(&token).unwrap().kid.unwrap();
    let key = jsonwebtoken::DecodingKey::from_jwk(keys.find(&kid).expect("its key")).unwrap();
    let mut rules = jsonwebtoken::Validation::new(jsonwebtoken::Algorithm::RS256);
    rules.set_audience(&["fleet"]);
    let claims: Value = jsonwebtoken::decode(&token, &key, &rules).unwrap().claims;
    assert_eq!((&claims["username"], &claims["email"]), (&json!("ada"), &json!("ada@example.com")));
    assert!(claims["id"].is_u64());
    let unchanged = service.request(Method::GET, "/.well-known/jwks.json").header(header::IF_NONE_MATCH, tag);
    assert_eq!(unchanged.send().await.unwrap().status(), 304);
    assert_eq!(service.request(Method::GET, "/auth/.well-known/jwks.json").send().await.unwrap().status(), 404);
    service.stop().await;
}

//! REST as clients see it.

use reqwest::{Method, StatusCode, header};
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::{Browser, code, set_cookies},
    join_all,
    service::registration,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_registration_signs_in_with_two_cookies() {
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
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
async fn a_clients_correlation_id_is_kept_and_rubbish_is_replaced() {
    let service = TestService::rest().await;
    for (given, kept) in [("shop-7", true), ("has a space", false)] {
        let response = service.request(Method::GET, "/auth/me").header("x-correlation-id", given).send().await.unwrap();
        assert_eq!(response.headers()["x-correlation-id"] == given, kept, "{given}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_tells_alive_from_ready() {
    let service = TestService::rest().await;
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
    let service = TestService::rest_with(&[("REST_REFRESH_ENABLED", "true")]).await;
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
    for (method, path) in [(Method::GET, "/auth/me"), (Method::POST, "/auth/refresh"), (Method::DELETE, "/auth/logout")]
    {
        assert_eq!(browser.send(&service, method, path, None).await.status(), 200, "{path}");
    }
    assert_eq!(service.count("select count(*) from auth_users").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn origins_the_operator_named_may_call() {
    let service = TestService::rest_with(&[("CORS_ORIGINS", "https://app.example")]).await;
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
    let service = TestService::rest().await;
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

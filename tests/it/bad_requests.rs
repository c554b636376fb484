//! What is wrong with a request, and the answer that says so.

use reqwest::{Method, header};
use serde_json::{Value, json};

use crate::support::{TestService, browser::code, service::registration};

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

fn bad(
    what: &'static str,
    method: Method,
    path: &'static str,
    body: &'static str,
    status: u16,
    code: &'static str,
) -> Bad {
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
        post(
            "a field twice",
            "/auth/register",
            r#"{"username":"ada","username":"eve","email":"a@b.cd","password":"a long enough secret"}"#,
        ),
        post(
            "a NUL in the name",
            "/auth/register",
            r#"{"username":"a\u0000da","email":"a@b.cd","password":"a long enough secret"}"#,
        ),
        post(
            "a lone surrogate",
            "/auth/register",
            r#"{"username":"\ud800","email":"a@b.cd","password":"a long enough secret"}"#,
        ),
        post(
            "an @ in the name",
            "/auth/register",
            r#"{"username":"a@b","email":"a@b.cd","password":"a long enough secret"}"#,
        ),
        post(
            "a short name",
            "/auth/register",
            r#"{"username":"a","email":"a@b.cd","password":"a long enough secret"}"#,
        ),
        post("no address", "/auth/register", r#"{"username":"ada","email":"ada","password":"a long enough secret"}"#),
        post("two @", "/auth/register", r#"{"username":"ada","email":"a@b@c.de","password":"a long enough secret"}"#),
        post("an empty password", "/auth/register", r#"{"username":"ada","email":"a@b.cd","password":""}"#),
        post("a short password", "/auth/register", r#"{"username":"ada","email":"a@b.cd","password":"short"}"#),
        with(
            post("an empty key", "/auth/register", "{}"),
            &[("content-type", "application/json"), ("idempotency-key", "")],
        ),
        post("login without a name", "/auth/login", r#"{"password":"x"}"#),
        post("login without a password", "/auth/login", r#"{"identifier":"ada"}"#),
        post("login with an empty name", "/login", r#"{"identifier":" ","password":"x"}"#),
        post("login with a number", "/auth/login", r#"{"identifier":7,"password":"x"}"#),
        bad("unknown user", Method::POST, "/auth/login", login, 401, "INVALID_CREDENTIALS"),
        bad(
            "a NUL in a login",
            Method::POST,
            "/auth/login",
            r#"{"identifier":"a\u0000","password":"x"}"#,
            401,
            "INVALID_CREDENTIALS",
        ),
        with(
            bad("a form", Method::POST, "/auth/login", "identifier=ada", 415, "UNSUPPORTED_MEDIA_TYPE"),
            &[("content-type", "application/x-www-form-urlencoded")],
        ),
        with(
            bad("plain text", Method::POST, "/auth/register", login, 415, "UNSUPPORTED_MEDIA_TYPE"),
            &[("content-type", "text/plain")],
        ),
        with(bad("no type", Method::POST, "/auth/login", login, 415, "UNSUPPORTED_MEDIA_TYPE"), &[]),
        bad("logout without a cookie", Method::DELETE, "/auth/logout", "", 400, "TOKEN_NOT_FOUND"),
        with(
            bad("logout with rubbish", Method::DELETE, "/logout", "", 400, "TOKEN_NOT_FOUND"),
            &[("cookie", "refreshToken=rubbish; accessToken=a.b.c")],
        ),
        bad("an unknown scope", Method::DELETE, "/auth/logout?scope=everything", "", 400, "VALIDATION_ERROR"),
        bad("nobody", Method::GET, "/auth/me", "", 401, "TOKEN_NOT_FOUND"),
        with(
            bad("a forged token", Method::GET, "/me", "", 401, "TOKEN_INVALID"),
            &[("cookie", "accessToken=eyJhbGciOiJub25lIn0.e30.")],
        ),
        with(
            bad("two bad cookies", Method::GET, "/auth/me", "", 401, "TOKEN_INVALID"),
            &[("cookie", "accessToken=a; accessToken=b")],
        ),
        bad("no such route", Method::GET, "/auth/nothing", "", 404, "NOT_FOUND"),
        bad("no such bare route", Method::POST, "/nothing", "{}", 404, "NOT_FOUND"),
        bad("refresh is off", Method::POST, "/auth/refresh", "", 404, "NOT_FOUND"),
        bad("a slash too many", Method::GET, "/auth/me/", "", 404, "NOT_FOUND"),
        bad("a wrong method", Method::GET, "/auth/register", "", 405, "METHOD_NOT_ALLOWED"),
        bad("a wrong bare method", Method::PUT, "/login", "{}", 405, "METHOD_NOT_ALLOWED"),
        bad("TRACE", Method::TRACE, "/auth/me", "", 405, "METHOD_NOT_ALLOWED"),
        bad("logout by GET", Method::GET, "/auth/logout", "", 405, "METHOD_NOT_ALLOWED"),
        with(
            bad("a foreign site", Method::POST, "/auth/login", login, 403, "FOREIGN_ORIGIN"),
            &[("content-type", "application/json"), ("sec-fetch-site", "cross-site")],
        ),
        with(
            bad("a foreign origin", Method::DELETE, "/auth/logout", "", 403, "FOREIGN_ORIGIN"),
            &[("origin", "https://evil.test")],
        ),
        with(
            bad("a sandboxed page", Method::POST, "/auth/register", "{}", 403, "FOREIGN_ORIGIN"),
            &[("content-type", "application/json"), ("origin", "null")],
        ),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_get_their_documented_answers() {
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
    let mut body = registration("ada").to_string();
    body.push_str(&" ".repeat(16 * 1024 - body.len()));
    let request = service.request(Method::POST, "/auth/register").header(header::CONTENT_TYPE, "application/json");
    assert_eq!(request.body(body).send().await.unwrap().status(), 201);
    service.stop().await;
}

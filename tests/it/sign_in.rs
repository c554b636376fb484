//! Login, logout, and who one is.

use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::{Browser, code, set_cookies},
};

#[tokio::test(flavor = "multi_thread")]
async fn a_login_takes_either_name_in_any_field() {
    let service = TestService::rest().await;
    let id = service.registered("ada").await["id"].clone();
    for (field, name) in
        [("identifier", "ada"), ("identifier", " ADA@example.com "), ("email", "ada@example.com"), ("username", "Ada")]
    {
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
    let service = TestService::rest().await;
    service.registered("ada").await;
    sqlx::query("update auth_users set status = 'active'").execute(&service.db).await.unwrap();
    service.registered("gone").await;
    sqlx::query("update auth_users set status = 'closing' where username = 'gone'").execute(&service.db).await.unwrap();
    let mut bodies = vec![];
    for (name, password) in
        [("ada", "a wrong secret"), ("nobody", "a long enough secret"), ("gone", "a long enough secret")]
    {
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
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
    let browser = Browser::registered(&service, "ada").await;
    let other = Browser::logged_in(&service, "ada").await;
    let login = json!({ "email": "ada@example.com", "password": "a long enough secret" });
    assert_eq!(browser.send(&service, Method::POST, "/auth/login", Some(login)).await.status(), 200);
    assert_eq!(
        service.count("select count(*) from refresh_tokens where revoked_reason = 'replaced by a new login'").await,
        1
    );
    for browser in [browser, other] {
        assert_eq!(browser.get(&service, "/auth/me").await.status(), 200);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn logout_ends_as_many_sessions_as_it_was_asked_to() {
    let service = TestService::rest().await;
    let first = Browser::registered(&service, "ada").await;
    let second = Browser::logged_in(&service, "ada").await;
    let third = Browser::logged_in(&service, "ada").await;

    let response = first.send(&service, Method::DELETE, "/auth/logout", None).await;
    assert_eq!(response.status(), 200);
    assert_eq!(
        set_cookies(&response),
        [
            "accessToken=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0",
            "refreshToken=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0",
        ]
    );
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
    let service = TestService::rest().await;
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
    let service = TestService::rest().await;
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

//! Cookies beside ours, doubled ones of ours, and which of them counts.

use auth_service::app::Role;
use reqwest::{Method, Response, header};
use serde_json::Value;

use crate::support::{
    TestService,
    browser::{Browser, code, set_cookies},
    service::Wishes,
};

async fn start() -> TestService {
    let vars = vec![("REST_REFRESH_ENABLED", "true".to_owned())];
    TestService::with(Wishes { roles: Some(vec![Role::Http]), vars, no_topics: true, ..Wishes::default() }).await
}

/// With exactly these header lines.
async fn send(service: &TestService, method: Method, path: &str, cookies: &[Vec<u8>]) -> Response {
    let mut request = service.request(method, path);
    for line in cookies {
        request = request.header(header::COOKIE, header::HeaderValue::from_bytes(line).unwrap());
    }
    request.send().await.unwrap()
}

fn line(text: impl Into<String>) -> Vec<u8> {
    text.into().into_bytes()
}

async fn refusal(response: Response, status: u16) -> String {
    assert_eq!(response.status(), status);
    assert!(status != 401 || set_cookies(&response).is_empty(), "a 401 leaves the cookies alone");
    code(&response.json::<Value>().await.unwrap()).to_owned()
}

async fn live(service: &TestService) -> i64 {
    service.count("select count(*) from refresh_tokens where revoked_at is null").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cookie_of_others_that_is_no_text_hides_none_of_ours() {
    let service = start().await;
    let ada = Browser::registered(&service, "ada").await;
    let ours = format!("accessToken={}", ada.cookie("accessToken"));
    for foreign in ["theme=d\u{fc}nkel".as_bytes(), b"theme=d\xfcnkel", b"\xff", b"\xe9=\xe9", b"a=\x80\x81; b"] {
        for cookies in [
            vec![[foreign, b"; ", ours.as_bytes()].concat()],
            vec![[ours.as_bytes(), b"; ", foreign].concat()],
            vec![foreign.to_vec(), line(&ours)],
        ] {
            let shown = cookies[0].escape_ascii().to_string();
            assert_eq!(send(&service, Method::GET, "/auth/me", &cookies).await.status(), 200, "{shown}");
        }
    }
    let crowd = format!("{}{ours}", "other=cookie; ".repeat(500));
    assert_eq!(send(&service, Method::GET, "/auth/me", &[line(crowd)]).await.status(), 200);

    let cookies = [[b"theme=d\xfcnkel; ", ours.as_bytes()].concat()];
    assert_eq!(send(&service, Method::DELETE, "/auth/logout", &cookies).await.status(), 200);
    assert_eq!(live(&service).await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_cookies_of_one_name_the_good_one_counts() {
    let service = start().await;
    let ada = Browser::registered(&service, "ada").await;
    let (access, refresh) = (ada.cookie("accessToken"), ada.cookie("refreshToken"));
    // Another user's, over by now.
    let eve = Browser::registered(&service, "eve").await;
    let stale = eve.cookie("accessToken");
    assert_eq!(eve.send(&service, Method::DELETE, "/auth/logout", None).await.status(), 200);

    for other in ["x", "\"\"", "a.b.c", &stale, &refresh, &"y".repeat(5000)] {
        for cookies in [
            format!("accessToken={other}; accessToken={access}"),
            format!("accessToken={access}; accessToken={other}"),
            format!("accessToken={other}; refreshToken={other}; refreshToken={refresh}"),
        ] {
            let response = send(&service, Method::GET, "/auth/me", &[line(&cookies)]).await;
            assert_eq!(response.status(), 200, "{cookies}");
            assert_eq!(response.json::<Value>().await.unwrap()["data"]["username"], "ada");
        }
    }
    let doubled = format!("refreshToken=x; refreshToken={refresh}");
    let refreshed = send(&service, Method::POST, "/auth/refresh", &[line(doubled)]).await;
    assert_eq!((refreshed.status().as_u16(), set_cookies(&refreshed).len()), (200, 2));

    let tossed = format!("refreshToken=x; refreshToken=y; accessToken={access}");
    assert_eq!(send(&service, Method::DELETE, "/auth/logout", &[line(tossed)]).await.status(), 200);
    assert_eq!(live(&service).await, 0, "the session that the good token names has ended");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_older_refresh_cookie_beside_the_current_one_is_no_theft() {
    let service = start().await;
    let ada = Browser::registered(&service, "ada").await;
    let mut tokens = vec![ada.cookie("refreshToken")];
    for _ in 0..2 {
        assert_eq!(ada.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
        tokens.push(ada.cookie("refreshToken"));
    }
    sqlx::query("update refresh_tokens set rotated_at = rotated_at - interval '1 hour'")
        .execute(&service.db)
        .await
        .unwrap();
    let all = |order: [usize; 3]| order.map(|n| format!("refreshToken={}", tokens[n])).join("; ");
    for order in [[0, 1, 2], [2, 1, 0], [1, 2, 0]] {
        assert_eq!(send(&service, Method::GET, "/auth/me", &[line(all(order))]).await.status(), 200, "{order:?}");
    }
    let refreshed = send(&service, Method::POST, "/auth/refresh", &[line(all([0, 2, 1]))]).await;
    assert_eq!(refreshed.status(), 200);
    assert_eq!(service.count("select generation::bigint from refresh_tokens where revoked_at is null").await, 3);
    // Without the current one they are what they were.
    let old = format!("refreshToken={}; refreshToken={}", tokens[1], tokens[0]);
    let response = send(&service, Method::POST, "/auth/refresh", &[line(old)]).await;
    assert_eq!(refusal(response, 401).await, "REFRESH_TOKEN_REUSED");
    assert_eq!(live(&service).await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn good_tokens_of_two_users_in_one_request_are_refused_and_a_logout_ends_both() {
    let service = start().await;
    let (ada, eve) = (Browser::registered(&service, "ada").await, Browser::registered(&service, "eve").await);
    // A page of a sibling domain has set its owner's own cookies, for a path that goes first.
    let [ada_access, ada_refresh] = ["accessToken", "refreshToken"].map(|name| format!("{name}={}", ada.cookie(name)));
    let [eve_access, eve_refresh] = ["accessToken", "refreshToken"].map(|name| format!("{name}={}", eve.cookie(name)));
    for cookies in [
        format!("{eve_access}; {ada_access}"),
        format!("{ada_access}; {eve_access}"),
        format!("{eve_access}; {ada_refresh}"),
        format!("{eve_refresh}; {ada_access}; {ada_refresh}"),
    ] {
        let response = send(&service, Method::GET, "/auth/me", &[line(&cookies)]).await;
        assert_eq!(refusal(response, 401).await, "TOKENS_OF_TWO_USERS", "{cookies}");
    }
    let response =
        send(&service, Method::POST, "/auth/refresh", &[line(format!("{eve_refresh}; {ada_refresh}"))]).await;
    assert_eq!(refusal(response, 401).await, "TOKENS_OF_TWO_USERS");
    assert_eq!(service.count("select max(generation)::bigint from refresh_tokens").await, 0, "nothing was replaced");

    let both = [line(format!("{eve_access}; {ada_access}")), line(format!("{eve_refresh}; {ada_refresh}"))];
    assert_eq!(send(&service, Method::DELETE, "/auth/logout", &both).await.status(), 200);
    assert_eq!(live(&service).await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn two_sessions_of_one_user_do_not_contradict_each_other() {
    let service = start().await;
    let one = Browser::registered(&service, "ada").await;
    let other = Browser::logged_in(&service, "ada").await;
    let third = Browser::logged_in(&service, "ada").await;
    let doubled = format!("accessToken={}; accessToken={}", one.cookie("accessToken"), other.cookie("accessToken"));
    assert_eq!(send(&service, Method::GET, "/auth/me", &[line(&doubled)]).await.status(), 200);
    assert_eq!(send(&service, Method::DELETE, "/auth/logout", &[line(&doubled)]).await.status(), 200);
    assert_eq!(live(&service).await, 1, "nothing that the browser still holds is good, and nothing else has ended");
    assert_eq!(third.get(&service, "/auth/me").await.status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_logout_goes_by_the_access_token_when_the_refresh_cookie_says_nothing() {
    let service = start().await;
    for (scope, left) in [("this", 2), ("others", 1), ("all", 0)] {
        let ada = Browser::default();
        if service.count("select count(*) from auth_users").await == 0 {
            service.registered("ada").await;
        }
        sqlx::query("update refresh_tokens set revoked_at = now(), revoked_reason = 'test' where revoked_at is null")
            .execute(&service.db)
            .await
            .unwrap();
        let login = serde_json::json!({ "identifier": "ada", "password": "a long enough secret" });
        assert_eq!(ada.send(&service, Method::POST, "/auth/login", Some(login)).await.status(), 200);
        let (_second, _third) = (Browser::logged_in(&service, "ada").await, Browser::logged_in(&service, "ada").await);
        let replaced = ada.cookie("refreshToken");
        for _ in 0..2 {
            assert_eq!(ada.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
        }
        let cookies = format!("refreshToken={replaced}; accessToken={}", ada.cookie("accessToken"));
        let path = format!("/auth/logout?scope={scope}");
        assert_eq!(send(&service, Method::DELETE, &path, &[line(cookies)]).await.status(), 200, "{scope}");
        assert_eq!(live(&service).await, left, "{scope}");
        assert_eq!(ada.get(&service, "/auth/me").await.status(), if scope == "others" { 200 } else { 401 }, "{scope}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replaced_token_alone_ends_its_own_session_and_no_other() {
    let service = start().await;
    let ada = Browser::registered(&service, "ada").await;
    let _other = Browser::logged_in(&service, "ada").await;
    let replaced = ada.cookie("refreshToken");
    for _ in 0..2 {
        assert_eq!(ada.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
    }
    let cookies = [line(format!("refreshToken={replaced}"))];
    let response = send(&service, Method::DELETE, "/auth/logout?scope=all", &cookies).await;
    assert_eq!(refusal(response, 400).await, "TOKEN_NOT_FOUND");
    assert_eq!(live(&service).await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_about_old_cookies_leaves_those_of_a_new_login_alone() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    let (me, refresh) =
        (browser.request(&service, Method::GET, "/auth/me"), browser.request(&service, Method::POST, "/auth/refresh"));
    let login = serde_json::json!({ "identifier": "ada", "password": "a long enough secret" });
    assert_eq!(browser.send(&service, Method::POST, "/auth/login", Some(login)).await.status(), 200);
    // The old session has been replaced, and these answers arrive last.
    for late in [me, refresh] {
        let late = late.send().await.unwrap();
        assert_eq!(late.status(), 401);
        assert_eq!(set_cookies(&late), [] as [&str; 0]);
    }
    assert_eq!(browser.get(&service, "/auth/me").await.status(), 200);
    service.stop().await;
}

//! Refresh tokens: replaced, repeated, stolen, adopted.

use std::collections::BTreeSet;

use auth_service::app::Role;
use jsonwebtoken::{Algorithm, EncodingKey, Header};
use reqwest::Method;
use serde_json::{Value, json};
use sqlx::Row;

use crate::support::{
    TestService,
    browser::{Browser, code},
    join_all,
    service::{Wishes, base_vars},
};

async fn start() -> TestService {
    TestService::with(wishes(None)).await
}

fn wishes(beside: Option<(String, String)>) -> Wishes {
    Wishes {
        roles: Some(vec![Role::Http]),
        vars: vec![("REST_REFRESH_ENABLED", "true".to_owned())],
        beside,
        no_topics: true,
    }
}

async fn refresh(service: &TestService, browser: &Browser) -> Result<String, String> {
    let response = browser.send(service, Method::POST, "/auth/refresh", None).await;
    match response.status().as_u16() {
        200 => Ok(browser.cookie("refreshToken")),
        _ => Err(code(&response.json().await.unwrap()).to_owned()),
    }
}

/// Someone who holds a copy of a token.
fn holder(token: &str) -> Browser {
    let browser = Browser::default();
    browser.set("refreshToken", token);
    browser
}

async fn age_last_rotation(service: &TestService, seconds: i32) {
    sqlx::query("update refresh_tokens set rotated_at = rotated_at - make_interval(secs => $1)")
        .bind(f64::from(seconds))
        .execute(&service.db)
        .await
        .unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn one_token_presented_by_many_at_once_makes_one_generation_and_one_answer() {
    let service = start().await;
    let beside = TestService::with(wishes(service.beside())).await;
    let browser = Browser::registered(&service, "ada").await;
    for generation in 1..=5 {
        let token = browser.cookie("refreshToken");
        let racers: Vec<Browser> = (0..64).map(|_| holder(&token)).collect();
        let answers = join_all(
            racers.iter().enumerate().map(|(n, racer)| refresh(if n % 2 == 0 { &service } else { &beside }, racer)),
        )
        .await;
        let tokens: BTreeSet<String> = answers.into_iter().map(|answer| answer.expect("a token")).collect();
        assert_eq!(tokens.len(), 1, "generation {generation}");
        let [next] = tokens.into_iter().collect::<Vec<_>>().try_into().unwrap();
        assert_ne!(next, token);
        browser.set("refreshToken", next);
        assert_eq!(service.count("select generation::bigint from refresh_tokens").await, generation);
    }
    beside.stop().await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_was_lost_is_given_again_until_the_window_closes() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    let old = browser.cookie("refreshToken");
    let current = refresh(&service, &browser).await.unwrap();
    for aged in [1, 27] {
        age_last_rotation(&service, aged).await;
        assert_eq!(refresh(&service, &holder(&old)).await, Ok(current.clone()));
    }
    age_last_rotation(&service, 3).await;
    assert_eq!(refresh(&service, &holder(&old)).await.unwrap_err(), "REFRESH_TOKEN_REUSED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reused_token_ends_its_session_for_good_and_no_other() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    let other = Browser::logged_in(&service, "ada").await;
    let old = browser.cookie("refreshToken");
    refresh(&service, &browser).await.unwrap();
    age_last_rotation(&service, 31).await;
    assert_eq!(refresh(&service, &holder(&old)).await.unwrap_err(), "REFRESH_TOKEN_REUSED");
    assert_eq!(
        service.count("select count(*) from refresh_tokens where revoked_reason = 'refresh token reused'").await,
        1
    );
    assert_eq!(browser.get(&service, "/auth/me").await.status(), 401);
    assert_ne!(browser.cookie("refreshToken"), "", "the answer can't know whether these are still the cookies");
    refresh(&service, &other).await.unwrap();
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_thief_and_the_owner_cannot_take_turns() {
    let service = start().await;
    let owner = Browser::registered(&service, "ada").await;
    let thief = holder(&owner.cookie("refreshToken"));
    let mut refusals = vec![];
    for turn in 0..4 {
        let holder = if turn % 2 == 0 { &owner } else { &thief };
        if let Err(code) = refresh(&service, holder).await {
            refusals.push((turn, code));
        }
        age_last_rotation(&service, 31).await;
    }
    assert_eq!(refusals[0], (1, "REFRESH_TOKEN_REUSED".to_owned()));
    assert_eq!(service.count("select count(*) from refresh_tokens where revoked_at is null").await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_refuses_newer_tokens_and_ends_nothing() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    for _ in 0..3 {
        refresh(&service, &browser).await.unwrap();
    }
    let token = browser.cookie("refreshToken");
    sqlx::query("update refresh_tokens set generation = 0").execute(&service.db).await.unwrap();
    assert_eq!(refresh(&service, &browser).await.unwrap_err(), "SESSION_STATE_MISMATCH");
    assert_eq!(browser.cookie("refreshToken"), token, "the cookie stays: the database may be mended yet");
    assert_eq!(service.count("select count(*) from refresh_tokens where revoked_at is null").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn refreshing_never_outlives_the_absolute_end() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    sqlx::query("update refresh_tokens set absolute_expires_at = now() + interval '1 hour'")
        .execute(&service.db)
        .await
        .unwrap();
    refresh(&service, &browser).await.unwrap();
    assert_eq!(service.count("select count(*) from refresh_tokens where expires_at = absolute_expires_at").await, 1);
    sqlx::query("update refresh_tokens set absolute_expires_at = now()").execute(&service.db).await.unwrap();
    assert_eq!(refresh(&service, &browser).await.unwrap_err(), "SESSION_ENDED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_who_is_leaving_or_gone_refreshes_nothing() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    let token = browser.cookie("refreshToken");
    sqlx::query("update auth_users set status = 'closing'").execute(&service.db).await.unwrap();
    assert_eq!(refresh(&service, &holder(&token)).await.unwrap_err(), "SESSION_ENDED");
    assert_eq!(browser.get(&service, "/me").await.status(), 401);
    sqlx::query("delete from auth_users").execute(&service.db).await.unwrap();
    assert_eq!(refresh(&service, &holder(&token)).await.unwrap_err(), "SESSION_ENDED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_fifty_first_session_ends_the_oldest() {
    let service = start().await;
    let first = Browser::registered(&service, "ada").await;
    for _ in 0..50 {
        Browser::logged_in(&service, "ada").await;
    }
    assert_eq!(service.count("select count(*) from refresh_tokens where revoked_at is null").await, 50);
    assert_eq!(refresh(&service, &first).await.unwrap_err(), "SESSION_ENDED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_in_the_database_can_be_presented() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    refresh(&service, &browser).await.unwrap();
    let rows = sqlx::query("select r::text as row from refresh_tokens r").fetch_all(&service.db).await.unwrap();
    for row in rows {
        let row: String = row.get("row");
        for name in ["accessToken", "refreshToken"] {
            let token = browser.cookie(name);
            for part in token.split('.') {
                assert!(!row.contains(part), "{row}");
            }
        }
    }
    service.stop().await;
}

/// A token as the replaced service signed and stored it.
async fn adopted_token(service: &TestService, expires_in: i64) -> String {
    let vars = base_vars(&service.database, &service.prefix);
    let pem = vars.iter().find(|(name, _)| name == "REFRESH_TOKEN_PRIVATE_KEY").map(|(_, pem)| pem.clone()).unwrap();
    let id: i32 = sqlx::query_scalar("select id from auth_users").fetch_one(&service.db).await.unwrap();
    let now = chrono::Utc::now().timestamp();
    let claims = json!({ "id": id, "username": "ada", "iat": now - 60, "exp": now + expires_in });
    let key = EncodingKey::from_rsa_pem(pem.as_bytes()).unwrap();
    let token = jsonwebtoken::encode(&Header::new(Algorithm::RS256), &claims, &key).unwrap();
    sqlx::query(
        "update refresh_tokens set legacy_token_hash = sha256(convert_to($1, 'UTF8')), generation = 0, kid = ''",
    )
    .bind(&token)
    .execute(&service.db)
    .await
    .unwrap();
    token
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_token_is_exchanged_at_first_use() {
    let service = start().await;
    Browser::registered(&service, "ada").await;
    let adopted = adopted_token(&service, 3600).await;
    // Asking who one is neither exchanges nor spoils it.
    assert_eq!(holder(&adopted).get(&service, "/auth/me").await.status(), 200);
    let racers: Vec<Browser> = (0..16).map(|_| holder(&adopted)).collect();
    let answers = join_all(racers.iter().map(|racer| refresh(&service, racer))).await;
    let tokens: BTreeSet<String> = answers.into_iter().map(|answer| answer.expect("a token")).collect();
    assert_eq!(tokens.len(), 1);
    refresh(&service, &racers[0]).await.unwrap();
    assert_eq!(service.count("select generation::bigint from refresh_tokens").await, 2);
    assert_eq!(refresh(&service, &holder(&adopted)).await.unwrap_err(), "REFRESH_TOKEN_REUSED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_adopted_token_is_good_until_its_own_expiry_and_no_longer() {
    let service = start().await;
    Browser::registered(&service, "ada").await;
    let adopted = adopted_token(&service, 3600).await;
    sqlx::query("update refresh_tokens set expires_at = now() - interval '1 day'").execute(&service.db).await.unwrap();
    refresh(&service, &holder(&adopted)).await.unwrap();
    let over = adopted_token(&service, -60).await;
    assert_eq!(refresh(&service, &holder(&over)).await.unwrap_err(), "TOKEN_EXPIRED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_signed_with_the_right_key_but_stored_nowhere_is_nobodys() {
    let service = start().await;
    Browser::registered(&service, "ada").await;
    let adopted = adopted_token(&service, 3600).await;
    sqlx::query("update refresh_tokens set legacy_token_hash = null").execute(&service.db).await.unwrap();
    assert_eq!(refresh(&service, &holder(&adopted)).await.unwrap_err(), "SESSION_ENDED");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_two_kinds_of_token_are_never_taken_for_each_other() {
    let service = start().await;
    let browser = Browser::registered(&service, "ada").await;
    let (access, refresh_token) = (browser.cookie("accessToken"), browser.cookie("refreshToken"));
    assert_eq!(refresh(&service, &holder(&access)).await.unwrap_err(), "TOKEN_INVALID");
    let swapped = Browser::default();
    swapped.set("accessToken", refresh_token);
    let response = swapped.get(&service, "/me").await;
    assert_eq!(response.status(), 401);
    assert_eq!(code(&response.json::<Value>().await.unwrap()), "TOKEN_INVALID");
    service.stop().await;
}

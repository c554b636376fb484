//! Sessions over gRPC: what a gateway may build on.

use std::collections::BTreeSet;

use auth_proto::{
    auth::v1::{
        MarkVerifiedRequest, RefreshAccessTokenRequest, RefreshAccessTokenResponse, ValidateAccessTokenRequest,
        account_service_client::AccountServiceClient, token_service_client::TokenServiceClient,
    },
    legacy::token::{RefreshTokenRequest, token_client::TokenClient},
};
use auth_service::app::Role;
use reqwest::Method;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};

use crate::support::{
    TestService,
    browser::{Browser, set_cookies},
    eventually, join_all,
    service::{CALLER_TOKEN, Wishes},
};

async fn service(vars: &[(&'static str, &str)], beside: Option<(String, String)>) -> TestService {
    TestService::with(Wishes {
        roles: Some(vec![Role::Http, Role::Grpc]),
        vars: vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
        beside,
        no_topics: true,
    })
    .await
}

fn channel(service: &TestService) -> Channel {
    Endpoint::from_shared(service.grpc.clone()).expect("an address").connect_lazy()
}

async fn refresh(service: &TestService, token: &str) -> Result<RefreshAccessTokenResponse, Status> {
    let request = RefreshAccessTokenRequest { refresh_token: token.to_owned() };
    Ok(TokenServiceClient::new(channel(service)).refresh_access_token(request).await?.into_inner())
}

async fn legacy(service: &TestService, token: &str) -> Result<String, Status> {
    let request = RefreshTokenRequest { refresh_token: token.to_owned() };
    Ok(TokenClient::new(channel(service)).refresh_token(request).await?.into_inner().access_token)
}

async fn validate(service: &TestService, token: &str) -> Result<String, Status> {
    let request = ValidateAccessTokenRequest { access_token: token.to_owned() };
    Ok(TokenServiceClient::new(channel(service)).validate_access_token(request).await?.into_inner().username)
}

async fn mark_verified(service: &TestService, user_id: i64) -> Result<bool, Status> {
    let mut request = Request::new(MarkVerifiedRequest { user_id });
    request.metadata_mut().insert("authorization", format!("Bearer {CALLER_TOKEN}").parse().unwrap());
    Ok(AccountServiceClient::new(channel(service)).mark_verified(request).await?.into_inner().is_verified)
}

fn word(status: &Status) -> &str {
    status.metadata().get("error-code").and_then(|word| word.to_str().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn twenty_requests_of_one_browser_at_once_get_the_same_bytes_and_make_one_generation() {
    let one = service(&[], None).await;
    let other = service(&[], one.beside()).await;
    let mut token = Browser::registered(&one, "ada").await.cookie("refreshToken");
    for generation in 1..=3 {
        let asked = (0..20).map(|n| refresh(if n % 2 == 0 { &one } else { &other }, &token));
        let answers: Vec<_> = join_all(asked).await.into_iter().map(|answer| answer.expect("a token")).collect();
        let tokens: BTreeSet<_> = answers.iter().map(|answer| answer.refresh_token.clone()).collect();
        assert_eq!(tokens.len(), 1, "generation {generation}");
        let expiries: BTreeSet<_> = answers.iter().map(|a| a.refresh_token_expires_at.unwrap().seconds).collect();
        assert_eq!(expiries.len(), 1);
        assert_eq!(answers.iter().filter(|answer| !answer.reissued).count(), 1, "one of them replaced it");
        assert_eq!(one.count("select generation::bigint from refresh_tokens").await, generation);
        token = tokens.into_iter().next().unwrap();
    }
    other.stop().await;
    one.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_cookies_are_those_a_login_sets_whatever_the_policy() {
    for (vars, names, attributes) in [
        (&[("COOKIE_SECURE", "false")] as &[_], ["accessToken", "refreshToken"], "; HttpOnly; SameSite=Lax; Path=/"),
        (
            &[("COOKIE_SECURE", "true")],
            ["__Host-accessToken", "__Host-refreshToken"],
            "; HttpOnly; SameSite=Lax; Secure; Path=/",
        ),
        (
            &[("COOKIE_SECURE", "true"), ("COOKIE_HOST_PREFIX", "false")],
            ["accessToken", "refreshToken"],
            "; HttpOnly; SameSite=Lax; Secure; Path=/",
        ),
    ] {
        let service = service(vars, None).await;
        let registered = set_cookies(&service.register("ada").await);
        let (_, token) = registered[1].split_once('=').unwrap();
        let answer = refresh(&service, token.split(';').next().unwrap()).await.unwrap();
        let tokens = [(&answer.access_token, 900), (&answer.refresh_token, 604_800)];
        let expected =
            names.iter().zip(tokens).map(|(name, (token, life))| format!("{name}={token}{attributes}; Max-Age={life}"));
        assert_eq!(answer.set_cookie, expected.collect::<Vec<_>>());
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_that_is_over_is_over_for_every_call() {
    let service = service(&[("REFRESH_REUSE_WINDOW", "0")], None).await;
    let id = service.registered("bob").await["id"].as_i64().unwrap();
    assert!(mark_verified(&service, id).await.unwrap());
    for (name, how) in [("ada", "logout"), ("eve", "reuse"), ("bob", "deleted")] {
        let browser = match how {
            "deleted" => Browser::logged_in(&service, name).await,
            _ => Browser::registered(&service, name).await,
        };
        let (access, token) = (browser.cookie("accessToken"), browser.cookie("refreshToken"));
        assert_eq!(validate(&service, &access).await.unwrap(), name);
        match how {
            "logout" => {
                assert_eq!(browser.send(&service, Method::DELETE, "/auth/logout", None).await.status(), 200);
            }
            "reuse" => {
                let next = refresh(&service, &token).await.unwrap().refresh_token;
                let stolen = refresh(&service, &token).await.unwrap_err();
                assert_eq!((stolen.code(), word(&stolen)), (Code::Unauthenticated, "REFRESH_TOKEN_REUSED"));
                let both = refresh(&service, &next).await.unwrap_err();
                assert_eq!((both.code(), word(&both)), (Code::Unauthenticated, "SESSION_ENDED"));
            }
            _ => {
                sqlx::query("delete from auth_users where id = $1").bind(id).execute(&service.db).await.unwrap();
                assert_eq!(mark_verified(&service, id).await.unwrap_err().code(), Code::NotFound);
            }
        }
        for status in [
            validate(&service, &access).await.unwrap_err(),
            refresh(&service, &token).await.unwrap_err(),
            legacy(&service, &token).await.unwrap_err(),
        ] {
            assert_eq!(status.code(), Code::Unauthenticated, "{how}: {status}");
        }
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_database_is_away_no_call_says_that_a_session_is_over() {
    let service = service(&[("DB_ACQUIRE_TIMEOUT", "1s")], None).await;
    let browser = Browser::registered(&service, "ada").await;
    let (access, token) = (browser.cookie("accessToken"), browser.cookie("refreshToken"));
    service.cut_database().await;
    for round in 0..2 {
        for status in [
            refresh(&service, &token).await.unwrap_err(),
            legacy(&service, &token).await.unwrap_err(),
            validate(&service, &access).await.unwrap_err(),
            mark_verified(&service, 1).await.unwrap_err(),
        ] {
            assert_eq!((status.code(), word(&status)), (Code::Unavailable, "SERVICE_UNAVAILABLE"), "{round}: {status}");
        }
        // What no database is needed for is still told.
        let forged = refresh(&service, "a.b.c").await.unwrap_err();
        assert_eq!((forged.code(), word(&forged)), (Code::Unauthenticated, "TOKEN_INVALID"));
    }
    service.mend_database().await;
    eventually("the database is back", || async { validate(&service, &access).await.ok() }).await;
    assert!(!legacy(&service, &token).await.unwrap().is_empty());
    assert!(!refresh(&service, &token).await.unwrap().reissued, "nothing was spent meanwhile");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_of_100_kilobytes_is_refused_before_it_is_looked_at() {
    let service = service(&[], None).await;
    let huge = "x".repeat(100_000);
    for status in [
        refresh(&service, &huge).await.unwrap_err(),
        legacy(&service, &huge).await.unwrap_err(),
        validate(&service, &huge).await.unwrap_err(),
    ] {
        assert_eq!((status.code(), word(&status)), (Code::InvalidArgument, "VALIDATION_ERROR"), "{status}");
        assert!(!status.message().contains("xxx"));
    }
    service.stop().await;
}

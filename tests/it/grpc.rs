//! gRPC as gateways, other services and their tools see it.

use std::time::Duration;

use auth_proto::{
    auth::v1::{
        AccountStatus, GetAccountRequest, MarkVerifiedRequest, RefreshAccessTokenRequest, ValidateAccessTokenRequest,
        account_service_client::AccountServiceClient, token_service_client::TokenServiceClient,
    },
    legacy::token::{RefreshTokenRequest, token_client::TokenClient},
};
use auth_service::app::Role;
use reqwest::Method;
use tokio_stream::StreamExt;
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codec::{BufferSettings, Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    transport::{Channel, Endpoint},
};
use tonic_health::pb::{HealthCheckRequest, health_check_response::ServingStatus, health_client::HealthClient};
use tonic_reflection::pb::v1::{
    ServerReflectionRequest, server_reflection_client::ServerReflectionClient,
    server_reflection_request::MessageRequest, server_reflection_response::MessageResponse,
};

use crate::support::{
    TestService,
    browser::Browser,
    eventually,
    service::{CALLER_TOKEN, Wishes},
};

async fn service(vars: &[(&'static str, &str)]) -> TestService {
    TestService::with(Wishes {
        roles: Some(vec![Role::Http, Role::Grpc]),
        vars: vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect(),
        no_topics: true,
        ..Wishes::default()
    })
    .await
}

fn channel(service: &TestService) -> Channel {
    Endpoint::from_shared(service.grpc.clone()).expect("an address").connect_lazy()
}

fn with_token<T>(message: T, token: &str) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().expect("ASCII"));
    request
}

fn word(status: &Status) -> &str {
    status.metadata().get("error-code").and_then(|word| word.to_str().ok()).unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refresh_hands_over_both_tokens_and_their_cookies() {
    let service = service(&[]).await;
    let browser = Browser::registered(&service, "ada").await;
    let mut tokens = TokenServiceClient::new(channel(&service));
    let old = browser.cookie("refreshToken");
    let request = RefreshAccessTokenRequest { refresh_token: old.clone() };
    let first = tokens.refresh_access_token(request.clone()).await.unwrap().into_inner();
    assert!(!first.reissued && first.refresh_token != old);
    // The answer was lost; the gateway asks again.
    let again = tokens.refresh_access_token(request).await.unwrap().into_inner();
    assert!(again.reissued);
    assert_eq!(again.refresh_token, first.refresh_token);
    assert!(first.access_token_expires_at.unwrap().seconds < first.refresh_token_expires_at.unwrap().seconds);
    for cookie in first.set_cookie {
        let (pair, _) = cookie.split_once(';').unwrap();
        let (name, value) = pair.split_once('=').unwrap();
        browser.set(name, value);
    }
    assert_eq!(browser.cookie("accessToken"), first.access_token);
    assert_eq!(browser.get(&service, "/auth/me").await.status(), 200);

    let request = ValidateAccessTokenRequest { access_token: first.access_token };
    let valid = tokens.validate_access_token(request.clone()).await.unwrap().into_inner();
    assert_eq!((valid.username.as_str(), valid.expires_at), ("ada", first.access_token_expires_at));
    assert_eq!(browser.send(&service, Method::DELETE, "/auth/logout", None).await.status(), 200);
    let status = tokens.validate_access_token(request).await.unwrap_err();
    assert_eq!((status.code(), word(&status)), (Code::Unauthenticated, "SESSION_ENDED"));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_original_gateways_call_never_replaces_the_refresh_token() {
    let service = service(&[]).await;
    let browser = Browser::registered(&service, "ada").await;
    let refresh_token = browser.cookie("refreshToken");
    let mut legacy = TokenClient::new(channel(&service));
    for _ in 0..3 {
        let request = RefreshTokenRequest { refresh_token: refresh_token.clone() };
        let access_token = legacy.refresh_token(request).await.unwrap().into_inner().access_token;
        let valid = TokenServiceClient::new(channel(&service))
            .validate_access_token(ValidateAccessTokenRequest { access_token })
            .await;
        assert_eq!(valid.unwrap().into_inner().username, "ada");
    }
    assert_eq!(service.count("select count(*) from refresh_tokens where generation = 0").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_original_gateways_call_can_be_turned_off() {
    let service = service(&[("LEGACY_TOKEN_RPC", "false")]).await;
    let status = TokenClient::new(channel(&service)).refresh_token(RefreshTokenRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unimplemented);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_token_however_odd_is_more_than_a_session_that_is_over() {
    let service = service(&[]).await;
    let browser = Browser::registered(&service, "ada").await;
    let mut tokens = TokenServiceClient::new(channel(&service));
    let mut legacy = TokenClient::new(channel(&service));
    let huge = "x".repeat(60_000);
    let access = browser.cookie("accessToken");
    for token in ["", "x", "a.b.c", "..", "\0", "é", "eyJhbGciOiJub25lIn0.e30.", &huge, &access] {
        let refresh = RefreshAccessTokenRequest { refresh_token: token.to_owned() };
        let old = RefreshTokenRequest { refresh_token: token.to_owned() };
        for status in
            [tokens.refresh_access_token(refresh).await.unwrap_err(), legacy.refresh_token(old).await.unwrap_err()]
        {
            assert_eq!(status.code(), Code::Unauthenticated, "{token:.20}: {status}");
        }
    }
    let access_token = browser.cookie("refreshToken");
    for access_token in ["".to_owned(), "a.b.c".to_owned(), huge, access_token] {
        let status = tokens.validate_access_token(ValidateAccessTokenRequest { access_token }).await.unwrap_err();
        assert_eq!(status.code(), Code::Unauthenticated);
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn accounts_are_for_callers_with_credentials() {
    let service = service(&[]).await;
    let id = service.registered("ada").await["id"].as_i64().unwrap();
    let mut accounts = AccountServiceClient::new(channel(&service));
    let get = |user_id| GetAccountRequest { user_id };
    let status = accounts.get_account(get(id)).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let status = accounts.get_account(with_token(get(id), "wrong")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);

    let account = accounts.get_account(with_token(get(id), CALLER_TOKEN)).await.unwrap().into_inner();
    assert_eq!((account.username.as_str(), account.email.as_str()), ("ada", "ada@example.com"));
    assert_eq!((account.is_verified, account.status()), (false, AccountStatus::Pending));
    for _ in 0..2 {
        let request = with_token(MarkVerifiedRequest { user_id: id }, CALLER_TOKEN);
        assert!(accounts.mark_verified(request).await.unwrap().into_inner().is_verified);
    }
    let audited: Vec<(String, String, String, serde_json::Value)> =
        sqlx::query_as("select actor, action, target, detail from admin_audit").fetch_all(&service.db).await.unwrap();
    let line = ("gateway", "account.mark-verified", format!("user {id}"), serde_json::json!({ "status": "pending" }));
    assert_eq!(audited, [(line.0.to_owned(), line.1.to_owned(), line.2, line.3)], "once, however often it is repeated");
    for (user_id, code) in [
        (0, Code::InvalidArgument),
        (-1, Code::InvalidArgument),
        (i64::MIN, Code::InvalidArgument),
        (id + 1, Code::NotFound),
        (i64::from(i32::MAX) + 1 + id, Code::NotFound),
        (i64::MAX, Code::NotFound),
    ] {
        let status = accounts.get_account(with_token(get(user_id), CALLER_TOKEN)).await.unwrap_err();
        assert_eq!(status.code(), code, "{user_id}");
        let request = with_token(MarkVerifiedRequest { user_id }, CALLER_TOKEN);
        assert_eq!(accounts.mark_verified(request).await.unwrap_err().code(), code, "{user_id}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_configured_callers_nobody_is_one() {
    let service = service(&[("GRPC_CALLER_TOKENS", "")]).await;
    let mut accounts = AccountServiceClient::new(channel(&service));
    let request = with_token(GetAccountRequest { user_id: 1 }, "anything");
    assert_eq!(accounts.get_account(request).await.unwrap_err().code(), Code::Unauthenticated);
    let status = accounts.get_account(GetAccountRequest { user_id: 1 }).await.unwrap_err();
    assert!(status.message().contains("GRPC_CALLER_TOKENS"), "{status}");
    service.stop().await;
}

/// Sends bytes as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, to: &mut EncodeBuf<'_>) -> Result<(), Status> {
        use tokio_util::bytes::BufMut;
        to.put_slice(&item);
        Ok(())
    }

    fn buffer_settings(&self) -> BufferSettings {
        BufferSettings::default()
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, from: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        use tokio_util::bytes::Buf;
        Ok(Some(from.copy_to_bytes(from.remaining()).to_vec()))
    }
}

async fn raw(service: &TestService, path: &'static str, messages: Vec<Vec<u8>>) -> Code {
    let mut client = Grpc::new(channel(service));
    client.ready().await.expect("the server");
    let request = Request::new(tokio_stream::iter(messages));
    match client.client_streaming(request, path.parse().expect("a path"), Raw).await {
        Ok(_) => Code::Ok,
        Err(status) => status.code(),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_read_is_the_clients_fault() {
    let service = service(&[]).await;
    const REFRESH: &str = "/auth.v1.TokenService/RefreshAccessToken";
    assert_eq!(raw(&service, REFRESH, vec![]).await, Code::InvalidArgument, "no message");
    for (what, bytes) in [
        ("no protobuf", b"\xff\xff\xff\xff".to_vec()),
        ("a cut field", b"\x0a\x7f".to_vec()),
        ("text that is not UTF-8", b"\x0a\x02\xff\xfe".to_vec()),
        ("another type", b"\x08\x01".to_vec()),
        ("too large", vec![b'x'; 70_000]),
        ("much too large", vec![b'x'; 5_000_000]),
    ] {
        assert_eq!(raw(&service, REFRESH, vec![bytes]).await, Code::InvalidArgument, "{what}");
    }
    // Unknown fields are the future's, and an empty message is one without a token.
    assert_eq!(raw(&service, REFRESH, vec![b"\x50\x01".to_vec()]).await, Code::Unauthenticated);
    assert_eq!(raw(&service, REFRESH, vec![vec![]]).await, Code::Unauthenticated);
    for path in ["/auth.v1.TokenService/Nothing", "/no.such.Service/Method", "/"] {
        assert_eq!(raw(&service, path, vec![vec![]]).await, Code::Unimplemented, "{path}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_is_away_is_unavailable_and_ends_no_session() {
    let service = service(&[("DB_ACQUIRE_TIMEOUT", "1s")]).await;
    let browser = Browser::registered(&service, "ada").await;
    let request = RefreshAccessTokenRequest { refresh_token: browser.cookie("refreshToken") };
    let mut tokens = TokenServiceClient::new(channel(&service));
    let mut health = HealthClient::new(channel(&service));
    serving(&mut health, "", ServingStatus::Serving).await;
    service.cut_database().await;
    assert_eq!(tokens.refresh_access_token(request.clone()).await.unwrap_err().code(), Code::Unavailable);
    let account = with_token(GetAccountRequest { user_id: 1 }, CALLER_TOKEN);
    let status = AccountServiceClient::new(channel(&service)).get_account(account).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable);
    serving(&mut health, "", ServingStatus::NotServing).await;
    service.mend_database().await;
    serving(&mut health, "auth.v1.TokenService", ServingStatus::Serving).await;
    assert!(tokens.refresh_access_token(request).await.is_ok());
    service.stop().await;
}

async fn serving(health: &mut HealthClient<Channel>, name: &str, wanted: ServingStatus) {
    let health = &*health;
    eventually(&format!("{name:?} is {wanted:?}"), || async {
        let request = HealthCheckRequest { service: name.to_owned() };
        let answer = health.clone().check(request).await.expect("health answers").into_inner();
        (answer.status() == wanted).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn health_says_no_from_the_drain_on_and_watchers_hold_no_stop_up() {
    let service = service(&[]).await;
    let mut health = HealthClient::new(channel(&service));
    for name in ["", "auth.v1.TokenService", "auth.v1.AccountService", "token.Token"] {
        serving(&mut health, name, ServingStatus::Serving).await;
    }
    let unknown = HealthCheckRequest { service: "no.such.Service".to_owned() };
    assert_eq!(health.check(unknown).await.unwrap_err().code(), Code::NotFound);

    let mut watched = health.watch(HealthCheckRequest::default()).await.unwrap().into_inner();
    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::Serving);
    service.running.app.shutdown.draining.cancel();
    assert_eq!(watched.next().await.unwrap().unwrap().status(), ServingStatus::NotServing);
    // Still served while it drains.
    let status = TokenClient::new(channel(&service)).refresh_token(RefreshTokenRequest::default()).await.unwrap_err();
    assert_eq!(status.code(), Code::Unauthenticated);
    let stopping = tokio::time::timeout(Duration::from_secs(10), service.stop());
    let (stopped, end) = tokio::join!(stopping, watched.next());
    stopped.expect("the stop waits for nobody");
    assert!(end.is_none());
}

#[tokio::test(flavor = "multi_thread")]
async fn reflection_tells_what_is_served_here() {
    let service = service(&[]).await;
    let request =
        |message| tokio_stream::once(ServerReflectionRequest { host: String::new(), message_request: Some(message) });
    let mut client = ServerReflectionClient::new(channel(&service));
    let listed = client.server_reflection_info(request(MessageRequest::ListServices(String::new()))).await.unwrap();
    let answer = listed.into_inner().next().await.unwrap().unwrap().message_response;
    let Some(MessageResponse::ListServicesResponse(list)) = answer else { panic!("{answer:?}") };
    let mut names: Vec<_> = list.service.into_iter().map(|service| service.name).collect();
    names.sort();
    for name in ["auth.v1.AccountService", "auth.v1.TokenService", "grpc.health.v1.Health", "token.Token"] {
        assert!(names.iter().any(|known| known == name), "{name} is not in {names:?}");
    }
    assert!(!names.iter().any(|name| name == "user.v1.UserService"), "{names:?}");
    let symbol = MessageRequest::FileContainingSymbol("auth.v1.TokenService".to_owned());
    let found = client.server_reflection_info(request(symbol)).await.unwrap();
    let answer = found.into_inner().next().await.unwrap().unwrap().message_response;
    assert!(matches!(answer, Some(MessageResponse::FileDescriptorResponse(_))), "{answer:?}");
    service.stop().await;
}

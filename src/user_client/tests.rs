use std::sync::{Arc, Mutex};

use auth_proto::{
    legacy::auth::{
        CreateUserResponse as LegacyResponse,
        auth_user_server::{AuthUser, AuthUserServer},
    },
    user::v1::{
        CreateUserResponse,
        user_service_server::{UserService, UserServiceServer},
    },
};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Response, service::Routes, transport::Server};

use super::*;

const SAGA: Uuid = Uuid::from_u128(7);

/// A user-service that answers as it is told, and remembers what it was asked.
#[derive(Clone)]
struct Told {
    get: Result<User, Code>,
    create: Result<Option<User>, Code>,
    legacy: Result<i32, Code>,
    calls: Arc<Mutex<Vec<&'static str>>>,
}

impl Told {
    fn new(get: Result<User, Code>, create: Result<Option<User>, Code>, legacy: Result<i32, Code>) -> Self {
        Self { get, create, legacy, calls: Arc::default() }
    }

    fn called(&self, call: &'static str) {
        self.calls.lock().expect("no panic").push(call);
    }
}

fn refusal(code: Code) -> Status {
    Status::new(code, "because\0\n of it")
}

#[tonic::async_trait]
impl UserService for Told {
    async fn get_user(&self, request: Request<GetUserRequest>) -> Result<Response<User>, Status> {
        assert!(request.metadata().contains_key("grpc-timeout"));
        self.called("get");
        self.get.clone().map(Response::new).map_err(refusal)
    }

    async fn create_user(&self, request: Request<CreateUserRequest>) -> Result<Response<CreateUserResponse>, Status> {
        assert_eq!(request.get_ref().saga_id, SAGA.to_string());
        self.called("create");
        self.create.clone().map(|user| Response::new(CreateUserResponse { user })).map_err(refusal)
    }
}

#[tonic::async_trait]
impl AuthUser for Told {
    async fn create_user(&self, _: Request<LegacyRequest>) -> Result<Response<LegacyResponse>, Status> {
        self.called("legacy");
        self.legacy.map(|code| Response::new(LegacyResponse { code })).map_err(refusal)
    }
}

async fn served(routes: Routes) -> UserServiceClient {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address");
    let incoming = TcpListenerStream::new(listener);
    tokio::spawn(Server::builder().serve_with_incoming(routes.prepare(), incoming));
    UserServiceClient::new(&format!("http://{address}")).expect("a client")
}

async fn settled(told: &Told) -> Answer {
    let routes = Routes::new(UserServiceServer::new(told.clone())).add_service(AuthUserServer::new(told.clone()));
    served(routes).await.settle(5, "Anna", "anna@example.com", SAGA).await
}

fn profile(saga_id: &str, username: &str) -> User {
    User { user_id: 5, username: username.into(), email: "anna@example.com".into(), saga_id: saga_id.into() }
}

#[tokio::test]
async fn a_profile_that_is_there_is_told_from_somebody_elses() {
    let with = |user: User| Told::new(Ok(user), Err(Code::Internal), Err(Code::Internal));
    let ours = SAGA.to_string();
    assert_eq!(settled(&with(profile(&ours, "renamed since"))).await, Answer::Present);
    assert_eq!(settled(&with(profile("", "anna"))).await, Answer::Present);
    for other in [
        profile("", "bert"),
        profile(&Uuid::from_u128(8).to_string(), "Anna"),
        profile("no uuid", "Anna"),
        User { user_id: 6, ..profile(&ours, "Anna") },
    ] {
        assert!(matches!(settled(&with(other.clone())).await, Answer::Ambiguous(_)), "{other:?}");
    }
}

#[tokio::test]
async fn a_profile_that_is_missing_is_made() {
    let told = Told::new(Err(Code::NotFound), Ok(Some(profile(&SAGA.to_string(), "Anna"))), Err(Code::Internal));
    assert_eq!(settled(&told).await, Answer::Created);
    assert_eq!(*told.calls.lock().expect("no panic"), ["get", "create"]);
    let bare = Told::new(Err(Code::NotFound), Ok(None), Err(Code::Internal));
    assert_eq!(settled(&bare).await, Answer::Created);
}

#[tokio::test]
async fn only_three_codes_refuse_and_every_other_one_is_no_answer() {
    for code in 1..=16 {
        let code = Code::from_i32(code);
        let answer = settled(&Told::new(Err(Code::NotFound), Err(code), Err(code))).await;
        match code {
            Code::InvalidArgument | Code::FailedPrecondition | Code::AlreadyExists => {
                assert_eq!(answer, Answer::Refused(format!("CreateUser: {code:?}: because of it")));
            }
            _ => assert!(matches!(answer, Answer::NoAnswer(_)), "{code:?}: {answer:?}"),
        }
    }
}

#[tokio::test]
async fn a_lookup_that_fails_creates_nothing() {
    for code in
        [Code::Internal, Code::PermissionDenied, Code::Unauthenticated, Code::InvalidArgument, Code::Unavailable]
    {
        let told = Told::new(Err(code), Ok(None), Ok(0));
        assert!(matches!(settled(&told).await, Answer::NoAnswer(_)), "{code:?}");
        assert_eq!(*told.calls.lock().expect("no panic"), ["get"], "{code:?}");
    }
}

#[tokio::test]
async fn the_original_service_is_asked_where_the_current_one_is_not_there() {
    let told = Told::new(Err(Code::Unimplemented), Ok(None), Ok(0));
    let routes = Routes::new(AuthUserServer::new(told.clone()));
    assert_eq!(served(routes).await.settle(5, "Anna", "anna@example.com", SAGA).await, Answer::Created);
    assert_eq!(*told.calls.lock().expect("no panic"), ["legacy"]);
    let half = Told::new(Err(Code::NotFound), Err(Code::Unimplemented), Ok(201));
    assert_eq!(settled(&half).await, Answer::Created);
}

#[tokio::test]
async fn the_original_services_already_exists_settles_nothing() {
    for legacy in [Err(Code::AlreadyExists), Ok(6), Ok(409)] {
        let answer = settled(&Told::new(Err(Code::Unimplemented), Ok(None), legacy)).await;
        assert_eq!(answer, Answer::Ambiguous(CAN_NOT_TELL.to_owned()), "{legacy:?}");
    }
    for legacy in [Err(Code::InvalidArgument), Err(Code::FailedPrecondition), Ok(400), Ok(422), Ok(3)] {
        let answer = settled(&Told::new(Err(Code::Unimplemented), Ok(None), legacy)).await;
        assert!(matches!(answer, Answer::Refused(_)), "{legacy:?}: {answer:?}");
    }
    for legacy in [Err(Code::PermissionDenied), Err(Code::Unimplemented), Ok(500), Ok(-1), Ok(1)] {
        let answer = settled(&Told::new(Err(Code::Unimplemented), Ok(None), legacy)).await;
        assert!(matches!(answer, Answer::NoAnswer(_)), "{legacy:?}: {answer:?}");
    }
}

#[tokio::test]
async fn a_service_that_is_away_gives_no_answer() {
    let free = TcpListener::bind("127.0.0.1:0").await.expect("a port").local_addr().expect("an address");
    let client = UserServiceClient::new(&format!("http://{free}")).expect("a client");
    assert!(matches!(client.settle(5, "Anna", "anna@example.com", SAGA).await, Answer::NoAnswer(_)));
}

/// Accepts and says nothing: real time, since the deadline is tonic's.
#[tokio::test]
async fn a_service_that_is_silent_gives_no_answer_in_time() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let client =
        UserServiceClient::new(&format!("http://{}", listener.local_addr().expect("an address"))).expect("a client");
    let settled = client.settle(5, "Anna", "anna@example.com", SAGA);
    let answer = tokio::time::timeout(CALL_DEADLINE * 2, settled).await.expect("within the deadline");
    assert!(matches!(answer, Answer::NoAnswer(_)), "{answer:?}");
}

//! The same decisions for callers by gRPC: `user.v1.UserService`, and the original fleet's
//! `auth.AuthUser`.

use auth_proto::{
    legacy::auth::{
        CreateUserRequest as LegacyRequest, CreateUserResponse as LegacyResponse,
        auth_user_server::{AuthUser, AuthUserServer},
    },
    user::v1::{
        CreateUserRequest, CreateUserResponse, GetUserRequest, User,
        user_service_server::{UserService, UserServiceServer},
    },
};
use outbox_relay::Database;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};
use uuid::Uuid;

use super::profiles::{self, HouseRules, Profile, Refusal};

/// Answers calls.
#[derive(Debug, Clone)]
pub(super) struct Calls {
    db: Database,
    rules: HouseRules,
}

impl Calls {
    pub fn new(db: Database, rules: HouseRules) -> Self {
        Self { db, rules }
    }

    pub async fn serve(self, listener: TcpListener, shutdown: CancellationToken) {
        let served = Server::builder()
            .add_service(UserServiceServer::new(self.clone()))
            .add_service(AuthUserServer::new(self))
            .serve_with_incoming_shutdown(TcpListenerStream::new(listener), shutdown.cancelled_owned())
            .await;
        if let Err(error) = served {
            tracing::error!(%error, "user-service: gRPC ended");
        }
    }
}

#[tonic::async_trait]
impl UserService for Calls {
    async fn get_user(&self, request: Request<GetUserRequest>) -> Result<Response<User>, Status> {
        let user_id = request.into_inner().user_id;
        let profile = profiles::find(&self.db, user_id).await.map_err(away)?;
        let profile = profile.ok_or_else(|| Status::not_found("there is no profile for this user"))?;
        Ok(Response::new(user(profile)))
    }

    async fn create_user(&self, request: Request<CreateUserRequest>) -> Result<Response<CreateUserResponse>, Status> {
        let CreateUserRequest { user_id, username, email, saga_id } = request.into_inner();
        let saga_id: Uuid = saga_id.parse().map_err(|_| Status::invalid_argument("saga_id must be a UUID"))?;
        let profile = Profile { user_id, username, email, saga_id: Some(saga_id) };
        let decided = profiles::create(&self.db, saga_id, profile.clone(), &self.rules).await.map_err(away)?;
        match decided.refusal {
            None => Ok(Response::new(CreateUserResponse { user: Some(user(profile)) })),
            Some(reason) => Err(Status::failed_precondition(reason)),
        }
    }
}

#[tonic::async_trait]
impl AuthUser for Calls {
    /// Without a saga id a repeated call can't be told from somebody else's.
    async fn create_user(&self, request: Request<LegacyRequest>) -> Result<Response<LegacyResponse>, Status> {
        let LegacyRequest { id, username, email } = request.into_inner();
        let user_id = i64::from(id);
        let profile = Profile { user_id, username, email, saga_id: None };
        match profiles::create_without_saga(&self.db, profile, &self.rules).await.map_err(away)? {
            Ok(()) => Ok(Response::new(LegacyResponse { code: 0 })),
            Err(refusal @ Refusal::Present) => Err(Status::already_exists(refusal.to_string())),
            Err(refusal) => Err(Status::failed_precondition(refusal.to_string())),
        }
    }
}

fn user(profile: Profile) -> User {
    let Profile { user_id, username, email, saga_id } = profile;
    User { user_id, username, email, saga_id: saga_id.map(|id| id.to_string()).unwrap_or_default() }
}

/// "Try again": the caller must not take it for a refusal.
fn away(error: sqlx::Error) -> Status {
    tracing::warn!(%error, "user-service: the database did not answer");
    Status::unavailable("the user-service's database did not answer; try again")
}

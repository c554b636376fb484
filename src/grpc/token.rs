//! `auth.v1.TokenService`.

use std::time::Instant;

use auth_proto::auth::v1::{
    RefreshAccessTokenRequest, RefreshAccessTokenResponse, ValidateAccessTokenRequest, ValidateAccessTokenResponse,
    token_service_server::{SERVICE_NAME, TokenService},
};
use prost_types::Timestamp;
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::{account::timestamp, status::Refusal};
use crate::{
    app::App,
    http::cookies,
    sessions::{self, Arrived, Carried, Over, Refreshed, SessionError, Validated},
};

/// The service's full name.
pub const NAME: &str = SERVICE_NAME;

/// Answers its calls.
pub struct Tokens {
    app: App,
}

impl Tokens {
    /// On `app`'s sessions.
    pub fn new(app: App) -> Self {
        Self { app }
    }
}

/// A token that is not empty: an empty one is a client that is not signed in, not a broken token.
pub fn given(token: &str) -> Result<&str, Refusal> {
    match token {
        "" => Err(Refusal::Session(SessionError::Over(Over::NoToken))),
        token => Ok(token),
    }
}

/// A call that brings nothing yet, and when it came.
pub fn carried<T>(request: &Request<T>) -> Carried {
    let arrived = request.extensions().get::<Arrived>();
    Carried::new(arrived.copied().unwrap_or_else(|| Arrived(Instant::now())))
}

#[tonic::async_trait]
impl TokenService for Tokens {
    async fn refresh_access_token(
        &self,
        request: Request<RefreshAccessTokenRequest>,
    ) -> Result<Response<RefreshAccessTokenResponse>, Status> {
        let carried = carried(&request).with_refresh(given(&request.get_ref().refresh_token)?);
        let Refreshed { tokens, reissued, .. } =
            sessions::refresh(&self.app, &carried).await.map_err(Refusal::Session)?;
        let set_cookie = cookies::both(&self.app.config, &tokens);
        Ok(Response::new(RefreshAccessTokenResponse {
            access_token: tokens.access.token.expose_secret().to_owned(),
            access_token_expires_at: Some(timestamp(tokens.access.expires_at)),
            refresh_token: tokens.refresh.token.expose_secret().to_owned(),
            refresh_token_expires_at: Some(timestamp(tokens.refresh.expires_at)),
            set_cookie: set_cookie.into(),
            reissued,
        }))
    }

    async fn validate_access_token(
        &self,
        request: Request<ValidateAccessTokenRequest>,
    ) -> Result<Response<ValidateAccessTokenResponse>, Status> {
        let carried = carried(&request).with_access(given(&request.get_ref().access_token)?);
        let Validated { claims, user } = sessions::validate(&self.app, &carried).await.map_err(Refusal::Session)?;
        Ok(Response::new(ValidateAccessTokenResponse {
            user_id: user.id.0.into(),
            username: user.username,
            session_id: claims.sid.to_string(),
            expires_at: Some(Timestamp { seconds: claims.exp, nanos: 0 }),
        }))
    }
}

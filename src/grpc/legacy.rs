//! `token.Token`, for gateways of the original fleet.

use auth_proto::legacy::token::{
    RefreshTokenRequest, RefreshTokenResponse,
    token_server::{SERVICE_NAME, Token},
};
use secrecy::ExposeSecret;
use tonic::{Request, Response, Status};

use super::{
    status::Refusal,
    token::{carried, given},
};
use crate::{app::App, sessions};

/// The service's full name.
pub const NAME: &str = SERVICE_NAME;

/// Answers its calls. The answer has no field for a new refresh token, so none is ever made: a
/// rotated token that can't be handed over would end the session at its next use.
pub struct LegacyTokens {
    app: App,
}

impl LegacyTokens {
    /// On `app`'s sessions.
    pub fn new(app: App) -> Self {
        Self { app }
    }
}

#[tonic::async_trait]
impl Token for LegacyTokens {
    async fn refresh_token(
        &self,
        request: Request<RefreshTokenRequest>,
    ) -> Result<Response<RefreshTokenResponse>, Status> {
        let carried = carried(&request).with_refresh(given(&request.get_ref().refresh_token)?);
        let renewed = sessions::access_from_refresh(&self.app, &carried).await.map_err(Refusal::Session)?;
        Ok(Response::new(RefreshTokenResponse { access_token: renewed.access.token.expose_secret().to_owned() }))
    }
}

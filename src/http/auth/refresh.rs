use axum::{extract::State, http::StatusCode};
use chrono::SecondsFormat;
use serde_json::{Value, json};

use super::Success;
use crate::{
    app::App,
    http::{cookies, error::ApiError, extract::Fields},
    sessions::{self, Carried},
};

/// `POST /auth/refresh`, for clients without a gateway; the route is there only where the
/// configuration asks for it. A refusal leaves the cookies alone, for the same reason as in
/// [`me`](super::me).
pub async fn refresh(State(app): State<App>, carried: Carried, _: Fields) -> Result<Success<Value>, ApiError> {
    let refreshed = sessions::refresh(&app, &carried).await?;
    let tokens = &refreshed.tokens;
    Ok(Success {
        status: StatusCode::OK,
        message: "Token refreshed successfully",
        data: json!({
            "accessTokenExpiresAt": tokens.access.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true),
            "refreshTokenExpiresAt": tokens.refresh.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true),
        }),
        cookies: cookies::both(&app.config, tokens).into(),
    })
}

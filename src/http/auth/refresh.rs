use axum::{extract::State, http::StatusCode, response::Response};
use chrono::{SecondsFormat, Utc};
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::{Success, me::over};
use crate::{
    app::App,
    http::{
        cookies::{self, Carried},
        extract::Fields,
    },
    sessions::{self, Over, SessionError},
};

/// `POST /auth/refresh`, for clients without a gateway; the route is there only where the
/// configuration asks for it.
pub async fn refresh(State(app): State<App>, carried: Carried, _: Fields) -> Result<Success<Value>, Response> {
    let Some(presented) = &carried.refresh else {
        return Err(over(&app, SessionError::Over(Over::NoToken)));
    };
    let refreshed = sessions::refresh(&app, presented.expose_secret()).await.map_err(|refusal| over(&app, refusal))?;
    let tokens = &refreshed.tokens;
    Ok(Success {
        status: StatusCode::OK,
        message: "Token refreshed successfully",
        data: json!({
            "accessTokenExpiresAt": tokens.access.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true),
            "refreshTokenExpiresAt": tokens.refresh.expires_at.to_rfc3339_opts(SecondsFormat::Secs, true),
        }),
        cookies: cookies::both(&app.config, tokens, Utc::now()).into(),
    })
}

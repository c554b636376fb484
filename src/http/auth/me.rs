use axum::{
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use chrono::Utc;
use secrecy::ExposeSecret;
use serde_json::Value;

use super::{Success, shown};
use crate::{
    app::App,
    http::{
        cookies::{self, Carried},
        error::ApiError,
    },
    sessions::{self, Over, SessionError},
};

/// `GET /auth/me`
///
/// Where only the refresh cookie is still good, the access token is renewed on the way. The refresh
/// token never is: pages ask this in the background and many at once, and an answer that is lost
/// must not cost the session.
pub async fn me(State(app): State<App>, carried: Carried) -> Result<Success<Value>, Response> {
    let mut refusal = SessionError::Over(Over::NoToken);
    if let Some(access) = &carried.access {
        match sessions::validate(&app, access.expose_secret()).await {
            Ok(validated) => return Ok(answer(shown(&validated.user), vec![])),
            Err(over @ SessionError::Over(_)) => refusal = over,
            Err(error) => return Err(ApiError::from(error).into_response()),
        }
    }
    if let Some(refresh) = &carried.refresh {
        match sessions::access_from_refresh(&app, refresh.expose_secret()).await {
            Ok((user, access)) => {
                return Ok(answer(shown(&user), vec![cookies::access(&app.config, &access, Utc::now())]));
            }
            Err(over @ SessionError::Over(_)) => refusal = over,
            Err(error) => return Err(ApiError::from(error).into_response()),
        }
    }
    Err(over(&app, refusal))
}

/// Signed out, and so the cookies go; except where the database may yet remember the session.
pub(super) fn over(app: &App, refusal: SessionError) -> Response {
    let keep = matches!(refusal, SessionError::Over(Over::NoToken | Over::AheadOfRecord));
    let gone = matches!(refusal, SessionError::Over(_)) && !keep;
    let mut response = ApiError::from(refusal).into_response();
    if gone {
        cookies::append(response.headers_mut(), cookies::cleared(app.config.http.cookies));
    }
    response
}

fn answer(data: Value, cookies: Vec<String>) -> Success<Value> {
    Success { status: StatusCode::OK, message: "Signed in", data, cookies }
}

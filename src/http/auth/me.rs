use axum::{extract::State, http::StatusCode};
use serde_json::Value;

use super::{Success, shown};
use crate::{
    app::App,
    http::{cookies, error::ApiError},
    sessions::{self, Carried, SignedIn},
};

/// `GET /auth/me`
///
/// Where only the refresh cookie is still good, the access token is renewed on the way. The refresh
/// token never is: pages ask this in the background and many at once, and an answer that is lost
/// must not cost the session.
///
/// A refusal clears no cookies. It is about those the request came with, and when it arrives the
/// browser may hold newer ones: of a login that was under way at the same time.
pub async fn me(State(app): State<App>, carried: Carried) -> Result<Success<Value>, ApiError> {
    let (user, cookies) = match sessions::signed_in(&app, &carried).await? {
        SignedIn::ByAccess(user) => (user, vec![]),
        SignedIn::Renewed(renewed) => {
            let cookie = cookies::access(&app.config, &renewed.access, renewed.at);
            (renewed.user, vec![cookie])
        }
    };
    Ok(Success { status: StatusCode::OK, message: "Signed in", data: shown(&user), cookies })
}

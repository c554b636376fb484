use axum::{
    extract::{RawQuery, State},
    http::StatusCode,
    response::{IntoResponse, Response},
};
use serde_json::Value;

use super::Success;
use crate::{
    app::App,
    domain::FieldError,
    http::{cookies, error::ApiError, extract::Fields},
    sessions::{self, Carried, LogoutScope, SessionError},
};

/// `DELETE /auth/logout`
///
/// The cookies go whatever the tokens in them are worth, but not while it is unknown whether the
/// session has ended: the client would lose the means to end it.
pub async fn logout(
    State(app): State<App>,
    RawQuery(query): RawQuery,
    carried: Carried,
    _: Fields,
) -> Result<Success<Value>, Response> {
    let scope = scope(query.as_deref()).map_err(|error| ApiError::Validation(vec![error]).into_response())?;
    let policy = app.config.http.cookies;
    match sessions::logout(&app, &carried, scope).await {
        Ok(()) => Ok(Success {
            status: StatusCode::OK,
            message: "Logged out successfully",
            data: Value::Null,
            // Whoever ends the others stays signed in.
            cookies: if scope == LogoutScope::Others { vec![] } else { cookies::cleared(policy).into() },
        }),
        Err(SessionError::Over(_)) => {
            let mut response = ApiError::TokenNotFound.into_response();
            cookies::append(response.headers_mut(), cookies::cleared(policy));
            Err(response)
        }
        Err(error) => Err(ApiError::from(error).into_response()),
    }
}

fn scope(query: Option<&str>) -> Result<LogoutScope, FieldError> {
    let mut scopes = query.unwrap_or_default().split('&').filter_map(|pair| pair.strip_prefix("scope="));
    match (scopes.next(), scopes.next()) {
        (None, _) => Ok(LogoutScope::This),
        (Some("this"), None) => Ok(LogoutScope::This),
        (Some("others"), None) => Ok(LogoutScope::Others),
        (Some("all"), None) => Ok(LogoutScope::All),
        _ => Err(FieldError::new("scope", "must be this, others or all")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_session_ends_unless_more_is_asked_for() {
        for (query, expected) in [
            (None, Some(LogoutScope::This)),
            (Some("x=1"), Some(LogoutScope::This)),
            (Some("scope=others"), Some(LogoutScope::Others)),
            (Some("x=1&scope=all"), Some(LogoutScope::All)),
            (Some("scope="), None),
            (Some("scope=everything"), None),
            (Some("scope=this&scope=all"), None),
        ] {
            assert_eq!(scope(query).ok(), expected, "{query:?}");
        }
    }
}

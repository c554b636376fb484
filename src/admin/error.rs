//! The one table of the admin port's errors, in the shape REST has.

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{config::Scope, db, domain::FieldError};

/// When to come again while the database is away.
const DATABASE_RETRY_SECONDS: u64 = 2;

/// Everything that can go wrong, as the operator is told.
#[derive(Debug, Clone, PartialEq)]
pub enum AdminError {
    /// No good token.
    NoToken(&'static str),
    /// A good token whose scopes are too small.
    ScopeTooSmall(Scope),
    /// Parameters, or the body, are not as they should be.
    Validation(Vec<FieldError>),
    /// The body is of another type than JSON.
    UnsupportedMediaType,
    /// The body is too large.
    PayloadTooLarge,
    /// No such row, saga, …
    Unknown(String),
    /// No such route.
    NoRoute,
    /// The route exists, the method does not.
    MethodNotAllowed,
    /// The system will not, for this reason.
    Refused(String),
    /// The database is away.
    Unavailable,
    /// A bug.
    Internal,
}

impl AdminError {
    /// One field is wrong.
    pub fn field(field: &'static str, message: impl Into<String>) -> Self {
        Self::Validation(vec![FieldError::new(field, message)])
    }

    /// The table.
    fn row(&self) -> (StatusCode, &'static str, String) {
        use StatusCode as S;
        match self {
            Self::NoToken(why) => (S::UNAUTHORIZED, "UNAUTHORIZED", (*why).to_owned()),
            Self::ScopeTooSmall(needed) => {
                (S::FORBIDDEN, "FORBIDDEN", format!("This needs a token with the scope {:?}", needed.as_str()))
            }
            Self::Validation(errors) => (
                S::BAD_REQUEST,
                "VALIDATION_ERROR",
                errors.iter().map(FieldError::to_string).collect::<Vec<_>>().join("; "),
            ),
            Self::UnsupportedMediaType => {
                (S::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED_MEDIA_TYPE", "Send the body as application/json".to_owned())
            }
            Self::PayloadTooLarge => {
                (S::PAYLOAD_TOO_LARGE, "PAYLOAD_TOO_LARGE", "The body is larger than 16 KiB".to_owned())
            }
            Self::Unknown(what) => (S::NOT_FOUND, "NOT_FOUND", what.clone()),
            Self::NoRoute => (S::NOT_FOUND, "NOT_FOUND", "There is no such route".to_owned()),
            Self::MethodNotAllowed => (
                S::METHOD_NOT_ALLOWED,
                "METHOD_NOT_ALLOWED",
                "This route does not know this method; see Allow".to_owned(),
            ),
            Self::Refused(why) => (S::CONFLICT, "REFUSED", why.clone()),
            Self::Unavailable => (
                S::SERVICE_UNAVAILABLE,
                "SERVICE_UNAVAILABLE",
                "The database does not answer; try again shortly".to_owned(),
            ),
            Self::Internal => {
                (S::INTERNAL_SERVER_ERROR, "INTERNAL_ERROR", "Something went wrong on our side; see the log".to_owned())
            }
        }
    }

    fn body(&self) -> Value {
        let (status, code, message) = self.row();
        let mut body = json!({
            "statusCode": status.as_u16(),
            "message": message,
            "errorCode": code,
            "error": { "code": code, "message": message },
        });
        if let Self::Validation(errors) = self {
            body["errors"] = json!(errors);
        }
        body
    }
}

impl IntoResponse for AdminError {
    fn into_response(self) -> Response {
        let mut response = (self.row().0, Json(self.body())).into_response();
        let headers = response.headers_mut();
        match self {
            Self::NoToken(_) => {
                headers.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::Unavailable => {
                headers.insert(header::RETRY_AFTER, HeaderValue::from(DATABASE_RETRY_SECONDS));
            }
            _ => {}
        }
        response
    }
}

impl From<sqlx::Error> for AdminError {
    fn from(error: sqlx::Error) -> Self {
        if db::is_away(&error) {
            tracing::warn!(%error, "the database does not answer; the operator was asked to come again");
            Self::Unavailable
        } else {
            tracing::error!(%error, "the database refused a statement of the admin port");
            Self::Internal
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_shape_of_rest() {
        let body = AdminError::field("limit", "must be from 1 to 200").body();
        assert_eq!(body["statusCode"], 400);
        assert_eq!(body["errorCode"], "VALIDATION_ERROR");
        assert_eq!(body["error"]["code"], "VALIDATION_ERROR");
        assert_eq!(body["error"]["message"], body["message"]);
        assert_eq!(body["errors"], json!([{ "field": "limit", "message": "must be from 1 to 200" }]));
    }

    #[test]
    fn who_has_no_token_is_told_which_kind_is_wanted() {
        let response = AdminError::NoToken("send one").into_response();
        assert_eq!(response.status(), 401);
        assert_eq!(response.headers()[header::WWW_AUTHENTICATE], "Bearer");
        assert_eq!(AdminError::ScopeTooSmall(Scope::Operate).into_response().status(), 403);
    }

    #[test]
    fn a_database_that_is_away_is_no_bug() {
        let response = AdminError::from(sqlx::Error::PoolTimedOut).into_response();
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
        assert_eq!(AdminError::from(sqlx::Error::RowNotFound), AdminError::Internal);
    }
}

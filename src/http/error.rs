//! The one table of REST errors: which status, which code, which words.

use std::time::Duration;

use axum::{
    Json,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use crate::{
    accounts::{LoginError, RegisterError},
    db,
    domain::FieldError,
    sessions::{Over, SessionError},
};

/// When to come again while the database is away.
const DATABASE_RETRY: Duration = Duration::from_secs(2);

/// Everything that can go wrong, as the client is told.
#[derive(Debug, Clone, PartialEq)]
pub enum ApiError {
    /// Fields, or the body as a whole, are not as they should be.
    Validation(Vec<FieldError>),
    /// The request's head can't be read, for the reason this status names.
    Unreadable(StatusCode),
    /// Somebody has the address.
    EmailTaken,
    /// Somebody has the name.
    UsernameTaken,
    /// The registration of this idempotency key was taken back.
    RegistrationTakenBack,
    /// The registration failed for a reason nobody foresaw.
    UserCreate,
    /// Whether the registration was written is not known.
    OutcomeUnknown,
    /// Unknown user or wrong password.
    InvalidCredentials,
    /// Logout without a session.
    TokenNotFound,
    /// Not, or no longer, signed in.
    NotSignedIn(Over),
    /// From a foreign site.
    ForeignOrigin,
    /// No such route.
    NotFound,
    /// The route exists, the method does not.
    MethodNotAllowed,
    /// The body did not come in time.
    RequestTimeout,
    /// The body is too large.
    PayloadTooLarge {
        /// What is accepted, in bytes.
        limit: usize,
    },
    /// The body is of another type than JSON.
    UnsupportedMediaType,
    /// More passwords to hash than this machine can.
    Busy(Duration),
    /// The database is away.
    Unavailable,
    /// A bug.
    Internal,
}

impl ApiError {
    /// The HTTP status.
    pub fn status(&self) -> StatusCode {
        self.row().0
    }

    /// For machines; stable.
    pub fn code(&self) -> &'static str {
        self.row().1
    }

    /// For people.
    pub fn message(&self) -> String {
        match self {
            ApiError::Validation(errors) => errors.iter().map(FieldError::to_string).collect::<Vec<_>>().join("; "),
            ApiError::NotSignedIn(over) => over.to_string(),
            ApiError::PayloadTooLarge { limit } => format!("The body is larger than {limit} bytes"),
            other => other.row().2.to_owned(),
        }
    }

    /// What exactly is wrong, by field.
    pub fn fields(&self) -> &[FieldError] {
        match self {
            ApiError::Validation(errors) => errors,
            _ => &[],
        }
    }

    /// When to come again, in seconds.
    pub fn retry_after(&self) -> Option<u64> {
        let wait = match self {
            ApiError::Busy(wait) => *wait,
            ApiError::Unavailable | ApiError::OutcomeUnknown => DATABASE_RETRY,
            _ => return None,
        };
        Some((wait.as_millis().div_ceil(1000) as u64).max(1))
    }

    /// The table.
    fn row(&self) -> (StatusCode, &'static str, &'static str) {
        use StatusCode as S;
        match self {
            ApiError::Validation(_) => (S::BAD_REQUEST, "VALIDATION_ERROR", "The request is not valid"),
            ApiError::Unreadable(S::REQUEST_HEADER_FIELDS_TOO_LARGE) => (
                S::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "HEADERS_TOO_LARGE",
                "The request has too many or too large headers",
            ),
            ApiError::Unreadable(S::URI_TOO_LONG) => (S::URI_TOO_LONG, "URI_TOO_LONG", "The URI is too long"),
            ApiError::Unreadable(_) => (S::BAD_REQUEST, "BAD_REQUEST", "The request can't be read"),
            ApiError::UserCreate => {
                (S::BAD_REQUEST, "USER_CREATE_ERROR", "The user could not be created; nothing was written")
            }
            ApiError::TokenNotFound => (S::BAD_REQUEST, "TOKEN_NOT_FOUND", "Failed to log out. Token not found"),
            ApiError::InvalidCredentials => {
                (S::UNAUTHORIZED, "INVALID_CREDENTIALS", "Invalid credentials: unknown user or wrong password")
            }
            ApiError::NotSignedIn(over) => (S::UNAUTHORIZED, over.code(), "Sign in first"),
            ApiError::ForeignOrigin => (
                S::FORBIDDEN,
                "FOREIGN_ORIGIN",
                "Requests that change something are not taken from other sites; if this page is yours, its origin belongs in CORS_ORIGINS",
            ),
            ApiError::NotFound => (S::NOT_FOUND, "NOT_FOUND", "There is no such route"),
            ApiError::MethodNotAllowed => {
                (S::METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED", "This route does not know this method; see Allow")
            }
            ApiError::RequestTimeout => (S::REQUEST_TIMEOUT, "REQUEST_TIMEOUT", "The body did not arrive in time"),
            ApiError::EmailTaken => (S::CONFLICT, "EMAIL_ALREADY_EXISTS", "A user with this email already exists"),
            ApiError::UsernameTaken => {
                (S::CONFLICT, "USERNAME_ALREADY_EXISTS", "A user with this username already exists")
            }
            ApiError::RegistrationTakenBack => (
                S::CONFLICT,
                "REGISTRATION_TAKEN_BACK",
                "The registration under this Idempotency-Key was taken back; register again with a new key",
            ),
            ApiError::PayloadTooLarge { .. } => (S::PAYLOAD_TOO_LARGE, "PAYLOAD_TOO_LARGE", "The body is too large"),
            ApiError::UnsupportedMediaType => {
                (S::UNSUPPORTED_MEDIA_TYPE, "UNSUPPORTED_MEDIA_TYPE", "Send the body as application/json")
            }
            ApiError::Internal => (S::INTERNAL_SERVER_ERROR, "INTERNAL_ERROR", "Something went wrong on our side"),
            ApiError::Busy(_) => {
                (S::SERVICE_UNAVAILABLE, "SERVICE_UNAVAILABLE", "Too many sign-ins at once; try again shortly")
            }
            ApiError::Unavailable => (
                S::SERVICE_UNAVAILABLE,
                "SERVICE_UNAVAILABLE",
                "The service is not available just now; try again shortly",
            ),
            ApiError::OutcomeUnknown => (
                S::SERVICE_UNAVAILABLE,
                "OUTCOME_UNKNOWN",
                "Whether the user was registered could not be learnt; send the same request with the same Idempotency-Key again",
            ),
        }
    }

    /// The fleet's error body.
    pub fn body(&self) -> Value {
        let (code, message) = (self.code(), self.message());
        let mut body = json!({
            "statusCode": self.status().as_u16(),
            "message": message,
            "errorCode": code,
            "error": { "code": code, "message": message },
        });
        if !self.fields().is_empty() {
            body["errors"] = json!(self.fields());
        }
        body
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status(), Json(self.body())).into_response();
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        // For clients that want another form; see `problem`.
        response.extensions_mut().insert(self);
        response
    }
}

impl From<RegisterError> for ApiError {
    fn from(error: RegisterError) -> Self {
        match error {
            RegisterError::Invalid(errors) => ApiError::Validation(errors),
            RegisterError::EmailTaken => ApiError::EmailTaken,
            RegisterError::UsernameTaken => ApiError::UsernameTaken,
            RegisterError::TakenBack => ApiError::RegistrationTakenBack,
            RegisterError::Busy { retry_after } => ApiError::Busy(retry_after),
            RegisterError::OutcomeUnknown => {
                tracing::error!("a registration's outcome could not be learnt; the client was told so");
                ApiError::OutcomeUnknown
            }
            RegisterError::Unavailable(error) => unavailable(&error),
            RegisterError::Unforeseen(error) => {
                tracing::error!(error, "a registration failed for an unforeseen reason; nothing was written");
                ApiError::UserCreate
            }
        }
    }
}

impl From<LoginError> for ApiError {
    fn from(error: LoginError) -> Self {
        match error {
            LoginError::Refused => ApiError::InvalidCredentials,
            LoginError::Busy { retry_after } => ApiError::Busy(retry_after),
            LoginError::Unavailable(error) => unavailable(&error),
            LoginError::Unforeseen(error) => {
                tracing::error!(error, "a login failed for an unforeseen reason");
                ApiError::Internal
            }
        }
    }
}

impl From<SessionError> for ApiError {
    fn from(error: SessionError) -> Self {
        match error {
            SessionError::Over(over) => ApiError::NotSignedIn(over),
            SessionError::Unavailable(error) => unavailable(&error),
            SessionError::Signing(error) => {
                tracing::error!(%error, "a token could not be signed");
                ApiError::Internal
            }
        }
    }
}

fn unavailable(error: &sqlx::Error) -> ApiError {
    match db::is_away(error) {
        true => {
            tracing::warn!(%error, "the database does not answer; the client was asked to come again")
        }
        // A bug or a foreign hand, but no reason to sign anybody out.
        false => {
            tracing::error!(%error, "the database's answer is of no use; the client was asked to come again")
        }
    }
    ApiError::Unavailable
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_has_the_fleets_shape() {
        assert_eq!(
            ApiError::TokenNotFound.body(),
            json!({
                "statusCode": 400,
                "message": "Failed to log out. Token not found",
                "errorCode": "TOKEN_NOT_FOUND",
                "error": { "code": "TOKEN_NOT_FOUND", "message": "Failed to log out. Token not found" },
            })
        );
    }

    #[test]
    fn a_validation_error_names_its_fields() {
        let error = ApiError::Validation(vec![FieldError::new("email", "is required")]);
        assert_eq!(error.body()["errors"], json!([{ "field": "email", "message": "is required" }]));
        assert_eq!(error.body()["message"], "email: is required");
        assert_eq!((error.status().as_u16(), error.code()), (400, "VALIDATION_ERROR"));
    }

    #[test]
    fn what_passes_by_itself_says_when_to_come_again() {
        for error in [ApiError::Unavailable, ApiError::OutcomeUnknown, ApiError::Busy(Duration::from_millis(1200))] {
            let response = error.clone().into_response();
            assert_eq!(response.status(), 503);
            assert_eq!(response.headers()[header::RETRY_AFTER], "2", "{error:?}");
        }
        assert!(!ApiError::Internal.into_response().headers().contains_key(header::RETRY_AFTER));
    }

    #[test]
    fn a_database_that_is_away_is_never_a_session_that_is_over() {
        let away = ApiError::from(SessionError::Unavailable(sqlx::Error::PoolTimedOut));
        assert_eq!((away.status().as_u16(), away.code()), (503, "SERVICE_UNAVAILABLE"));
        let over = ApiError::from(SessionError::Over(Over::Reused));
        assert_eq!((over.status().as_u16(), over.code()), (401, "REFRESH_TOKEN_REUSED"));
    }
}

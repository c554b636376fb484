//! The one table of gRPC codes.
//!
//! | code | when |
//! |---|---|
//! | `UNAUTHENTICATED` | the session is over, or a caller has no good credentials |
//! | `UNAVAILABLE` | nothing could be learnt; try again |
//! | `DEADLINE_EXCEEDED` | it took too long; try again |
//! | `NOT_FOUND` | no such user |
//! | `INVALID_ARGUMENT` | the request can't be read, is too large, or names an impossible id |
//! | `UNIMPLEMENTED` | no such method |
//! | `INTERNAL` | a bug or a key that does not sign |
//!
//! `error-code` in the metadata is the word for machines, the same as in REST.

use tonic::{Code, Status, metadata::MetadataValue};

use crate::{db, sessions::SessionError};

/// Why a call is refused.
#[derive(Debug)]
pub enum Refusal {
    /// From a session's use case.
    Session(SessionError),
    /// From the database.
    Database(sqlx::Error),
    /// There is no such user.
    UnknownUser,
    /// No user can have this id.
    ImpossibleUserId,
    /// The caller has shown no good credentials.
    Caller(&'static str),
    /// The request can't be read.
    Unreadable,
    /// It took too long.
    TooLate,
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        match refusal {
            Refusal::Session(SessionError::Over(over)) => coded(Code::Unauthenticated, over.code(), over.to_string()),
            Refusal::Session(SessionError::Unavailable(error)) | Refusal::Database(error) => unavailable(&error),
            Refusal::Session(SessionError::Signing(error)) => {
                tracing::error!(%error, "a token could not be signed");
                internal()
            }
            Refusal::UnknownUser => coded(Code::NotFound, "NOT_FOUND", "there is no such user"),
            Refusal::ImpossibleUserId => {
                coded(Code::InvalidArgument, "VALIDATION_ERROR", "user_id must be a whole number from 1 on")
            }
            Refusal::Caller(why) => coded(Code::Unauthenticated, "UNAUTHENTICATED", why),
            Refusal::Unreadable => coded(
                Code::InvalidArgument,
                "VALIDATION_ERROR",
                "the request is no message of this method, or larger than 64 KiB",
            ),
            Refusal::TooLate => {
                coded(Code::DeadlineExceeded, "SERVICE_UNAVAILABLE", "this took too long; try again shortly")
            }
        }
    }
}

/// A bug. What it was stands in the log.
pub fn internal() -> Status {
    coded(Code::Internal, "INTERNAL_ERROR", "something went wrong on our side")
}

/// The metadata key of the word for machines.
pub const ERROR_CODE: &str = "error-code";

fn unavailable(error: &sqlx::Error) -> Status {
    if db::is_away(error) {
        tracing::warn!(%error, "the database does not answer; the gRPC client was asked to try again");
    } else {
        tracing::error!(%error, "the database refused a statement; the gRPC client was asked to try again");
    }
    coded(Code::Unavailable, "SERVICE_UNAVAILABLE", "the service is not available just now; try again shortly")
}

fn coded(code: Code, word: &'static str, message: impl Into<String>) -> Status {
    let mut status = Status::new(code, message);
    status.metadata_mut().insert(ERROR_CODE, MetadataValue::from_static(word));
    status
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{crypto::TokenError, sessions::Over};

    #[test]
    fn over_and_away_are_never_confused() {
        for over in [
            Over::NoToken,
            Over::Invalid,
            Over::Expired,
            Over::Ended,
            Over::Reused,
            Over::AheadOfRecord,
            Over::TwoUsers,
        ] {
            let status = Status::from(Refusal::Session(SessionError::Over(over)));
            assert_eq!(status.code(), Code::Unauthenticated, "{over:?}");
            assert_eq!(status.metadata().get(ERROR_CODE).and_then(|word| word.to_str().ok()), Some(over.code()));
        }
        for error in [sqlx::Error::PoolTimedOut, sqlx::Error::RowNotFound] {
            assert_eq!(Status::from(Refusal::Session(SessionError::Unavailable(error))).code(), Code::Unavailable);
        }
    }

    #[test]
    fn a_key_that_does_not_sign_ends_no_session() {
        let status = Status::from(Refusal::Session(SessionError::Signing(TokenError::SigningFailed)));
        assert_eq!((status.code(), status.message()), (Code::Internal, "something went wrong on our side"));
    }
}

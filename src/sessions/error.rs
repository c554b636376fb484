use std::fmt;

use crate::crypto::TokenError;

/// Why nothing was granted.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// Signing in again is the only way on.
    #[error("{0}")]
    Over(Over),
    /// Nothing is known about the session: the database did not answer. Trying again may succeed.
    #[error("the database did not answer")]
    Unavailable(#[from] sqlx::Error),
    /// The session is good, but no token could be signed.
    #[error("no token could be signed")]
    Signing(#[source] TokenError),
}

/// Why a session is over, or a token no session's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Over {
    /// No token came.
    NoToken,
    /// Not a token of ours.
    Invalid,
    /// Its time has passed.
    Expired,
    /// It was ended, or its user may not sign in any more.
    Ended,
    /// The token had been replaced long before: somebody else has a copy. The session has been ended.
    Reused,
    /// The token is newer than the session's record: the database has lost something. The session
    /// was left as it is.
    AheadOfRecord,
    /// Good tokens of two users came in one request. Which of them asks can't be told.
    TwoUsers,
}

impl Over {
    /// For machines; stable.
    pub fn code(self) -> &'static str {
        match self {
            Over::NoToken => "TOKEN_NOT_FOUND",
            Over::Invalid => "TOKEN_INVALID",
            Over::Expired => "TOKEN_EXPIRED",
            Over::Ended => "SESSION_ENDED",
            Over::Reused => "REFRESH_TOKEN_REUSED",
            Over::AheadOfRecord => "SESSION_STATE_MISMATCH",
            Over::TwoUsers => "TOKENS_OF_TWO_USERS",
        }
    }
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Over::NoToken => "Not signed in: sign in first",
            Over::Invalid => "The token is not valid: sign in again",
            Over::Expired => "The token has expired: sign in again",
            Over::Ended => "The session has ended: sign in again",
            Over::Reused => "The token was used before, so the session has been ended: sign in again",
            Over::AheadOfRecord => "The session is not known in this state: sign in again",
            Over::TwoUsers => "The request carries the tokens of two users: sign out, then sign in again",
        })
    }
}

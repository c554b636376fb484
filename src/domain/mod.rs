//! What the service knows about users, sessions and tokens, without any I/O.
//!
//! Everything here is a value or a decision over values: parsed once at the edge, then trusted.

mod email;
mod identifier;
mod password;
mod session;
mod spelling;
mod token;
mod user;
mod username;

pub use email::Email;
pub use identifier::Identifier;
pub use password::Password;
pub use session::{RefreshDecision, RequestTime, Session};
pub use token::{AccessClaims, CLOCK_LEEWAY, LegacyRefreshClaims, RefreshClaims};
pub use user::{User, UserId, UserStatus};
pub use username::Username;

/// Why one field of a request was refused, in words its sender can act on.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, thiserror::Error)]
#[error("{field}: {message}")]
pub struct FieldError {
    /// The field as the request spells it.
    pub field: &'static str,
    /// What is wrong and what would be right.
    pub message: String,
}

impl FieldError {
    /// An error about `field`.
    pub fn new(field: &'static str, message: impl Into<String>) -> Self {
        Self { field, message: message.into() }
    }
}

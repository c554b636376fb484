use std::fmt;

use chrono::{DateTime, Utc};
use uuid::Uuid;

/// The number every other service knows a user by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserId(pub i32);

impl fmt::Display for UserId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a user stands between registration and the end of the account.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UserStatus {
    /// Registered, and the profile's fate is not known yet: the create saga may take it back.
    Pending,
    /// Has a profile; no reply can take it back any more.
    Active,
    /// The account is being deleted.
    Closing,
}

impl UserStatus {
    /// As the database spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Pending => "pending",
            Self::Active => "active",
            Self::Closing => "closing",
        }
    }

    /// `None` for a word the database does not use.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Pending, Self::Active, Self::Closing].into_iter().find(|status| status.as_str() == word)
    }
}

/// A user as the rest of the service sees it; the password hash never leaves the database module.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    /// Its number.
    pub id: UserId,
    /// The username, as typed.
    pub username: String,
    /// The e-mail address, as typed.
    pub email: String,
    /// Whether somebody has shown that the address is theirs.
    pub is_verified: bool,
    /// Where it stands.
    pub status: UserStatus,
    /// The only saga that may take this user back; none for users adopted from the replaced service.
    pub create_saga_id: Option<Uuid>,
    /// When it registered.
    pub created_at: DateTime<Utc>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_is_read_back_from_its_word() {
        for status in [UserStatus::Pending, UserStatus::Active, UserStatus::Closing] {
            assert_eq!(UserStatus::parse(status.as_str()), Some(status));
        }
        assert_eq!(UserStatus::parse("Pending"), None);
    }
}

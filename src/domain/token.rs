use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::RequestTime;

/// How far the clocks of those who verify access tokens may be behind the database's, in seconds.
/// `nbf` lies that much before `iat`; a gateway whose clock is further behind refuses new tokens.
pub const CLOCK_LEEWAY: i64 = 60;

/// What an access token says. `id`, `username` and `email` are what gateways of the original
/// fleet read; the rest is for everyone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AccessClaims {
    /// The user's number.
    pub id: i64,
    /// The username, as typed.
    pub username: String,
    /// The e-mail address, as typed.
    pub email: String,
    /// The user's number as text.
    pub sub: String,
    /// The session the token belongs to.
    pub sid: Uuid,
    /// The token's own id.
    pub jti: Uuid,
    /// Who signed it.
    pub iss: String,
    /// For whom.
    pub aud: String,
    /// Signed at, in seconds.
    pub iat: i64,
    /// Not valid before, in seconds.
    pub nbf: i64,
    /// Valid until, in seconds.
    pub exp: i64,
}

impl AccessClaims {
    /// Whether the token's time had passed when the request came.
    pub fn is_over(&self, time: RequestTime) -> bool {
        self.exp <= time.arrived_from.timestamp()
    }

    /// Whether the token comes from a time that is yet to come: no database of ours gave it that.
    pub fn is_early(&self, time: RequestTime) -> bool {
        self.nbf.max(self.iat) > time.now.timestamp().saturating_add(CLOCK_LEEWAY)
    }
}

/// What a refresh token says: which generation of which session it is.
///
/// The order of the fields is part of the token: it is made anew from the session row, and only
/// the same bytes give the same signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RefreshClaims {
    /// The user's number as text.
    pub sub: String,
    /// The session.
    pub sid: Uuid,
    /// The id of this generation's token.
    pub jti: Uuid,
    /// How many times the session had been refreshed when this token was made.
    #[serde(rename = "gen")]
    pub generation: i32,
    /// Who signed it.
    pub iss: String,
    /// For whom: the issuer's own refresh endpoint.
    pub aud: String,
    /// Signed at, in seconds.
    pub iat: i64,
    /// Not valid before, in seconds.
    pub nbf: i64,
    /// Valid until, in seconds.
    pub exp: i64,
}

/// What is read from a refresh token the replaced service signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub struct LegacyRefreshClaims {
    /// The user's number.
    #[serde(rename = "id", alias = "userId")]
    pub user_id: i64,
    /// Valid until, in seconds.
    pub exp: i64,
}

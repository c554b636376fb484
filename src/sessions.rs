//! Sessions: opened at sign-in, carried on by refresh tokens that replace each other, ended by
//! logout, by reuse of a token that was replaced, or by time.
//!
//! # What is promised
//!
//! - A token presented any number of times at once makes one new generation, and every caller gets
//!   the same bytes: the row is the recipe of the current token, and an RS256 signature is
//!   deterministic.
//! - Whoever lost the answer gets it again for as long as the reuse window is open. A token that was
//!   replaced longer ago ends its session, and only that one; the end is committed although the call
//!   fails.
//! - A database that does not answer is never mistaken for a session that is over.
//!
//! A token of the replaced service counts as generation 0 of the session its row became.

use std::{fmt, time::Duration};

use aws_lc_rs::digest;
use chrono::Utc;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    app::App,
    crypto::{SignedToken, TokenError, TokenSigner},
    db::{
        self,
        sessions::{self, Found, NewSession, NewToken},
    },
    domain::{AccessClaims, RefreshDecision, Session, User, UserId, UserStatus},
};

/// Sessions a user may have at once. Signing in once more ends the oldest.
pub const SESSIONS_PER_USER: i64 = 50;

/// What a client carries.
#[derive(Debug)]
pub struct TokenPair {
    /// For every request; short-lived.
    pub access: SignedToken,
    /// For new tokens.
    pub refresh: SignedToken,
}

/// A refreshed session.
#[derive(Debug)]
pub struct Refreshed {
    /// Whose it is.
    pub user: User,
    /// Its tokens.
    pub tokens: TokenPair,
    /// The presented token had been replaced a moment ago; this is its successor once more.
    pub reissued: bool,
}

/// An access token that is good.
#[derive(Debug)]
pub struct Validated {
    /// What it says.
    pub claims: AccessClaims,
    /// Its user as of now.
    pub user: User,
}

/// Which sessions a logout ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogoutScope {
    /// The one it came with.
    #[default]
    This,
    /// All others of the user.
    Others,
    /// All of the user.
    All,
}

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
        })
    }
}

/// Opens a session in the caller's transaction.
pub async fn open(
    conn: &mut PgConnection,
    signer: &TokenSigner,
    session_id: Uuid,
    user_id: UserId,
    user_agent: Option<&str>,
) -> Result<Session, sqlx::Error> {
    let new = NewSession {
        session_id,
        user_id,
        token: next_token(signer),
        absolute_expires_at: Utc::now() + signer.settings().session_ttl,
        user_agent,
    };
    sessions::insert(conn, &new).await
}

/// Both tokens of a session as its row stands.
pub fn tokens(signer: &TokenSigner, user: &User, session: &Session) -> Result<TokenPair, TokenError> {
    Ok(TokenPair { access: signer.sign_access(user, session, Utc::now())?, refresh: signer.sign_refresh(session)? })
}

/// Replaces a refresh token by its successor.
pub async fn refresh(app: &App, presented: &str) -> Result<Refreshed, SessionError> {
    let presented = Presented::read(&app.signer, presented)?;
    let (found, reissued) = db::on(&app.db, async |conn| {
        Ok(match presented.replace(conn, &app.signer).await? {
            Some(found) => (Ok(found), false),
            None => match look(conn, app, &presented).await? {
                // Current, and yet it was not replaced: its last second has just gone by.
                Ok(Good { current: true, .. }) => (Err(Over::Expired), false),
                Ok(Good { found, .. }) => (Ok(found), true),
                Err(over) => (Err(over), false),
            },
        })
    })
    .await?;
    let outcome = match &found {
        Ok(_) if reissued => "reissued",
        Ok(_) => "rotated",
        Err(over) => over.code(),
    };
    metrics::counter!("auth_refresh_total", "outcome" => outcome).increment(1);
    let Found { session, user, .. } = found.map_err(SessionError::Over)?;
    let tokens = tokens(&app.signer, &user, &session).map_err(SessionError::Signing)?;
    Ok(Refreshed { user, tokens, reissued })
}

/// A new access token, without replacing the refresh token: for those who could not be handed its
/// successor.
pub async fn access_from_refresh(app: &App, presented: &str) -> Result<(User, SignedToken), SessionError> {
    let presented = Presented::read(&app.signer, presented)?;
    let found = db::on(&app.db, async |conn| {
        look(conn, app, &presented).await
    })
    .await?;
    let Found { session, user, .. } = found.map_err(SessionError::Over)?.found;
    let access = app.signer.sign_access(&user, &session, Utc::now()).map_err(SessionError::Signing)?;
    Ok((user, access))
}

/// Checks an access token, and that its session and user are still there.
pub async fn validate(app: &App, access: &str) -> Result<Validated, SessionError> {
    let claims = app.signer.verify_access(access).map_err(refused)?;
    let found = db::on(&app.db, async |conn| {
        sessions::find(conn, claims.sid).await
    })
    .await?;
    match found {
        // The session's own expiry is the refresh token's; this token has one of its own.
        Some(Found { session, user, .. })
            if session.revoked_at.is_none() && may_sign_in(&user) && i64::from(user.id.0) == claims.id =>
        {
            Ok(Validated { claims, user })
        }
        _ => Err(SessionError::Over(Over::Ended)),
    }
}

/// Ends sessions. Either token says whose: the refresh token, else the access token.
pub async fn logout(
    app: &App,
    refresh: Option<&str>,
    access: Option<&str>,
    scope: LogoutScope,
) -> Result<(), SessionError> {
    let held = match refresh.map(|token| Presented::read(&app.signer, token)) {
        Some(Ok(presented)) => Some(presented),
        Some(Err(_)) | None => None,
    };
    let claims = access.and_then(|token| app.signer.verify_access(token).ok());
    let ended = db::on(&app.db, async |conn| {
        let by_refresh = match &held {
            Some(presented) => look(conn, app, presented).await?,
            None => Err(Over::NoToken),
        };
        let by_access = match (&by_refresh, &claims) {
            (Err(_), Some(claims)) => sessions::find(conn, claims.sid).await?,
            _ => None,
        };
        let found = match by_refresh {
            Ok(good) => good.found,
            // Its session is over by now, which is what was asked for.
            Err(Over::Reused) if scope == LogoutScope::This => return Ok(true),
            Err(_) => match by_access {
                Some(found) if found.session.revoked_at.is_none() => found,
                _ => return Ok(false),
            },
        };
        let (user_id, session_id) = (found.user.id, found.session.session_id);
        match scope {
            LogoutScope::This => sessions::revoke(conn, session_id, "logout").await?,
            LogoutScope::Others => {
                sessions::revoke_all(conn, user_id, Some(session_id), "logout of others").await? > 0
            }
            LogoutScope::All => sessions::revoke_all(conn, user_id, None, "logout everywhere").await? > 0,
        };
        Ok(true)
    })
    .await?;
    if ended { Ok(()) } else { Err(SessionError::Over(Over::NoToken)) }
}

/// Ends the session of a refresh token that a new sign-in takes the place of, in the caller's
/// transaction. A token that is not good names no session, and nothing happens.
pub async fn replace_held(
    conn: &mut PgConnection,
    signer: &TokenSigner,
    presented: &str,
) -> Result<(), sqlx::Error> {
    let Ok(presented) = Presented::read(signer, presented) else { return Ok(()) };
    if let Some(found) = presented.find(conn).await? {
        sessions::revoke(conn, found.session.session_id, "replaced by a new login").await?;
    }
    Ok(())
}

/// The session at `session_id` and its user, if both are still good.
pub async fn live(conn: &mut PgConnection, session_id: Uuid) -> Result<Option<Session>, sqlx::Error> {
    let found = sessions::find(conn, session_id).await?;
    Ok(found.filter(|found| found.session.is_live(found.now) && may_sign_in(&found.user)).map(|found| found.session))
}

/// Whether this user may have sessions. A pending one may: registration signs in at once.
pub fn may_sign_in(user: &User) -> bool {
    matches!(user.status, UserStatus::Pending | UserStatus::Active)
}

/// A refresh token whose signature is good.
enum Presented {
    /// One of ours.
    Ours { session_id: Uuid, generation: i32, jti: Uuid, user_id: String },
    /// One the replaced service had signed with the same key, by its SHA-256.
    Legacy { hash: Vec<u8>, user_id: UserId },
}

impl Presented {
    fn read(signer: &TokenSigner, token: &str) -> Result<Self, SessionError> {
        let refusal = match signer.verify_refresh(token) {
            Ok(claims) => {
                return Ok(Presented::Ours {
                    session_id: claims.sid,
                    generation: claims.generation,
                    jti: claims.jti,
                    user_id: claims.sub,
                });
            }
            Err(TokenError::Expired) => TokenError::Expired,
            Err(_) => match signer.verify_legacy_refresh(token) {
                Ok(claims) => match i32::try_from(claims.user_id) {
                    Ok(id) => {
                        let hash = digest::digest(&digest::SHA256, token.as_bytes()).as_ref().to_vec();
                        return Ok(Presented::Legacy { hash, user_id: UserId(id) });
                    }
                    Err(_) => TokenError::Invalid,
                },
                Err(error) => error,
            },
        };
        Err(refused(refusal))
    }

    fn generation(&self) -> i32 {
        match self {
            Presented::Ours { generation, .. } => *generation,
            Presented::Legacy { .. } => 0,
        }
    }

    async fn find(&self, conn: &mut PgConnection) -> Result<Option<Found>, sqlx::Error> {
        match self {
            Presented::Ours { session_id, .. } => sessions::find(conn, *session_id).await,
            Presented::Legacy { hash, .. } => sessions::find_legacy(conn, hash).await,
        }
    }

    async fn replace(&self, conn: &mut PgConnection, signer: &TokenSigner) -> Result<Option<Found>, sqlx::Error> {
        let next = next_token(signer);
        match self {
            Presented::Ours { session_id, generation, jti, .. } => {
                sessions::rotate(conn, *session_id, *generation, *jti, &next).await
            }
            Presented::Legacy { hash, user_id } => {
                let absolute = Utc::now() + signer.settings().session_ttl;
                sessions::exchange(conn, hash, *user_id, &next, absolute).await
            }
        }
    }

    fn decide(&self, found: &Found, reuse_window: Duration) -> RefreshDecision {
        let Found { session, user, now } = found;
        if !may_sign_in(user) {
            return RefreshDecision::Ended;
        }
        match self {
            Presented::Ours { user_id, .. } if *user_id != user.id.to_string() => RefreshDecision::Ended,
            // The right generation by count alone: a restored backup went another way from there.
            Presented::Ours { generation, jti, .. }
                if *generation == session.generation && *jti != session.jti && session.is_live(*now) =>
            {
                RefreshDecision::AheadOfRecord
            }
            Presented::Ours { generation, .. } => session.on_refresh(*generation, *now, reuse_window),
            Presented::Legacy { user_id, .. } if *user_id != user.id => RefreshDecision::Ended,
            // Not exchanged yet: good until its own expiry, which its signature vouches for.
            Presented::Legacy { .. } if session.generation == 0 => match session.revoked_at {
                None => RefreshDecision::Rotate,
                Some(_) => RefreshDecision::Ended,
            },
            Presented::Legacy { .. } => session.on_refresh(0, *now, reuse_window),
        }
    }
}

/// A session that may go on, as the presented token sees it.
struct Good {
    found: Found,
    /// The token is the current one, not the one before it.
    current: bool,
}

/// Looks at the session of a token that is not being replaced (now, or any more). A session whose
/// token was used again too late is ended here, on its own: the statement commits by itself.
async fn look(
    conn: &mut PgConnection,
    app: &App,
    presented: &Presented,
) -> Result<Result<Good, Over>, sqlx::Error> {
    let Some(found) = presented.find(conn).await? else { return Ok(Err(Over::Ended)) };
    match presented.decide(&found, app.signer.settings().reuse_window) {
        RefreshDecision::Rotate => Ok(Ok(Good { found, current: true })),
        RefreshDecision::Reissue => Ok(Ok(Good { found, current: false })),
        RefreshDecision::Ended => Ok(Err(Over::Ended)),
        RefreshDecision::AheadOfRecord => {
            tracing::error!(
                session.id = %found.session.session_id, user.id = %found.user.id,
                recorded = found.session.generation,
                "a refresh token is ahead of its session's record: was an old backup restored?"
            );
            Ok(Err(Over::AheadOfRecord))
        }
        RefreshDecision::Reused => {
            sessions::revoke(conn, found.session.session_id, "refresh token reused").await?;
            tracing::warn!(
                session.id = %found.session.session_id, user.id = %found.user.id,
                current = found.session.generation, presented = presented.generation(),
                "a refresh token that had been replaced was used again; its session is ended"
            );
            metrics::counter!("auth_refresh_reuse_total").increment(1);
            Ok(Err(Over::Reused))
        }
    }
}

fn next_token(signer: &TokenSigner) -> NewToken<'_> {
    let now = Utc::now();
    NewToken {
        jti: Uuid::new_v4(),
        kid: signer.refresh_kid(),
        issued_at: now,
        expires_at: now + signer.settings().refresh_ttl,
    }
}

fn refused(error: TokenError) -> SessionError {
    match error {
        TokenError::Expired => SessionError::Over(Over::Expired),
        TokenError::Invalid => SessionError::Over(Over::Invalid),
        error => SessionError::Signing(error),
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    const WINDOW: Duration = Duration::from_secs(30);

    /// Refreshed twice, the last time at 100.
    fn found(status: UserStatus) -> Found {
        let at = |seconds| DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range");
        Found {
            session: Session {
                id: 1,
                session_id: Uuid::from_u128(1),
                user_id: UserId(7),
                generation: 2,
                jti: Uuid::from_u128(2),
                kid: "key".to_owned(),
                issued_at: at(100),
                expires_at: at(1000),
                absolute_expires_at: at(2000),
                rotated_at: Some(at(100)),
                revoked_at: None,
                revoked_reason: None,
            },
            user: User {
                id: UserId(7),
                username: "anna".to_owned(),
                email: "anna@example.com".to_owned(),
                is_verified: false,
                status,
                create_saga_id: None,
                created_at: at(0),
            },
            now: at(110),
        }
    }

    fn ours(generation: i32, jti: u128) -> Presented {
        Presented::Ours {
            session_id: Uuid::from_u128(1),
            generation,
            jti: Uuid::from_u128(jti),
            user_id: "7".to_owned(),
        }
    }

    fn legacy(user_id: i32) -> Presented {
        Presented::Legacy { hash: vec![], user_id: UserId(user_id) }
    }

    #[test]
    fn the_current_token_is_replaced_and_the_one_before_it_forgiven() {
        let found = found(UserStatus::Active);
        assert_eq!(ours(2, 2).decide(&found, WINDOW), RefreshDecision::Rotate);
        assert_eq!(ours(1, 9).decide(&found, WINDOW), RefreshDecision::Reissue);
        assert_eq!(ours(0, 9).decide(&found, WINDOW), RefreshDecision::Reused);
    }

    #[test]
    fn a_generation_that_counts_right_but_has_another_id_is_from_a_lost_history() {
        assert_eq!(ours(2, 9).decide(&found(UserStatus::Active), WINDOW), RefreshDecision::AheadOfRecord);
    }

    #[test]
    fn a_user_who_is_leaving_refreshes_nothing_and_a_pending_one_does() {
        assert_eq!(ours(2, 2).decide(&found(UserStatus::Closing), WINDOW), RefreshDecision::Ended);
        assert_eq!(ours(2, 2).decide(&found(UserStatus::Pending), WINDOW), RefreshDecision::Rotate);
    }

    #[test]
    fn an_adopted_token_is_good_until_its_own_expiry_and_then_a_generation_like_any_other() {
        let mut found = found(UserStatus::Active);
        (found.session.generation, found.session.rotated_at) = (0, None);
        // The dates the row was adopted with say nothing about the token.
        found.session.expires_at = found.session.issued_at;
        assert_eq!(legacy(7).decide(&found, WINDOW), RefreshDecision::Rotate);
        assert_eq!(legacy(8).decide(&found, WINDOW), RefreshDecision::Ended);

        let mut exchanged = self::found(UserStatus::Active);
        exchanged.session.generation = 1;
        assert_eq!(legacy(7).decide(&exchanged, WINDOW), RefreshDecision::Reissue);
        exchanged.now += WINDOW;
        assert_eq!(legacy(7).decide(&exchanged, WINDOW), RefreshDecision::Reused);
    }
}

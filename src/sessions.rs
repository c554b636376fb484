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

mod error;
mod presented;

use chrono::Utc;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    app::App,
    crypto::{SignedToken, TokenError, TokenSigner},
    db::sessions::{self, Found, NewSession, NewToken},
    domain::{AccessClaims, Session, User, UserId, UserStatus},
};
use error::refused;
use presented::{Good, Presented, look};

pub use error::{Over, SessionError};

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
    let signer = app.signer.clone();
    let replaced = app.db.run(move |conn| {
        Box::pin(async move {
            Ok::<_, sqlx::Error>(match presented.replace(conn, &signer).await? {
                Some(found) => (Ok(found), false),
                None => match look(conn, &signer, &presented).await? {
                    // Current, and yet it was not replaced: its last second has just gone by.
                    Ok(Good { current: true, .. }) => (Err(Over::Expired), false),
                    Ok(Good { found, .. }) => (Ok(found), true),
                    Err(over) => (Err(over), false),
                },
            })
        })
    });
    let (found, reissued) = replaced.await?;
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
    let signer = app.signer.clone();
    let found = app.db.run(move |conn| Box::pin(async move { look(conn, &signer, &presented).await })).await?;
    let Found { session, user, .. } = found.map_err(SessionError::Over)?.found;
    let access = app.signer.sign_access(&user, &session, Utc::now()).map_err(SessionError::Signing)?;
    Ok((user, access))
}

/// Checks an access token, and that its session and user are still there.
pub async fn validate(app: &App, access: &str) -> Result<Validated, SessionError> {
    let claims = app.signer.verify_access(access).map_err(refused)?;
    let found = app.db.run(move |conn| Box::pin(sessions::find(conn, claims.sid))).await?;
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
    let signer = app.signer.clone();
    let ended = app.db.run(move |conn| {
        Box::pin(async move {
            let by_refresh = match &held {
                Some(presented) => look(conn, &signer, presented).await?,
                None => Err(Over::NoToken),
            };
            let by_access = match (&by_refresh, &claims) {
                (Err(_), Some(claims)) => sessions::find(conn, claims.sid).await?,
                _ => None,
            };
            let found = match by_refresh {
                Ok(good) => good.found,
                // Its session is over by now, which is what was asked for.
                Err(Over::Reused) if scope == LogoutScope::This => return Ok::<_, sqlx::Error>(true),
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
    });
    if ended.await? { Ok(()) } else { Err(SessionError::Over(Over::NoToken)) }
}

/// Ends the session of a refresh token that a new sign-in takes the place of, in the caller's
/// transaction. A token that is not good names no session, and nothing happens.
pub async fn replace_held(conn: &mut PgConnection, signer: &TokenSigner, presented: &str) -> Result<(), sqlx::Error> {
    let Ok(presented) = Presented::read(signer, presented) else {
        return Ok(());
    };
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

fn next_token(signer: &TokenSigner) -> NewToken<'_> {
    let now = Utc::now();
    NewToken {
        jti: Uuid::new_v4(),
        kid: signer.refresh_kid(),
        issued_at: now,
        expires_at: now + signer.settings().refresh_ttl,
    }
}

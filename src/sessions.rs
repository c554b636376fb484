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
//! - The window opens when the new generation can be seen by others, not when it is written: its
//!   COMMIT may hang for minutes (a synchronous standby is away) while the client tries again. And a
//!   token is as old as it was when its request arrived, however long that waited here.
//! - A database that does not answer is never mistaken for a session that is over.
//! - One clock decides, the database's.
//!
//! # Since when a generation can be seen
//!
//! PostgreSQL does not tell when a transaction became visible, so somebody has to say it who knows:
//! the refresh itself, in a statement behind its COMMIT, or else the first request that reads the
//! row. Until then the token before is good. A thief who holds such a token gains what he would have
//! gained a moment earlier, before it was replaced, and not more: his request is the one that reads
//! the row, and opens the window. From then on his and the owner's next turns lie as far apart as
//! ever, and the later one gives both away. He can't bring that state about either: it takes a process
//! or a database that fails between two statements of ours.
//!
//! A token of the replaced service counts as generation 0 of the session its row became.

mod carried;
mod error;
mod look;
mod presented;

use std::time::Duration;

use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    app::App,
    crypto::{SignedToken, TokenError, TokenSigner},
    db::sessions::{self, Found, NewSession, NewToken},
    domain::{AccessClaims, RefreshDecision, Session, User, UserId, UserStatus},
};
use look::{Seen, SeenRefresh, Tokens};

pub use carried::{Arrived, Carried};
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
    /// The database's time when they were handed out.
    pub at: DateTime<Utc>,
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

/// A new access token alone.
#[derive(Debug)]
pub struct Renewed {
    /// Whose it is.
    pub user: User,
    /// The token.
    pub access: SignedToken,
    /// The database's time when it was handed out.
    pub at: DateTime<Utc>,
}

/// Who asks.
#[derive(Debug)]
pub enum SignedIn {
    /// By a good access token.
    ByAccess(User),
    /// By a refresh token, for want of a good access token.
    Renewed(Renewed),
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

impl LogoutScope {
    fn as_str(self) -> &'static str {
        match self {
            LogoutScope::This => "this",
            LogoutScope::Others => "others",
            LogoutScope::All => "all",
        }
    }
}

/// Opens a session in the caller's transaction, which holds the user: see
/// [`hold`](crate::db::users::hold). Beyond [`SESSIONS_PER_USER`] the oldest ends.
pub async fn open(
    conn: &mut PgConnection,
    signer: &TokenSigner,
    session_id: Uuid,
    user_id: UserId,
    user_agent: Option<&str>,
) -> Result<Session, sqlx::Error> {
    let new =
        NewSession { session_id, user_id, token: next_token(signer), life: signer.settings().session_ttl, user_agent };
    let session = sessions::insert(conn, &new).await?;
    keep_within_cap(conn, user_id).await?;
    Ok(session)
}

async fn keep_within_cap(conn: &mut PgConnection, user_id: UserId) -> Result<(), sqlx::Error> {
    let ended = sessions::revoke_oldest(conn, user_id, SESSIONS_PER_USER, "too many sessions").await?;
    if ended > 0 {
        tracing::info!(user.id = %user_id, ended, "the oldest sessions of a user were ended: there were too many");
        metrics::counter!("auth_sessions_capped_total").increment(ended);
    }
    Ok(())
}

/// Both tokens of a session as its row stands, handed out at `now` by the database's clock.
pub fn tokens(
    signer: &TokenSigner,
    user: &User,
    session: &Session,
    now: DateTime<Utc>,
) -> Result<TokenPair, TokenError> {
    Ok(TokenPair { access: signer.sign_access(user, session, now)?, refresh: signer.sign_refresh(session)?, at: now })
}

/// Replaces a refresh token by its successor.
pub async fn refresh(app: &App, carried: &Carried) -> Result<Refreshed, SessionError> {
    let tokens = Tokens::read(&app.signer, carried)?;
    let replaced = match tokens.any() {
        Ok(()) => {
            let signer = app.signer.clone();
            app.db.run(move |conn| Box::pin(async move { replace(conn, &signer, &tokens).await })).await?
        }
        Err(over) => Err(over),
    };
    let outcome = match &replaced {
        Ok((_, true)) => "reissued",
        Ok((_, false)) => "rotated",
        Err(over) => over.code(),
    };
    metrics::counter!("auth_refresh_total", "outcome" => outcome).increment(1);
    let (Found { session, user, now, .. }, reissued) = replaced.map_err(|over| refused("refresh", over))?;
    let tokens = self::tokens(&app.signer, &user, &session, now).map_err(SessionError::Signing)?;
    Ok(Refreshed { user, tokens, reissued })
}

/// The session as it goes on, and whether that had been decided before.
async fn replace(
    conn: &mut PgConnection,
    signer: &TokenSigner,
    tokens: &Tokens,
) -> Result<Result<(Found, bool), Over>, sqlx::Error> {
    // Nearly always there is one token, and it is the current one.
    if let [only] = tokens.refresh.as_slice()
        && let Some(found) = only.replace(conn, signer, tokens.waited()).await?
    {
        say_seen(conn, &found).await;
        return Ok(Ok((found, false)));
    }
    // Another request may always be faster between two statements. The one after it finds what it made.
    for _ in 0..3 {
        let seen = tokens.look(conn, signer.settings().reuse_window).await?;
        if let Err(over) = seen.one_user() {
            return Ok(Err(over));
        }
        let Some(SeenRefresh { presented, found, decision }) = seen.good_refresh().next() else {
            return Ok(Err(seen.refuse(conn).await?));
        };
        if *decision == RefreshDecision::Reissue {
            say_seen(conn, found).await;
            return Ok(Ok((found.clone(), true)));
        }
        if let Some(found) = presented.replace(conn, signer, tokens.waited()).await? {
            say_seen(conn, &found).await;
            return Ok(Ok((found, false)));
        }
    }
    // Current, and yet it can't be replaced: its last second has just gone by.
    Ok(Err(Over::Expired))
}

/// Opens the reuse window of a generation that is known to be committed. A failure is none of the
/// client's: the next request that looks opens it.
async fn say_seen(conn: &mut PgConnection, found: &Found) {
    let session = &found.session;
    if session.generation == 0 || session.rotated_at.is_some() {
        return;
    }
    if let Err(error) = sessions::mark_seen(conn, session.session_id, session.jti).await {
        tracing::warn!(session.id = %session.session_id, %error, "the reuse window of a refresh was not opened yet");
    }
}

/// A new access token, without replacing the refresh token: for those who could not be handed its
/// successor.
pub async fn access_from_refresh(app: &App, carried: &Carried) -> Result<Renewed, SessionError> {
    let tokens = Tokens::read(&app.signer, carried)?;
    tokens.any().map_err(|over| refused("renewal", over))?;
    let reuse_window = app.signer.settings().reuse_window;
    let found = app.db.run(move |conn| {
        Box::pin(async move {
            let seen = tokens.look(conn, reuse_window).await?;
            one_by_refresh(conn, &seen).await
        })
    });
    renewed(app, found.await?.map_err(|over| refused("renewal", over))?)
}

async fn one_by_refresh(conn: &mut PgConnection, seen: &Seen<'_>) -> Result<Result<Found, Over>, sqlx::Error> {
    if let Err(over) = seen.one_user() {
        return Ok(Err(over));
    }
    let good = seen.good_refresh().next().map(|seen| seen.found.clone());
    match good {
        Some(found) => {
            say_seen(conn, &found).await;
            Ok(Ok(found))
        }
        None => Ok(Err(seen.refuse(conn).await?)),
    }
}

fn renewed(app: &App, found: Found) -> Result<Renewed, SessionError> {
    let Found { session, user, now: at, .. } = found;
    let access = app.signer.sign_access(&user, &session, at).map_err(SessionError::Signing)?;
    Ok(Renewed { user, access, at })
}

/// Who asks: by a good access token, else by a refresh token, from which a new access token is made.
pub async fn signed_in(app: &App, carried: &Carried) -> Result<SignedIn, SessionError> {
    let tokens = Tokens::read(&app.signer, carried)?;
    tokens.any().map_err(|over| refused("me", over))?;
    let reuse_window = app.signer.settings().reuse_window;
    let found = app.db.run(move |conn| {
        Box::pin(async move {
            let seen = tokens.look(conn, reuse_window).await?;
            Ok::<_, sqlx::Error>(match seen.one_user().map(|()| seen.access.first()) {
                Ok(Some((_, found))) => Ok((found.clone(), true)),
                Ok(None) => one_by_refresh(conn, &seen).await?.map(|found| (found, false)),
                Err(over) => Err(over),
            })
        })
    });
    match found.await?.map_err(|over| refused("me", over))? {
        (found, true) => Ok(SignedIn::ByAccess(found.user)),
        (found, false) => renewed(app, found).map(SignedIn::Renewed),
    }
}

/// Checks an access token, and that its session and user are still there.
pub async fn validate(app: &App, carried: &Carried) -> Result<Validated, SessionError> {
    let tokens = Tokens::read(&app.signer, carried)?;
    tokens.any().map_err(|over| refused("validation", over))?;
    let reuse_window = app.signer.settings().reuse_window;
    let validated = app.db.run(move |conn| {
        Box::pin(async move {
            let seen = tokens.look(conn, reuse_window).await?;
            Ok::<_, sqlx::Error>(match seen.access.first() {
                Some((claims, found)) => Ok(Validated { claims: (*claims).clone(), user: found.user.clone() }),
                None => Err(seen.refuse(conn).await?),
            })
        })
    });
    validated.await?.map_err(|over| refused("validation", over))
}

/// Ends the sessions that the request's good tokens name, or others of their users.
///
/// A refresh token that was replaced long ago names its session too, but only to end it: it comes
/// from the owner or from a thief.
pub async fn logout(app: &App, carried: &Carried, scope: LogoutScope) -> Result<(), SessionError> {
    let tokens = Tokens::read(&app.signer, carried)?;
    let ended = match tokens.any() {
        Ok(()) => {
            let reuse_window = app.signer.settings().reuse_window;
            app.db.run(move |conn| Box::pin(async move { end(conn, reuse_window, &tokens, scope).await })).await?
        }
        Err(over) => Err(over),
    };
    let outcome = if ended.is_ok() { "ended" } else { "nothing" };
    metrics::counter!("auth_logouts_total", "outcome" => outcome, "scope" => scope.as_str()).increment(1);
    match ended {
        Ok(_) => Ok(()),
        Err(over) => {
            tracing::info!(reason = over.code(), scope = scope.as_str(), "a logout named no session");
            Err(SessionError::Over(Over::NoToken))
        }
    }
}

async fn end(
    conn: &mut PgConnection,
    reuse_window: Duration,
    tokens: &Tokens,
    scope: LogoutScope,
) -> Result<Result<(), Over>, sqlx::Error> {
    let seen = tokens.look(conn, reuse_window).await?;
    let named: Vec<Uuid> = seen.good().map(|found| found.session.session_id).collect();
    let users: Vec<UserId> = seen.good().map(|found| found.user.id).collect();
    if named.is_empty() {
        return Ok(match seen.refuse(conn).await? {
            // Its session is over by now, which is what was asked for.
            Over::Reused if scope == LogoutScope::This => Ok(()),
            over => Err(over),
        });
    }
    let ended = match scope {
        LogoutScope::This => sessions::revoke(conn, &named, "logout").await?,
        LogoutScope::Others => sessions::revoke_all(conn, &users, &named, "logout of others").await?,
        LogoutScope::All => sessions::revoke_all(conn, &users, &[], "logout everywhere").await?,
    };
    for found in seen.good() {
        tracing::info!(
            session.id = %found.session.session_id, user.id = %found.user.id, scope = scope.as_str(), ended,
            "logged out"
        );
    }
    Ok(Ok(()))
}

/// Ends the sessions of the refresh tokens that a new sign-in takes the place of, in the caller's
/// transaction. A token that is not good names no session, and nothing happens.
pub async fn replace_held(conn: &mut PgConnection, signer: &TokenSigner, carried: &Carried) -> Result<(), sqlx::Error> {
    let Ok(tokens) = Tokens::read(signer, carried) else {
        return Ok(());
    };
    let named = tokens.look(conn, signer.settings().reuse_window).await?.named_by_refresh();
    if !named.is_empty() {
        sessions::revoke(conn, &named, "replaced by a new login").await?;
    }
    Ok(())
}

/// The session at `session_id` and its user, if both are still good.
pub async fn live(conn: &mut PgConnection, session_id: Uuid) -> Result<Option<Found>, sqlx::Error> {
    let found = sessions::find(conn, session_id).await?;
    Ok(found.filter(|found| found.session.is_live(found.now) && may_sign_in(&found.user)))
}

/// Counts a refusal. Where a session is known, the log names it already.
fn refused(request: &'static str, over: Over) -> SessionError {
    metrics::counter!("auth_token_refusals_total", "request" => request, "reason" => over.code()).increment(1);
    if matches!(over, Over::Invalid | Over::TwoUsers) {
        tracing::info!(request, reason = over.code(), "tokens were refused");
    }
    SessionError::Over(over)
}

/// Whether this user may have sessions. A pending one may: registration signs in at once.
pub fn may_sign_in(user: &User) -> bool {
    matches!(user.status, UserStatus::Pending | UserStatus::Active)
}

fn next_token(signer: &TokenSigner) -> NewToken<'_> {
    NewToken { jti: Uuid::new_v4(), kid: signer.refresh_kid(), life: signer.settings().refresh_ttl }
}

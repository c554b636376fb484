use std::time::{Duration, Instant};

use chrono::{DateTime, Utc};
use secrecy::ExposeSecret;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Carried, Over, SessionError, may_sign_in, presented::Presented};
use crate::{
    crypto::{TokenError, TokenSigner},
    db::sessions::{self, Found},
    domain::{AccessClaims, RefreshDecision, RequestTime, UserId},
};

/// The tokens of a request that were signed by us.
pub(super) struct Tokens {
    pub access: Vec<AccessClaims>,
    pub refresh: Vec<Presented>,
    arrived: Instant,
    /// Why nothing would be granted without them.
    refusal: Over,
}

impl Tokens {
    pub fn read(signer: &TokenSigner, carried: &Carried) -> Result<Self, SessionError> {
        let mut tokens = Self { access: vec![], refresh: vec![], arrived: carried.arrived, refusal: Over::NoToken };
        for token in &carried.access {
            let claims = signer.verify_access(token.expose_secret());
            tokens.access.extend(tokens.refusal.unless_invalid(claims)?);
        }
        for token in &carried.refresh {
            let presented = Presented::read(signer, token.expose_secret());
            tokens.refresh.extend(tokens.refusal.unless_invalid(presented)?);
        }
        Ok(tokens)
    }

    /// Why nothing is granted, where none of the tokens is ours. No database is needed to say so.
    pub fn any(&self) -> Result<(), Over> {
        if self.access.is_empty() && self.refresh.is_empty() { Err(self.refusal) } else { Ok(()) }
    }

    /// For how long the request has been here.
    pub fn waited(&self) -> Duration {
        self.arrived.elapsed()
    }

    /// Holds each token against the row of its session. Changes nothing.
    pub async fn look(&self, conn: &mut PgConnection, reuse_window: Duration) -> Result<Seen<'_>, sqlx::Error> {
        let mut seen = Seen { access: vec![], refresh: vec![], refusal: self.refusal };
        let mut session_ids: Vec<Uuid> = self.access.iter().map(|claims| claims.sid).collect();
        let mut legacy_hashes = vec![];
        for presented in &self.refresh {
            match presented {
                Presented::Ours { session_id, .. } => session_ids.push(*session_id),
                Presented::Legacy { hash, .. } => legacy_hashes.push(hash.as_slice()),
            }
        }
        let before = self.waited();
        let found = sessions::find_all(conn, &session_ids, &legacy_hashes).await?;
        let after = self.waited();
        let time = |found: &Found| RequestTime {
            arrived_from: found.now - after,
            arrived_by: found.asked_at - before,
            now: found.now,
        };
        for claims in &self.access {
            let own = found.iter().find(|found| found.session.session_id == claims.sid);
            match judge(claims, own.map(|found| (found, time(found)))) {
                Ok(found) => seen.access.push((claims, found)),
                Err(over) => seen.refusal = over,
            }
        }
        for presented in &self.refresh {
            match presented.pick(&found) {
                Some(found) => {
                    let decision = presented.decide(&found, time(&found), reuse_window);
                    seen.add(SeenRefresh { presented, found, decision });
                }
                None => {
                    seen.refusal = gone(presented.expires_at());
                    tracing::info!(reason = seen.refusal.code(), "a refresh token names no session");
                }
            }
        }
        Ok(seen)
    }
}

impl Over {
    /// Notes that a token is none of ours. Anything else is our own fault.
    fn unless_invalid<T>(&mut self, read: Result<T, TokenError>) -> Result<Option<T>, SessionError> {
        match read {
            Ok(read) => Ok(Some(read)),
            Err(TokenError::Invalid) => {
                *self = Over::Invalid;
                Ok(None)
            }
            Err(error) => Err(SessionError::Signing(error)),
        }
    }
}

/// An access token is good for as long as it says, unless its session has been ended. The session's
/// own expiry is the refresh token's.
fn judge(claims: &AccessClaims, found: Option<(&Found, RequestTime)>) -> Result<Found, Over> {
    let expires_at = DateTime::from_timestamp(claims.exp, 0).unwrap_or_default();
    let (found, time) = found.ok_or_else(|| gone(expires_at))?;
    if claims.is_over(time) {
        return Err(Over::Expired);
    }
    if claims.is_early(time) {
        return Err(Over::Invalid);
    }
    let its_own = i64::from(found.user.id.0) == claims.id;
    match its_own && found.session.revoked_at.is_none() && may_sign_in(&found.user) {
        true => Ok(found.clone()),
        false => Err(Over::Ended),
    }
}

/// Why a token without a session is refused. There is no row to take the time from, and nothing hangs
/// on the word.
fn gone(expires_at: DateTime<Utc>) -> Over {
    if expires_at <= Utc::now() { Over::Expired } else { Over::Ended }
}

/// A refresh token, its session, and what to do about it.
pub(super) struct SeenRefresh<'t> {
    pub presented: &'t Presented,
    pub found: Found,
    pub decision: RefreshDecision,
}

/// The tokens of a request, each with its session.
pub(super) struct Seen<'t> {
    /// Those that are good.
    pub access: Vec<(&'t AccessClaims, Found)>,
    /// The latest of each session, good or not.
    refresh: Vec<SeenRefresh<'t>>,
    refusal: Over,
}

impl Seen<'_> {
    /// The refresh tokens that are good, as they came.
    pub fn good_refresh(&self) -> impl Iterator<Item = &SeenRefresh<'_>> {
        self.refresh.iter().filter(|seen| matches!(seen.decision, RefreshDecision::Rotate | RefreshDecision::Reissue))
    }

    /// The sessions of all good tokens.
    pub fn good(&self) -> impl Iterator<Item = &Found> {
        self.access.iter().map(|(_, found)| found).chain(self.good_refresh().map(|seen| &seen.found))
    }

    /// Refuses good tokens of two users.
    pub fn one_user(&self) -> Result<(), Over> {
        let mut users = self.good().map(|found| found.user.id);
        let first: Option<UserId> = users.next();
        if users.all(|user| Some(user) == first) { Ok(()) } else { Err(Over::TwoUsers) }
    }

    /// Why nothing is granted, where no token is good. This is where reuse has its consequence: a
    /// session whose token was used again too late is ended, on its own. Beside a good token a stale
    /// one is only what browsers do.
    pub async fn refuse(&self, conn: &mut PgConnection) -> Result<Over, sqlx::Error> {
        let mut refusal = self.refusal;
        for SeenRefresh { presented, found: Found { session, user, .. }, decision } in &self.refresh {
            let over = match decision {
                RefreshDecision::Rotate | RefreshDecision::Reissue => continue,
                RefreshDecision::Ended | RefreshDecision::Expired => {
                    let over = if *decision == RefreshDecision::Ended { Over::Ended } else { Over::Expired };
                    tracing::info!(
                        session.id = %session.session_id, user.id = %user.id, reason = over.code(),
                        "a refresh token was refused"
                    );
                    over
                }
                RefreshDecision::AheadOfRecord => {
                    tracing::error!(
                        session.id = %session.session_id, user.id = %user.id, recorded = session.generation,
                        "a refresh token is ahead of its session's record: was an old backup restored?"
                    );
                    Over::AheadOfRecord
                }
                RefreshDecision::Reused => {
                    sessions::revoke(conn, &[session.session_id], "refresh token reused").await?;
                    tracing::warn!(
                        session.id = %session.session_id, user.id = %user.id,
                        current = session.generation, presented = presented.generation(),
                        "a refresh token that had been replaced was used again; its session is ended"
                    );
                    metrics::counter!("auth_refresh_reuse_total").increment(1);
                    Over::Reused
                }
            };
            // An end that was made now is told before one that others made.
            if refusal != Over::Reused {
                refusal = over;
            }
        }
        Ok(refusal)
    }

    /// The sessions that refresh tokens name, current or not, as long as they are not over.
    pub fn named_by_refresh(&self) -> Vec<Uuid> {
        let live = self.refresh.iter().filter(|seen| {
            matches!(seen.decision, RefreshDecision::Rotate | RefreshDecision::Reissue | RefreshDecision::Reused)
        });
        live.map(|seen| seen.found.session.session_id).collect()
    }
}

impl<'t> Seen<'t> {
    /// Of several generations of one session the latest counts: whoever has it is no thief for
    /// having an earlier one too.
    fn add(&mut self, new: SeenRefresh<'t>) {
        let id = new.found.session.session_id;
        match self.refresh.iter_mut().find(|seen| seen.found.session.session_id == id) {
            Some(seen) if seen.presented.generation() < new.presented.generation() => *seen = new,
            Some(_) => {}
            None => self.refresh.push(new),
        }
    }
}

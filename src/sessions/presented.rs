use std::time::Duration;

use aws_lc_rs::digest;
use chrono::Utc;
use sqlx::PgConnection;
use uuid::Uuid;

use super::{Over, SessionError, error::refused, may_sign_in, next_token};
use crate::{
    crypto::{TokenError, TokenSigner},
    db::sessions::{self, Found},
    domain::{RefreshDecision, UserId},
};

/// A refresh token whose signature is good.
pub(super) enum Presented {
    /// One of ours.
    Ours { session_id: Uuid, generation: i32, jti: Uuid, user_id: String },
    /// One the replaced service had signed with the same key, by its SHA-256.
    Legacy { hash: Vec<u8>, user_id: UserId },
}

impl Presented {
    pub fn read(signer: &TokenSigner, token: &str) -> Result<Self, SessionError> {
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

    pub async fn find(&self, conn: &mut PgConnection) -> Result<Option<Found>, sqlx::Error> {
        match self {
            Presented::Ours { session_id, .. } => sessions::find(conn, *session_id).await,
            Presented::Legacy { hash, .. } => sessions::find_legacy(conn, hash).await,
        }
    }

    pub async fn replace(&self, conn: &mut PgConnection, signer: &TokenSigner) -> Result<Option<Found>, sqlx::Error> {
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
pub(super) struct Good {
    pub found: Found,
    /// The token is the current one, not the one before it.
    pub current: bool,
}

/// Looks at the session of a token that is not being replaced (now, or any more). A session whose
/// token was used again too late is ended here, on its own: the statement commits by itself.
pub(super) async fn look(
    conn: &mut PgConnection,
    signer: &TokenSigner,
    presented: &Presented,
) -> Result<Result<Good, Over>, sqlx::Error> {
    let Some(found) = presented.find(conn).await? else {
        return Ok(Err(Over::Ended));
    };
    match presented.decide(&found, signer.settings().reuse_window) {
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

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;
    use crate::domain::{Session, User, UserStatus};

    const WINDOW: Duration = Duration::from_secs(30);

    /// Refreshed twice, the last time at 100.
    fn found(status: UserStatus) -> Found {
        let at = |seconds: i64| DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range");
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

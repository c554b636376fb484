use std::time::Duration;

use aws_lc_rs::digest;
use chrono::{DateTime, Utc};
use sqlx::PgConnection;
use uuid::Uuid;

use super::{keep_within_cap, may_sign_in, next_token};
use crate::{
    crypto::{TokenError, TokenSigner},
    db::sessions::{self, Found, LegacyToken},
    domain::{RefreshDecision, RequestTime, UserId},
};

/// A refresh token whose signature is good.
#[derive(Debug)]
pub(super) enum Presented {
    /// One of ours.
    Ours { session_id: Uuid, generation: i32, jti: Uuid, user_id: String, expires_at: DateTime<Utc> },
    /// One the replaced service had signed with the same key, by its SHA-256.
    Legacy { hash: Vec<u8>, user_id: UserId, expires_at: DateTime<Utc> },
}

impl Presented {
    pub fn read(signer: &TokenSigner, token: &str) -> Result<Self, TokenError> {
        let at = |seconds| DateTime::from_timestamp(seconds, 0).ok_or(TokenError::Invalid);
        if let Ok(claims) = signer.verify_refresh(token) {
            return Ok(Presented::Ours {
                session_id: claims.sid,
                generation: claims.generation,
                jti: claims.jti,
                user_id: claims.sub,
                expires_at: at(claims.exp)?,
            });
        }
        let claims = signer.verify_legacy_refresh(token)?;
        Ok(Presented::Legacy {
            hash: digest::digest(&digest::SHA256, token.as_bytes()).as_ref().to_vec(),
            user_id: UserId(i32::try_from(claims.user_id).map_err(|_| TokenError::Invalid)?),
            expires_at: at(claims.exp)?,
        })
    }

    pub fn generation(&self) -> i32 {
        match self {
            Presented::Ours { generation, .. } => *generation,
            Presented::Legacy { .. } => 0,
        }
    }

    pub fn expires_at(&self) -> DateTime<Utc> {
        match self {
            Presented::Ours { expires_at, .. } | Presented::Legacy { expires_at, .. } => *expires_at,
        }
    }

    /// Its session, out of those that were found.
    pub fn pick(&self, found: &[Found]) -> Option<Found> {
        let mut own = found.iter().filter(|found| match self {
            Presented::Ours { session_id, .. } => found.session.session_id == *session_id,
            Presented::Legacy { hash, .. } => found.legacy_hash.as_ref() == Some(hash),
        });
        let mut found = own.next()?.clone();
        if let Presented::Legacy { expires_at, .. } = self
            && found.session.generation == 0
        {
            // Not exchanged yet. The dates the row was adopted with say nothing about the token.
            (found.session.expires_at, found.session.absolute_expires_at) = (*expires_at, *expires_at);
        }
        Some(found)
    }

    pub async fn replace(
        &self,
        conn: &mut PgConnection,
        signer: &TokenSigner,
        waited: Duration,
    ) -> Result<Option<Found>, sqlx::Error> {
        let next = next_token(signer);
        match self {
            Presented::Ours { session_id, generation, jti, .. } => {
                sessions::rotate(conn, *session_id, *generation, *jti, &next, waited).await
            }
            Presented::Legacy { hash, user_id, expires_at } => {
                let token = LegacyToken { hash, user_id: *user_id, expires_at: *expires_at };
                let exchanged = sessions::exchange(conn, token, &next, signer.settings().session_ttl, waited).await?;
                // The replaced service knew no cap.
                if exchanged.is_some() {
                    keep_within_cap(conn, *user_id).await?;
                }
                Ok(exchanged)
            }
        }
    }

    pub fn decide(&self, found: &Found, time: RequestTime, reuse_window: Duration) -> RefreshDecision {
        let Found { session, user, .. } = found;
        let its_own = match self {
            Presented::Ours { user_id, .. } => *user_id == user.id.to_string(),
            Presented::Legacy { user_id, .. } => *user_id == user.id,
        };
        if !its_own || !may_sign_in(user) {
            return RefreshDecision::Ended;
        }
        let decision = match self {
            // The right generation by count alone: a restored backup went another way from there.
            Presented::Ours { generation, jti, .. }
                if *generation == session.generation && *jti != session.jti && session.is_live(time.now) =>
            {
                RefreshDecision::AheadOfRecord
            }
            _ => session.on_refresh(self.generation(), time, reuse_window),
        };
        match decision {
            // An old token that turns up somewhere has nothing to say about its session.
            RefreshDecision::Reused | RefreshDecision::Ended
                if session.revoked_at.is_none() && self.expires_at() <= time.arrived_from =>
            {
                RefreshDecision::Expired
            }
            decision => decision,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::{Session, User, UserStatus};

    const WINDOW: Duration = Duration::from_secs(30);

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range")
    }

    fn when(seconds: i64) -> RequestTime {
        RequestTime { arrived_from: at(seconds), arrived_by: at(seconds), now: at(seconds) }
    }

    /// Refreshed twice, the last time at 100.
    fn found(status: UserStatus) -> Found {
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
                earlier_rotations: vec![],
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
            legacy_hash: Some(vec![1]),
            asked_at: at(110),
            now: at(110),
        }
    }

    fn ours(generation: i32, jti: u128) -> Presented {
        Presented::Ours {
            session_id: Uuid::from_u128(1),
            generation,
            jti: Uuid::from_u128(jti),
            user_id: "7".to_owned(),
            expires_at: at(900),
        }
    }

    fn legacy(user_id: i32) -> Presented {
        Presented::Legacy { hash: vec![1], user_id: UserId(user_id), expires_at: at(900) }
    }

    #[test]
    fn the_current_token_is_replaced_and_the_one_before_it_forgiven() {
        let found = found(UserStatus::Active);
        assert_eq!(ours(2, 2).decide(&found, when(110), WINDOW), RefreshDecision::Rotate);
        assert_eq!(ours(1, 9).decide(&found, when(110), WINDOW), RefreshDecision::Reissue);
        assert_eq!(ours(0, 9).decide(&found, when(110), WINDOW), RefreshDecision::Reused);
    }

    #[test]
    fn a_generation_that_counts_right_but_has_another_id_is_from_a_lost_history() {
        assert_eq!(ours(2, 9).decide(&found(UserStatus::Active), when(110), WINDOW), RefreshDecision::AheadOfRecord);
    }

    #[test]
    fn a_user_who_is_leaving_refreshes_nothing_and_a_pending_one_does() {
        assert_eq!(ours(2, 2).decide(&found(UserStatus::Closing), when(110), WINDOW), RefreshDecision::Ended);
        assert_eq!(ours(2, 2).decide(&found(UserStatus::Pending), when(110), WINDOW), RefreshDecision::Rotate);
    }

    #[test]
    fn an_old_token_that_turns_up_after_its_time_ends_nothing() {
        let found = found(UserStatus::Active);
        assert_eq!(ours(0, 9).decide(&found, when(899), WINDOW), RefreshDecision::Reused);
        assert_eq!(ours(0, 9).decide(&found, when(900), WINDOW), RefreshDecision::Expired);
        assert_eq!(ours(2, 2).decide(&found, when(999), WINDOW), RefreshDecision::Rotate, "the row decides");
        assert_eq!(ours(2, 2).decide(&found, when(1000), WINDOW), RefreshDecision::Expired);
    }

    #[test]
    fn an_adopted_token_is_good_until_its_own_expiry_and_then_a_generation_like_any_other() {
        let mut adopted = found(UserStatus::Active);
        (adopted.session.generation, adopted.session.rotated_at) = (0, None);
        // What the row was adopted with says nothing about the token.
        (adopted.session.expires_at, adopted.session.absolute_expires_at) = (at(50), at(60));
        let adopted = legacy(7).pick(&[adopted]).expect("its session");
        assert_eq!(adopted.session.absolute_expires_at, at(900), "no access token ends before it begins");
        assert_eq!(legacy(7).decide(&adopted, when(110), WINDOW), RefreshDecision::Rotate);
        assert_eq!(legacy(7).decide(&adopted, when(900), WINDOW), RefreshDecision::Expired);
        assert_eq!(legacy(8).decide(&adopted, when(110), WINDOW), RefreshDecision::Ended);

        let mut exchanged = found(UserStatus::Active);
        exchanged.session.generation = 1;
        assert_eq!(legacy(7).decide(&exchanged, when(110), WINDOW), RefreshDecision::Reissue);
        assert_eq!(legacy(7).decide(&exchanged, when(130), WINDOW), RefreshDecision::Reused);
    }
}

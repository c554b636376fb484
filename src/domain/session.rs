use std::time::Duration;

use chrono::{DateTime, Utc};
use uuid::Uuid;

use super::UserId;

/// One signed-in device, and the recipe of its current refresh token.
///
/// A signature with RS256 over the same bytes is the same signature, so the current token can be
/// made anew from this row whenever it is needed. Nothing that could be presented is stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Session {
    /// The row's number.
    pub id: i32,
    /// The name of the session outside the database.
    pub session_id: Uuid,
    /// Whose it is.
    pub user_id: UserId,
    /// How many times it was refreshed.
    pub generation: i32,
    /// The id of the current refresh token.
    pub jti: Uuid,
    /// The key that signs the current refresh token.
    pub kid: String,
    /// When the current refresh token was made.
    pub issued_at: DateTime<Utc>,
    /// When the current refresh token, and with it an idle session, ends.
    pub expires_at: DateTime<Utc>,
    /// When the session ends, however often it is refreshed.
    pub absolute_expires_at: DateTime<Utc>,
    /// When it was last refreshed.
    pub rotated_at: Option<DateTime<Utc>>,
    /// When it was ended before its time.
    pub revoked_at: Option<DateTime<Utc>>,
    /// Why.
    pub revoked_reason: Option<String>,
}

/// What to do with a refresh token whose signature is good.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RefreshDecision {
    /// It is the current one: the session moves on to the next generation.
    Rotate,
    /// It was current a moment ago, and its owner raced itself or never got the answer: give the
    /// current token once more.
    Reissue,
    /// It was replaced long ago, so two parties hold this session: end it.
    Reused,
    /// Its generation is yet to come, so the database has lost something (a restored backup).
    /// Refused and reported; the session itself has done nothing wrong.
    AheadOfRecord,
    /// The session is over.
    Ended,
}

impl Session {
    /// Decides about a refresh token of `presented_generation`.
    pub fn on_refresh(&self, presented_generation: i32, now: DateTime<Utc>, reuse_window: Duration) -> RefreshDecision {
        if !self.is_live(now) {
            return RefreshDecision::Ended;
        }
        match i64::from(self.generation) - i64::from(presented_generation) {
            0 => RefreshDecision::Rotate,
            // "One behind" alone would let a thief and the owner take turns for ever; with a
            // window the later of the two gives both away.
            1 if self.rotated_at.is_some_and(|at| now < at + reuse_window) => RefreshDecision::Reissue,
            ..0 => RefreshDecision::AheadOfRecord,
            1.. => RefreshDecision::Reused,
        }
    }

    /// Neither ended nor expired.
    pub fn is_live(&self, now: DateTime<Utc>) -> bool {
        self.revoked_at.is_none() && now < self.expires_at && now < self.absolute_expires_at
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const WINDOW: Duration = Duration::from_secs(30);
    const IDLE: Duration = Duration::from_secs(7 * 24 * 3600);

    fn at(seconds: i64) -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range")
    }

    /// Signed in at 0, refreshed `generation` times, last at `rotated_at`.
    fn session(generation: i32, rotated_at: Option<i64>) -> Session {
        Session {
            id: 1,
            session_id: Uuid::nil(),
            user_id: UserId(7),
            generation,
            jti: Uuid::nil(),
            kid: "key".into(),
            issued_at: at(rotated_at.unwrap_or(0)),
            expires_at: at(rotated_at.unwrap_or(0)) + IDLE,
            absolute_expires_at: at(30 * 24 * 3600),
            rotated_at: rotated_at.map(at),
            revoked_at: None,
            revoked_reason: None,
        }
    }

    /// What the guarded statement does to the row.
    fn rotate(session: &mut Session, now: DateTime<Utc>) {
        session.generation += 1;
        session.rotated_at = Some(now);
        session.issued_at = now;
        session.expires_at = (now + IDLE).min(session.absolute_expires_at);
    }

    #[test]
    fn the_current_token_moves_the_session_on() {
        assert_eq!(session(0, None).on_refresh(0, at(5), WINDOW), RefreshDecision::Rotate);
        assert_eq!(session(4, Some(60)).on_refresh(4, at(61), WINDOW), RefreshDecision::Rotate);
    }

    #[test]
    fn a_lost_answer_can_be_asked_for_again_within_the_window() {
        let session = session(3, Some(100));
        for (now, expected) in [
            (100, RefreshDecision::Reissue),
            (101, RefreshDecision::Reissue),
            (129, RefreshDecision::Reissue),
            (130, RefreshDecision::Reused),
            (10_000, RefreshDecision::Reused),
        ] {
            assert_eq!(session.on_refresh(2, at(now), WINDOW), expected, "at {now}");
        }
    }

    #[test]
    fn two_behind_is_a_reuse_even_within_the_window() {
        assert_eq!(session(3, Some(100)).on_refresh(1, at(101), WINDOW), RefreshDecision::Reused);
        assert_eq!(session(3, Some(100)).on_refresh(i32::MIN, at(101), WINDOW), RefreshDecision::Reused);
    }

    #[test]
    fn a_window_of_zero_forgives_nothing() {
        assert_eq!(session(3, Some(100)).on_refresh(2, at(100), Duration::ZERO), RefreshDecision::Reused);
    }

    #[test]
    fn a_generation_the_database_has_lost_does_not_end_the_session() {
        assert_eq!(session(1, Some(9)).on_refresh(4, at(10), WINDOW), RefreshDecision::AheadOfRecord);
    }

    #[test]
    fn an_ended_or_expired_session_refreshes_nothing() {
        let mut revoked = session(1, Some(9));
        revoked.revoked_at = Some(at(10));
        let mut idle = session(1, Some(9));
        idle.expires_at = at(20);
        let mut old = session(1, Some(9));
        old.absolute_expires_at = at(20);
        for ended in [revoked, idle, old] {
            for generation in 0..3 {
                assert_eq!(ended.on_refresh(generation, at(20), WINDOW), RefreshDecision::Ended);
            }
        }
    }

    #[test]
    fn refreshing_goes_on_to_the_absolute_end_and_no_further() {
        let mut session = session(0, None);
        let mut now = at(0);
        while session.is_live(now) {
            rotate(&mut session, now);
            assert!(session.expires_at <= session.absolute_expires_at);
            now += Duration::from_secs(24 * 3600);
        }
        assert_eq!(now, session.absolute_expires_at);
    }

    #[test]
    fn a_thief_and_the_owner_cannot_take_turns_for_ever() {
        let mut session = session(0, None);
        let (mut owner, mut thief) = (0, 0);
        let mut now = at(0);
        for turn in 0.. {
            let holder = if turn % 2 == 0 { &mut owner } else { &mut thief };
            match session.on_refresh(*holder, now, WINDOW) {
                RefreshDecision::Rotate => rotate(&mut session, now),
                RefreshDecision::Reissue => {}
                decision => {
                    assert_eq!(decision, RefreshDecision::Reused);
                    assert!(turn <= 2, "noticed only at turn {turn}");
                    break;
                }
            }
            *holder = session.generation;
            now += WINDOW + Duration::from_secs(1);
        }
    }

    proptest! {
        /// One honest client: it refreshes, may lose the answer, and then asks again within the
        /// window. Whatever the order, it is never signed out.
        #[test]
        fn who_retries_within_the_window_is_never_signed_out(
            steps in prop::collection::vec((any::<bool>(), 0u64..30), 1..200)
        ) {
            let mut session = session(0, None);
            let mut held = 0;
            let mut now = at(0);
            for (answer_lost, wait) in steps {
                now += Duration::from_secs(wait);
                match session.on_refresh(held, now, WINDOW) {
                    RefreshDecision::Rotate => rotate(&mut session, now),
                    RefreshDecision::Reissue => {}
                    decision => prop_assert!(false, "{decision:?}"),
                }
                if !answer_lost || session.rotated_at != Some(now) {
                    held = session.generation;
                }
            }
        }
    }
}

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
    /// When the current generation was first known to be visible to others. `None` after a refresh
    /// whose COMMIT nobody has seen the answer of yet.
    pub rotated_at: Option<DateTime<Utc>>,
    /// The same of the generations before it, newest first; only a few are kept.
    pub earlier_rotations: Vec<DateTime<Utc>>,
    /// When it was ended before its time.
    pub revoked_at: Option<DateTime<Utc>>,
    /// Why.
    pub revoked_reason: Option<String>,
}

/// When a request came, and when it is decided about, by the database's clock.
///
/// A request may wait here for a lock, a connection or a COMMIT. That is not the client's doing: what
/// counts is the age its token had when it arrived. The database's clock is read once, in the answer
/// to a statement, so the arrival is known only as a span: as long as that statement took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RequestTime {
    /// It came no earlier than this.
    pub arrived_from: DateTime<Utc>,
    /// It came no later than this.
    pub arrived_by: DateTime<Utc>,
    /// It is decided about now.
    pub now: DateTime<Utc>,
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
    /// Its time had passed when it came. Old tokens end nothing.
    Expired,
    /// Its generation is yet to come, so the database has lost something (a restored backup).
    /// Refused and reported; the session itself has done nothing wrong.
    AheadOfRecord,
    /// The session is over.
    Ended,
}

impl Session {
    /// Decides about a refresh token of `presented_generation`.
    ///
    /// A token that was replaced gets the current one again
    ///
    /// - if it was still the current one when it arrived, or nobody has seen its successor yet. The
    ///   second lasts until the first request that looks: it starts the window. It takes a process
    ///   or a database that fails between a COMMIT and the statement behind it to get there;
    /// - if it is the last one that was replaced, and arrived within `reuse_window` of the moment
    ///   from which its successor could be seen.
    pub fn on_refresh(&self, presented_generation: i32, time: RequestTime, reuse_window: Duration) -> RefreshDecision {
        let expired = time.arrived_from >= self.expires_at || time.now >= self.absolute_expires_at;
        if self.revoked_at.is_some() || expired {
            return RefreshDecision::Ended;
        }
        let behind = i64::from(self.generation) - i64::from(presented_generation);
        match (behind, self.replaced_at(behind)) {
            (0, _) => RefreshDecision::Rotate,
            (..0, _) => RefreshDecision::AheadOfRecord,
            (1, None) => RefreshDecision::Reissue,
            (_, Some(at)) if time.arrived_by < at => RefreshDecision::Reissue,
            // "One behind" alone would let a thief and the owner take turns for ever; with a
            // window the later of the two gives both away.
            (1, Some(at)) if !reuse_window.is_zero() && time.arrived_from < at + reuse_window => {
                RefreshDecision::Reissue
            }
            _ => RefreshDecision::Reused,
        }
    }

    /// When the token that is so many generations behind was seen to be replaced.
    fn replaced_at(&self, behind: i64) -> Option<DateTime<Utc>> {
        match behind {
            1 => self.rotated_at,
            behind => self.earlier_rotations.get(usize::try_from(behind - 2).ok()?).copied(),
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
            earlier_rotations: vec![],
            revoked_at: None,
            revoked_reason: None,
        }
    }

    /// Decided about as soon as it came.
    fn when(seconds: i64) -> RequestTime {
        RequestTime { arrived_from: at(seconds), arrived_by: at(seconds), now: at(seconds) }
    }

    /// What the guarded statement does to the row, seen at once.
    fn rotate(session: &mut Session, now: DateTime<Utc>) {
        if session.generation > 0 {
            session.earlier_rotations.insert(0, session.rotated_at.unwrap_or(now));
        }
        session.generation += 1;
        session.rotated_at = Some(now);
        session.issued_at = now;
        session.expires_at = (now + IDLE).min(session.absolute_expires_at);
    }

    #[test]
    fn the_current_token_moves_the_session_on() {
        assert_eq!(session(0, None).on_refresh(0, when(5), WINDOW), RefreshDecision::Rotate);
        assert_eq!(session(4, Some(60)).on_refresh(4, when(61), WINDOW), RefreshDecision::Rotate);
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
            assert_eq!(session.on_refresh(2, when(now), WINDOW), expected, "at {now}");
        }
    }

    #[test]
    fn two_behind_is_a_reuse_even_within_the_window() {
        assert_eq!(session(3, Some(100)).on_refresh(1, when(101), WINDOW), RefreshDecision::Reused);
        assert_eq!(session(3, Some(100)).on_refresh(i32::MIN, when(101), WINDOW), RefreshDecision::Reused);
    }

    #[test]
    fn a_window_of_zero_forgives_nothing_but_what_came_before_the_replacement() {
        assert_eq!(session(3, Some(100)).on_refresh(2, when(100), Duration::ZERO), RefreshDecision::Reused);
        assert_eq!(session(3, Some(100)).on_refresh(2, when(99), Duration::ZERO), RefreshDecision::Reissue);
    }

    #[test]
    fn what_counts_is_the_age_at_arrival_however_long_the_request_waited_here() {
        let session = session(3, Some(100));
        for (arrived, expected) in
            [(90, RefreshDecision::Reissue), (129, RefreshDecision::Reissue), (130, RefreshDecision::Reused)]
        {
            let time = RequestTime { now: at(500), ..when(arrived) };
            assert_eq!(session.on_refresh(2, time, WINDOW), expected, "at {arrived}");
        }
        // A stalled look leaves a span, and its earlier end counts.
        let time = RequestTime { arrived_from: at(129), arrived_by: at(135), now: at(135) };
        assert_eq!(session.on_refresh(2, time, WINDOW), RefreshDecision::Reissue);
        assert_eq!(session.on_refresh(2, time, Duration::ZERO), RefreshDecision::Reused);
    }

    #[test]
    fn a_token_that_was_current_when_it_arrived_is_no_reuse_however_far_behind_it_is_now() {
        let mut session = session(0, None);
        for now in [10, 20, 30] {
            rotate(&mut session, at(now));
        }
        for (generation, arrived, expected) in [
            (0, 9, RefreshDecision::Reissue),
            (0, 10, RefreshDecision::Reused),
            (1, 19, RefreshDecision::Reissue),
            (1, 20, RefreshDecision::Reused),
            (2, 29, RefreshDecision::Reissue),
            (2, 30, RefreshDecision::Reissue),
        ] {
            let time = RequestTime { now: at(40), ..when(arrived) };
            assert_eq!(session.on_refresh(generation, time, WINDOW), expected, "{generation} at {arrived}");
        }
        session.earlier_rotations.clear();
        assert_eq!(session.on_refresh(1, when(5), WINDOW), RefreshDecision::Reused, "nothing is known about it");
    }

    #[test]
    fn the_window_opens_when_somebody_has_seen_the_successor() {
        let mut session = session(3, Some(100));
        session.rotated_at = None;
        assert_eq!(session.on_refresh(2, when(10_000), WINDOW), RefreshDecision::Reissue);
        assert_eq!(session.on_refresh(1, when(10_000), WINDOW), RefreshDecision::Reused);
        session.rotated_at = Some(at(10_000));
        assert_eq!(session.on_refresh(2, when(10_029), WINDOW), RefreshDecision::Reissue);
        assert_eq!(session.on_refresh(2, when(10_030), WINDOW), RefreshDecision::Reused);
    }

    #[test]
    fn a_token_that_came_in_its_last_second_is_good_and_the_end_of_the_session_is_not_put_off() {
        let session = session(1, Some(9));
        let idle_end = 9 + 7 * 24 * 3600;
        let time = RequestTime { now: at(idle_end + 5), ..when(idle_end - 1) };
        assert_eq!(session.on_refresh(1, time, WINDOW), RefreshDecision::Rotate);
        let over = RequestTime { now: session.absolute_expires_at, ..when(idle_end - 1) };
        assert_eq!(session.on_refresh(1, over, WINDOW), RefreshDecision::Ended);
    }

    #[test]
    fn a_generation_the_database_has_lost_does_not_end_the_session() {
        assert_eq!(session(1, Some(9)).on_refresh(4, when(10), WINDOW), RefreshDecision::AheadOfRecord);
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
                assert_eq!(ended.on_refresh(generation, when(20), WINDOW), RefreshDecision::Ended);
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
            match session.on_refresh(*holder, RequestTime { arrived_from: now, arrived_by: now, now }, WINDOW) {
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
                match session.on_refresh(held, RequestTime { arrived_from: now, arrived_by: now, now }, WINDOW) {
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

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use serde_json::json;

use crate::{
    app::App,
    db::audit::{self, NewLine, Outcome},
    domain::UserId,
};

/// Failures of one account are counted together for so long.
const PERIOD: Duration = Duration::from_secs(15 * 60);
/// Accounts that are counted at once. What comes beyond is in the log and in the metric.
const ACCOUNTS: usize = 10_000;

/// Why a password let nobody in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Failure {
    /// Nobody has that name.
    UnknownUser,
    /// It is another one.
    WrongPassword,
    /// The account is being deleted.
    MayNotSignIn,
    /// The account was deleted, or its password changed, while the password was checked.
    ChangedMeanwhile,
}

impl Failure {
    fn as_str(self) -> &'static str {
        match self {
            Failure::UnknownUser => "unknown_user",
            Failure::WrongPassword => "wrong_password",
            Failure::MayNotSignIn => "may_not_sign_in",
            Failure::ChangedMeanwhile => "changed_meanwhile",
        }
    }
}

/// How often a password was wrong, by account. An attempt leaves a line in the log and counts in the
/// metric; the tenth, hundredth and thousandth at one account are for an operator's eyes and leave
/// one in the audit log too. So much is bounded, whoever tries however often.
#[derive(Debug, Default)]
pub struct FailedLogins(Mutex<HashMap<UserId, (Instant, u64)>>);

impl FailedLogins {
    /// Counts one. Answers with the count when it is one to be told.
    fn count(&self, user_id: UserId, now: Instant) -> Option<u64> {
        let mut accounts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_over = |since: Instant| now.saturating_duration_since(since) >= PERIOD;
        if accounts.len() >= ACCOUNTS && !accounts.contains_key(&user_id) {
            accounts.retain(|_, (since, _)| !is_over(*since));
            if accounts.len() >= ACCOUNTS {
                return None;
            }
        }
        let (since, count) = accounts.entry(user_id).or_insert((now, 0));
        if is_over(*since) {
            (*since, *count) = (now, 0);
        }
        *count += 1;
        (*count >= 10 && 10_u64.pow(count.ilog10()) == *count).then_some(*count)
    }
}

/// Leaves a trace of a password that let nobody in. What was typed is not in it: it may be a password
/// in the wrong field.
pub(super) fn note(app: &App, user_id: Option<UserId>, why: Failure) {
    metrics::counter!("auth_login_failures_total", "reason" => why.as_str()).increment(1);
    let Some(user_id) = user_id else {
        tracing::info!(reason = why.as_str(), "a password let nobody in");
        return;
    };
    tracing::info!(reason = why.as_str(), user.id = %user_id, "a password let nobody in");
    if let Some(count) = app.failed_logins.count(user_id, Instant::now()) {
        tracing::warn!(user.id = %user_id, count, "many passwords were tried at one account: is somebody guessing?");
        // Not waited for: how long an answer takes must not tell that there is such an account.
        tokio::spawn(tell_operators(app.clone(), user_id, count));
    }
}

async fn tell_operators(app: App, user_id: UserId, count: u64) {
    let told = app.db.run(move |conn| {
        Box::pin(async move {
            let line = NewLine {
                actor: "service",
                action: "account.failed-logins",
                target: &format!("user {user_id}"),
                reason: None,
                outcome: Outcome::Refused,
                detail: &json!({ "count": count, "withinSeconds": PERIOD.as_secs() }),
            };
            audit::insert(conn, &line).await
        })
    });
    if let Err(error) = told.await {
        tracing::warn!(user.id = %user_id, %error, "failed logins are missing from the audit log");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tenth_hundredth_and_thousandth_failure_of_an_account_are_told() {
        let failed = FailedLogins::default();
        let now = Instant::now();
        let told: Vec<u64> = (0..5000).filter_map(|_| failed.count(UserId(1), now)).collect();
        assert_eq!(told, [10, 100, 1000]);
        assert_eq!(failed.count(UserId(2), now), None);
        let later = now + PERIOD;
        assert_eq!((0..20).filter_map(|_| failed.count(UserId(1), later)).collect::<Vec<_>>(), [10]);
    }

    #[test]
    fn no_more_accounts_are_counted_than_there_is_room_for() {
        let failed = FailedLogins::default();
        let now = Instant::now();
        for id in 0..ACCOUNTS + 10 {
            failed.count(UserId(id as i32), now);
        }
        assert_eq!(failed.0.lock().expect("not poisoned").len(), ACCOUNTS);
        failed.count(UserId(-1), now + PERIOD);
        assert_eq!(failed.0.lock().expect("not poisoned").len(), 1, "those whose time is over make room");
    }
}

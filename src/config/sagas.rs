use std::time::Duration;

use axum::http::Uri;

use super::vars::{Vars, length};

/// The sagas and the service that takes part in them.
#[derive(Debug, Clone)]
pub struct SagaConfig {
    /// How long a published command may go unanswered before the participant is asked.
    pub step_timeout: Duration,
    /// The first wait between two questions to a participant that does not answer; it doubles.
    pub resolve_backoff: Duration,
    /// How many such questions before the saga is stuck.
    pub resolve_attempts: u32,
    /// How far Kafka's clock and the database's may be apart.
    pub reply_clock_tolerance: Duration,
    /// What silence means where nobody can be asked.
    pub silence_policy: SilencePolicy,
    /// The participant's name, as its replies give it.
    pub participant: String,
    /// Where to ask it, as a URL; `None` where it can't be asked.
    pub user_service_url: Option<String>,
}

/// What a saga makes of silence, where the participant can't be asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SilencePolicy {
    /// It waits for an operator.
    Stuck,
    /// It completes, and says that nobody confirmed it.
    AssumeCompleted,
}

impl SagaConfig {
    pub(super) fn read(vars: &mut Vars) -> Self {
        let (millis, seconds) = (Duration::from_millis, Duration::from_secs);
        let step_timeout = vars.duration("SAGA_STEP_TIMEOUT", seconds(30), millis(100)..=seconds(86_400));
        let resolve_backoff = vars.duration("SAGA_RESOLVE_BACKOFF", seconds(5), millis(10)..=seconds(300));
        let resolve_attempts = vars.number("SAGA_RESOLVE_ATTEMPTS", 10, 1..=10_000);
        let reply_clock_tolerance = vars.duration("REPLY_CLOCK_TOLERANCE", seconds(60), seconds(0)..=seconds(3600));
        let silence_policy = vars.choice(
            "SAGA_SILENCE_POLICY",
            &[("stuck", SilencePolicy::Stuck), ("assume-completed", SilencePolicy::AssumeCompleted)],
        );
        let participant = vars.text("SAGA_PARTICIPANT", "user-service");
        let user_service_url = user_service_url(vars);
        if user_service_url.is_some() && vars.is_set("SAGA_SILENCE_POLICY") {
            vars.warn("SAGA_SILENCE_POLICY has no effect: USER_SERVICE_GRPC_URL is set, so user-service is asked.");
        }
        Self {
            step_timeout,
            resolve_backoff,
            resolve_attempts,
            reply_clock_tolerance,
            silence_policy,
            participant,
            user_service_url,
        }
    }
}

/// The original gives `host:port`; a scheme is ours to add.
fn user_service_url(vars: &mut Vars) -> Option<String> {
    let raw = vars.secret_in("USER_SERVICE_GRPC_URL", |raw| address(raw).unwrap_or_else(|| "(hidden)".to_owned()))?;
    let url = address(&raw);
    if url.is_none() {
        vars.reject(
            "USER_SERVICE_GRPC_URL",
            format!("is no address {}", length(&raw)),
            "Give host:port or a URL, for example USER_SERVICE_GRPC_URL=http://user-service:50052, \
             or leave it out and choose a SAGA_SILENCE_POLICY",
        );
    }
    url
}

/// The address alone: no user, no password, no path or query, which nothing here would use.
fn address(raw: &str) -> Option<String> {
    let url = if raw.contains("://") { raw.to_owned() } else { format!("http://{raw}") };
    let uri: Uri = url.parse().ok()?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"))?;
    let authority = uri.authority().filter(|authority| !authority.host().is_empty())?.as_str();
    let authority = authority.rsplit_once('@').map_or(authority, |(_, authority)| authority);
    // A password with a slash in it would end the address early, and be shown as its host.
    let whole = !raw[raw.find(authority)? + authority.len()..].contains('@');
    whole.then(|| format!("{scheme}://{authority}"))
}

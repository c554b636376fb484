//! Log lines and figures. Installed once a process, before anything else starts.

use std::{
    convert::Infallible,
    io::{self, IsTerminal},
    time::Duration,
};

use metrics::{Unit, counter, describe_counter, describe_gauge, describe_histogram};
use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder, PrometheusHandle};
use outbox_relay::logging::truncated;
use tracing_subscriber::{
    EnvFilter, Layer,
    filter::ParseError,
    fmt,
    layer::SubscriberExt,
    util::{SubscriberInitExt, TryInitError},
};

use crate::config::LogFormat;

/// From half a millisecond, a statement, to ten minutes, an event behind a broker that was away.
const SECONDS: [f64; 17] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0, 600.0];
const UPKEEP: Duration = Duration::from_secs(5);

/// Why there is no telemetry.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// `RUST_LOG` can't be read.
    #[error("RUST_LOG can't be used ({0}): write levels and targets, for example RUST_LOG=info,librdkafka=warn")]
    Filter(#[from] ParseError),
    /// Logging is set up already.
    #[error("logging was set up twice: {0}")]
    Logs(#[from] TryInitError),
    /// Metrics are set up already.
    #[error("metrics were set up twice: {0}")]
    Metrics(#[from] BuildError),
}

/// Log lines to standard error (standard output belongs to commands' answers), and metrics.
pub fn init(format: LogFormat, filter: &str) -> Result<PrometheusHandle, TelemetryError> {
    let filter = EnvFilter::try_new(filter)?;
    let lines = match format {
        LogFormat::Text => fmt::layer().with_writer(io::stderr).with_ansi(io::stderr().is_terminal()).boxed(),
        LogFormat::Json => {
            fmt::layer().json().flatten_event(true).with_span_list(false).with_writer(io::stderr).boxed()
        }
    };
    // Before the lines, not on them: a filter on a layer forgets, after somebody has merely asked whether a line
    // would be written (sqlx asks after every statement), to let the next line through.
    tracing_subscriber::registry().with(filter).with(lines).try_init()?;
    log_panics();
    install_metrics()
}

/// Metrics alone: [`init`] for those who have logging of their own.
pub fn install_metrics() -> Result<PrometheusHandle, TelemetryError> {
    let handle = PrometheusBuilder::new()
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), &SECONDS)?
        .install_recorder()?;
    describe();
    Ok(handle)
}

/// Folds recorded values into their buckets now and then, so that they don't pile up in a process that nobody
/// scrapes.
pub async fn keep_up_metrics(handle: PrometheusHandle) -> Result<(), Infallible> {
    loop {
        tokio::time::sleep(UPKEEP).await;
        handle.run_upkeep();
    }
}

/// A panic is a log line like any other: of one line, in the chosen format, and not longer than others.
fn log_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let said = truncated(panic.payload_as_str().unwrap_or("nothing that is text"));
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        let thread = std::thread::current();
        tracing::error!(place, thread = thread.name(), "panicked: {said}");
    }));
}

/// What the figures say. Counters that an alert hangs on are there from the start: a figure that
/// appears with the first fault has no "before" to compare it with.
fn describe() {
    for (name, says) in [
        (
            "auth_refresh_reuse_total",
            "Refresh tokens that had been replaced and were used again; each ended its session",
        ),
        ("database_connections_condemned_total", "Pooled connections closed because the work on them ended badly"),
        ("outbox_published_total", "Events the broker has acknowledged"),
        ("outbox_parked_total", "Events set aside because they can't be sent"),
        (
            "outbox_reports_without_position_total",
            "Delivery reports that named no offset; their events were sent again",
        ),
        ("outbox_fenced_writes_total", "Writes of a relay that had lost its lane; they had no effect"),
        ("outbox_leases_lost_total", "Times this relay found its lease taken"),
        ("outbox_worker_deaths_total", "Relay workers that panicked and were started again"),
        ("outbox_database_errors_total", "Relay steps that failed at the database"),
        ("outbox_producers_replaced_total", "Kafka producers given up after a fatal error"),
        ("saga_reply_retries_total", "Replies that had to be taken in again after a fault of the database"),
        ("saga_consumers_replaced_total", "Kafka consumers given up after a fatal error"),
    ] {
        describe_counter!(name, says);
        counter!(name).increment(0);
    }
    for (name, says) in [
        ("auth_refresh_total", "Refreshes, by outcome"),
        ("auth_logins_total", "Logins, by outcome"),
        ("auth_login_failures_total", "Passwords that let nobody in, by reason"),
        ("auth_logouts_total", "Logouts, by scope and whether they named a session"),
        ("auth_token_refusals_total", "Requests whose tokens were refused, by request and reason"),
        ("auth_sessions_capped_total", "Sessions ended because their user had too many"),
        ("auth_admin_refusals_total", "Requests at the admin port without a good token, or beyond its scopes"),
        ("outbox_publish_errors_total", "Sends that failed, by whose fault"),
        ("saga_transitions_total", "Saga transitions, by kind and the status reached"),
        ("saga_replies_total", "Messages of other services, by what became of them"),
        ("housekeeping_failures_total", "Housekeeping jobs that failed"),
        ("auth_accept_errors_total", "Connections that could not be accepted, for want of descriptors mostly"),
        ("auth_connections_closed_total", "Connections that ended, by listener and what ended them"),
    ] {
        describe_counter!(name, says);
    }
    for (name, says) in [
        ("http_request_seconds", "REST requests"),
        ("grpc_request_seconds", "gRPC requests, by method and status code"),
        ("auth_hash_wait_seconds", "Waiting for a hashing thread"),
        ("auth_hash_seconds", "Hashing a password"),
        ("outbox_dwell_seconds", "From an event's append to its acknowledgement"),
    ] {
        describe_histogram!(name, Unit::Seconds, says);
    }
    for (name, says) in [
        ("auth_connections", "Open connections, by listener"),
        ("auth_hash_queue_depth", "Passwords waiting for a hashing thread"),
        ("outbox_lanes_owned", "Lanes this relay owns"),
        ("outbox_breaker_open", "1 while a relay worker waits for the broker to come back"),
        ("saga_sweep_last_success_seconds", "When deadlines were last looked at, as a Unix time"),
        ("housekeeping_last_success_seconds", "When a housekeeping job last succeeded, as a Unix time"),
    ] {
        describe_gauge!(name, says);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_that_can_not_be_read_names_its_variable() {
        let error = init(LogFormat::Text, "auth_service=loud").expect_err("refused");
        assert!(error.to_string().starts_with("RUST_LOG can't be used"), "{error}");
    }
}

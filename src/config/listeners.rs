use std::time::Duration;

use super::vars::Vars;

/// Most headers a request may have, unless told otherwise.
pub const MAX_HEADERS: usize = 100;

/// The bounds of one listener.
#[derive(Debug, Clone, Copy)]
pub struct ListenerConfig {
    /// Most connections at once.
    pub max_connections: usize,
    /// How long a connection may wait for its next request.
    pub idle_timeout: Duration,
}

/// How long a client is waited for, on any listener.
#[derive(Debug, Clone, Copy)]
pub struct Timeouts {
    /// For the head of a request, from its first byte; for the first one, and TLS, from the connection on.
    pub head: Duration,
    /// For the whole body.
    pub body: Duration,
    /// For the next piece of an answer to be taken.
    pub write: Duration,
    /// Most headers a request may have.
    pub max_headers: usize,
}

/// The names of a listener's variables, with their defaults.
pub(super) struct Bounds {
    pub(super) max_connections: (&'static str, usize),
    pub(super) idle_timeout: (&'static str, Duration),
}

impl ListenerConfig {
    pub(super) fn read(vars: &mut Vars, Bounds { max_connections, idle_timeout }: Bounds) -> Self {
        let day = Duration::from_secs(86_400);
        Self {
            max_connections: vars.number(max_connections.0, max_connections.1, 1..=100_000),
            idle_timeout: vars.duration(idle_timeout.0, idle_timeout.1, Duration::from_secs(1)..=day),
        }
    }
}

impl Timeouts {
    pub(super) fn read(vars: &mut Vars) -> Self {
        let (millis, seconds) = (Duration::from_millis, Duration::from_secs);
        Self {
            head: vars.duration("REQUEST_HEADER_TIMEOUT", seconds(10), millis(100)..=seconds(300)),
            body: vars.duration("REQUEST_BODY_TIMEOUT", seconds(15), millis(100)..=seconds(300)),
            write: vars.duration("RESPONSE_WRITE_TIMEOUT", seconds(30), millis(100)..=seconds(600)),
            max_headers: vars.number("REQUEST_MAX_HEADERS", MAX_HEADERS, 20..=10_000),
        }
    }
}

//! What a connection waits for, and until when.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, sleep_until},
};

use crate::config::Timeouts;

/// One connection, as its stream, its requests and its answers see it.
pub(super) struct Connection {
    timeouts: Timeouts,
    state: Mutex<State>,
    /// Told whenever it begins to wait for its client.
    changed: Notify,
}

struct State {
    opened: Instant,
    idle_timeout: Duration,
    /// It has had a request.
    served: bool,
    /// It speaks HTTP/2, whose head is no line that trickles in.
    http2: bool,
    /// Since when there is no request under way.
    quiet_since: Instant,
    /// The first byte after that: a request has begun.
    head_since: Option<Instant>,
    /// The client does not take what is written.
    stalled_since: Option<Instant>,
    exchanges: HashMap<u64, (Instant, Phase)>,
    next: u64,
    evicted: bool,
    parting: bool,
}

/// Where a request is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// We are at work.
    Working,
    /// The client is to send more of the body.
    Receiving,
    /// The client is to take what it was answered.
    Sending(Instant),
}

/// Why a connection is closed by us.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Overdue {
    /// No request came.
    Idle,
    /// A request's head did not come, or not to its end.
    Head,
    /// Its body did not.
    Body,
    /// The answer was not taken.
    Write,
    /// Another connection needs its place.
    Evicted,
}

impl Overdue {
    /// As it stands in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Idle => "idle",
            Self::Head => "head",
            Self::Body => "body",
            Self::Write => "write",
            Self::Evicted => "evicted",
        }
    }
}

impl Connection {
    pub(super) fn new(idle_timeout: Duration, timeouts: Timeouts) -> Self {
        let now = Instant::now();
        let state = State {
            opened: now,
            idle_timeout,
            served: false,
            http2: false,
            quiet_since: now,
            head_since: None,
            stalled_since: None,
            exchanges: HashMap::new(),
            next: 0,
            evicted: false,
            parting: false,
        };
        Self { timeouts, state: Mutex::new(state), changed: Notify::new() }
    }

    /// A request has come.
    pub(super) fn begin(self: &Arc<Self>) -> Arc<Exchange> {
        let mut state = self.state();
        state.served = true;
        state.head_since = None;
        let id = state.next;
        state.next += 1;
        state.exchanges.insert(id, (Instant::now(), Phase::Working));
        drop(state);
        Arc::new(Exchange { connection: self.clone(), id })
    }

    /// Bytes have come. `http2` when they end the preface.
    pub(super) fn received(&self, http2: bool) {
        let mut state = self.state();
        state.http2 |= http2;
        if state.exchanges.is_empty() && state.head_since.is_none() {
            state.head_since = Some(Instant::now());
            drop(state);
            self.changed.notify_one();
        }
    }

    /// The client does not take what is written, or takes it again.
    pub(super) fn stalled(&self, stalled: bool) {
        let mut state = self.state();
        if state.stalled_since.is_some() != stalled {
            state.stalled_since = stalled.then(Instant::now);
            drop(state);
            self.changed.notify_one();
        }
    }

    /// Whether no request is under way: what is written now does not come from a handler.
    pub(super) fn is_quiet(&self) -> bool {
        let state = self.state();
        state.exchanges.is_empty() && !state.http2
    }

    /// Since when it has waited for its client, those first that never had a request; `None` while we are at work.
    pub(super) fn waiting(&self) -> Option<(bool, Instant)> {
        let state = self.state();
        if state.evicted {
            return None;
        }
        let mut since = Some(state.quiet_since);
        for (began, phase) in state.exchanges.values() {
            let waits_since = match phase {
                Phase::Working => return None,
                Phase::Receiving => *began,
                Phase::Sending(since) => *since,
            };
            since = since.max(Some(waits_since));
        }
        since.map(|since| (state.served, since))
    }

    /// Has it closed at once.
    pub(super) fn evict(&self) {
        self.state().evicted = true;
        self.changed.notify_one();
    }

    /// The stop has begun: it ends as soon as nothing is under way.
    pub(super) fn part(&self, patience: Duration) {
        let mut state = self.state();
        state.parting = true;
        state.idle_timeout = patience;
        state.quiet_since = Instant::now();
        drop(state);
        self.changed.notify_one();
    }

    /// Whether the stop has begun.
    pub(super) fn is_parting(&self) -> bool {
        self.state().parting
    }

    /// Returns when it has waited too long, with what for.
    pub(super) async fn overdue(&self) -> Overdue {
        loop {
            let deadline = self.state().deadline(&self.timeouts);
            match deadline {
                Some((at, overdue)) if at <= Instant::now() => return overdue,
                Some((at, _)) => tokio::select! {
                    () = sleep_until(at) => {}
                    () = self.changed.notified() => {}
                },
                None => self.changed.notified().await,
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn deadline(&self, timeouts: &Timeouts) -> Option<(Instant, Overdue)> {
        if self.evicted {
            return Some((self.opened, Overdue::Evicted));
        }
        let stalled = self.stalled_since.map(|since| (since + timeouts.write, Overdue::Write));
        let exchanges = self.exchanges.values().filter_map(|(began, phase)| match phase {
            Phase::Working => None,
            Phase::Receiving => Some((*began + timeouts.body + BODY_GRACE, Overdue::Body)),
            Phase::Sending(since) => Some((*since + timeouts.write, Overdue::Write)),
        });
        let quiet = self.exchanges.is_empty().then(|| match self.head_since {
            Some(since) if !self.http2 => (since + timeouts.head, Overdue::Head),
            None if !self.served => (self.opened + timeouts.head, Overdue::Head),
            _ => (self.quiet_since + self.idle_timeout, Overdue::Idle),
        });
        exchanges.chain(stalled).chain(quiet).min_by_key(|(at, _)| *at)
    }
}

/// A handler that reads bodies with the same deadline gets to answer before the connection is closed.
const BODY_GRACE: Duration = Duration::from_secs(5);

/// One request and its answer. It is over when the last part of it is dropped.
pub(super) struct Exchange {
    connection: Arc<Connection>,
    id: u64,
}

impl Exchange {
    pub(super) fn is_in(&self, phase: Phase) {
        let mut state = self.connection.state();
        let Some((_, known)) = state.exchanges.get_mut(&self.id) else { return };
        if *known != phase {
            *known = phase;
            drop(state);
            if phase != Phase::Working {
                self.connection.changed.notify_one();
            }
        }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let mut state = self.connection.state();
        state.exchanges.remove(&self.id);
        if state.exchanges.is_empty() {
            state.quiet_since = Instant::now();
            drop(state);
            self.connection.changed.notify_one();
        }
    }
}

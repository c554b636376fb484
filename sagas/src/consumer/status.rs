//! Whether replies are read, and why not: for readiness, metrics and the log.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use outbox_relay::logging::{Throttle, truncated_to};

/// Enough for the names of some topics.
const LONGEST_DETAIL: usize = 2000;

/// What keeps replies from being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Trouble {
    /// No broker answers.
    BrokersAway,
    /// The consumer group can't be joined.
    GroupNotJoined,
    /// Reply topics do not exist.
    TopicMissing,
    /// Reply topics may not be read.
    TopicForbidden,
    /// A message can't be fetched or decoded.
    FetchFailed,
    /// A reply was read and can't be taken in: everything behind it waits.
    ReplyWaits,
    /// The consumer failed or panicked, and is being replaced.
    ConsumerFailed,
}

impl Trouble {
    /// All of them.
    pub const ALL: [Trouble; 7] = [
        Trouble::BrokersAway,
        Trouble::GroupNotJoined,
        Trouble::TopicMissing,
        Trouble::TopicForbidden,
        Trouble::FetchFailed,
        Trouble::ReplyWaits,
        Trouble::ConsumerFailed,
    ];

    /// As readiness and the metric name it.
    pub fn as_str(self) -> &'static str {
        match self {
            Trouble::BrokersAway => "brokers-away",
            Trouble::GroupNotJoined => "group-not-joined",
            Trouble::TopicMissing => "topic-missing",
            Trouble::TopicForbidden => "topic-forbidden",
            Trouble::FetchFailed => "fetch-failed",
            Trouble::ReplyWaits => "reply-waits",
            Trouble::ConsumerFailed => "consumer-failed",
        }
    }
}

/// The state of one reply consumer. Cheap to clone; clones share it.
#[derive(Debug, Clone, Default)]
pub struct ConsumerStatus(Arc<Mutex<BTreeMap<Trouble, Episode>>>);

#[derive(Debug)]
struct Episode {
    detail: String,
    since: Instant,
    lines: Throttle,
}

impl ConsumerStatus {
    /// What is wrong, with a sentence each and for how long. Empty: replies are read.
    pub fn troubles(&self) -> Vec<(Trouble, String, Duration)> {
        let told = self.episodes();
        told.iter().map(|(trouble, episode)| (*trouble, episode.detail.clone(), episode.since.elapsed())).collect()
    }

    /// Something is wrong, or still is. `detail` is a sentence without secrets and addresses.
    pub(super) fn begin(&self, trouble: Trouble, detail: impl Into<String>) {
        let mut episodes = self.episodes();
        let new = || Episode { detail: String::new(), since: Instant::now(), lines: Throttle::new() };
        let episode = episodes.entry(trouble).or_insert_with(new);
        episode.detail = truncated_to(&detail.into(), LONGEST_DETAIL).into_owned();
        if let Some(line) = episode.lines.occurred(()) {
            tracing::warn!(
                trouble = trouble.as_str(),
                seconds = line.lasted.as_secs(),
                left_out = line.left_out,
                "replies are not read: {}",
                episode.detail
            );
        }
        gauge(trouble).set(1.0);
    }

    /// It is not wrong, or not any more.
    pub(super) fn end(&self, trouble: Trouble) {
        if let Some(episode) = self.episodes().remove(&trouble) {
            let seconds = episode.since.elapsed().as_secs();
            tracing::info!(trouble = trouble.as_str(), seconds, "this keeps replies from being read no longer");
        }
        gauge(trouble).set(0.0);
    }

    fn episodes(&self) -> MutexGuard<'_, BTreeMap<Trouble, Episode>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn gauge(trouble: Trouble) -> metrics::Gauge {
    metrics::gauge!("saga_consumer_trouble", "trouble" => trouble.as_str())
}

/// Every label is there from the start: an alert on a series that does not exist never fires.
pub(super) fn describe() {
    metrics::describe_gauge!("saga_consumer_trouble", "1 while this keeps replies from being read");
    Trouble::ALL.into_iter().for_each(|trouble| gauge(trouble).set(0.0));
}

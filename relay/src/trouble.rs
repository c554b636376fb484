//! What keeps a part of a process from its work, and since when: for readiness, metrics and the log.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::logging::{Throttle, truncated_to};

/// Longest detail, in bytes: a sentence and a list of topics.
const LONGEST_DETAIL: usize = 1024;

/// A closed set of troubles of one part.
pub trait TroubleKind: Copy + Ord + Send + 'static {
    /// The gauge that is 1 while a trouble lasts, with the label `trouble`.
    const GAUGE: &'static str;
    /// What a trouble of this part means, as a log line begins.
    const EFFECT: &'static str;
    /// All of them.
    const ALL: &'static [Self];

    /// As readiness and the metric name it.
    fn as_str(self) -> &'static str;
}

/// The troubles of one part of a process. Cheap to clone; clones share what they know.
#[derive(Debug)]
pub struct Troubles<K>(Arc<Mutex<BTreeMap<K, Episode>>>);

#[derive(Debug)]
struct Episode {
    detail: String,
    since: Instant,
    lines: Throttle,
}

impl<K: TroubleKind> Troubles<K> {
    /// What is wrong now, with a sentence each and for how long. Empty when all is well.
    pub fn now(&self) -> Vec<(K, String, Duration)> {
        let episodes = self.episodes();
        episodes.iter().map(|(kind, episode)| (*kind, episode.detail.clone(), episode.since.elapsed())).collect()
    }

    /// Sets every gauge to 0: an alert on a series that does not exist never fires.
    pub fn describe(&self) {
        metrics::describe_gauge!(K::GAUGE, K::EFFECT);
        K::ALL.iter().for_each(|kind| gauge(*kind).set(0.0));
    }

    /// Something is wrong, or still is: one line when it begins, one a minute while it lasts. `detail` is a sentence
    /// without secrets and addresses.
    pub fn begin(&self, kind: K, detail: impl Into<String>) {
        let mut episodes = self.episodes();
        let new = || Episode { detail: String::new(), since: Instant::now(), lines: Throttle::new() };
        let episode = episodes.entry(kind).or_insert_with(new);
        episode.detail = truncated_to(&detail.into(), LONGEST_DETAIL).into_owned();
        if let Some(line) = episode.lines.occurred(()) {
            let (seconds, left_out) = (line.lasted.as_secs(), line.left_out);
            tracing::warn!(trouble = kind.as_str(), seconds, left_out, "{}: {}", K::EFFECT, episode.detail);
        }
        gauge(kind).set(1.0);
    }

    /// It is not wrong, or not any more.
    pub fn end(&self, kind: K) {
        if let Some(episode) = self.episodes().remove(&kind) {
            let seconds = episode.since.elapsed().as_secs();
            tracing::info!(trouble = kind.as_str(), seconds, "over: {}", K::EFFECT);
        }
        gauge(kind).set(0.0);
    }

    fn episodes(&self) -> MutexGuard<'_, BTreeMap<K, Episode>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K> Clone for Troubles<K> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<K> Default for Troubles<K> {
    fn default() -> Self {
        Self(Arc::default())
    }
}

fn gauge<K: TroubleKind>(kind: K) -> metrics::Gauge {
    metrics::gauge!(K::GAUGE, "trouble" => kind.as_str())
}

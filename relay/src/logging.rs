//! What keeps log lines few and short, whatever happens outside.
//!
//! [`Throttle`]: one line when a fault begins, one line a period with a count while it lasts, one line when
//! it is over. [`truncated`]: text from outside, cut and escaped so that it fits a line.

use std::{
    borrow::Cow,
    collections::HashMap,
    hash::Hash,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// How often a fault that lasts is logged again.
pub const PERIOD: Duration = Duration::from_secs(60);
/// Most bytes of a text from outside that stand in a log line, an error or a row's reason.
pub const LONGEST_TEXT: usize = 256;

/// Decides which occurrences of a fault are logged. `K` tells kinds of faults apart that are counted by
/// themselves; it comes from a closed set, an error code for example, never from outside.
///
/// ```
/// # use outbox_relay::logging::Throttle;
/// static ACCEPT: Throttle = Throttle::new();
/// # fn accept() -> std::io::Result<()> { Ok(()) }
/// match accept() {
///     Ok(()) => {
///         if let Some(over) = ACCEPT.recovered() {
///             println!("accepting again after {} failures in {:?}", over.occurrences, over.lasted);
///         }
///     }
///     Err(error) => {
///         if let Some(line) = ACCEPT.occurred(()) {
///             println!("not accepted ({} more since the last line): {error}", line.left_out);
///         }
///     }
/// }
/// ```
#[derive(Debug)]
pub struct Throttle<K = ()> {
    period: Duration,
    episodes: Mutex<Option<HashMap<K, Episode>>>,
}

/// A fault from its first occurrence until it is over.
#[derive(Debug)]
struct Episode {
    began: Instant,
    logged: Instant,
    occurrences: u64,
    left_out: u64,
}

/// A line that is due.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Line {
    /// Occurrences since the last line that had none of their own; 0 for the first line of a fault.
    pub left_out: u64,
    /// Since the fault began.
    pub lasted: Duration,
}

/// A fault that is over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recovered {
    /// How often it occurred, of all kinds together.
    pub occurrences: u64,
    /// From its first occurrence until now.
    pub lasted: Duration,
}

impl<K: Eq + Hash> Throttle<K> {
    /// One line every [`PERIOD`] for each kind of fault.
    pub const fn new() -> Self {
        Self::every(PERIOD)
    }

    /// One line every `period` for each kind of fault.
    pub const fn every(period: Duration) -> Self {
        Self { period, episodes: Mutex::new(None) }
    }

    /// Counts an occurrence. Returns the line to log, or `None` when this one is only counted.
    pub fn occurred(&self, kind: K) -> Option<Line> {
        self.occurred_at(kind, Instant::now())
    }

    /// Ends the fault, with all its kinds. Returns `None` when there was none.
    pub fn recovered(&self) -> Option<Recovered> {
        self.recovered_at(Instant::now())
    }

    fn occurred_at(&self, kind: K, now: Instant) -> Option<Line> {
        let mut episodes = self.lock();
        let mut first = false;
        let episode = episodes.get_or_insert_default().entry(kind).or_insert_with(|| {
            first = true;
            Episode { began: now, logged: now, occurrences: 0, left_out: 0 }
        });
        episode.occurrences += 1;
        if !first && now.saturating_duration_since(episode.logged) < self.period {
            episode.left_out += 1;
            return None;
        }
        episode.logged = now;
        Some(Line {
            left_out: std::mem::take(&mut episode.left_out),
            lasted: now.saturating_duration_since(episode.began),
        })
    }

    fn recovered_at(&self, now: Instant) -> Option<Recovered> {
        let episodes = self.lock().take()?;
        let began = episodes.values().map(|episode| episode.began).min()?;
        Some(Recovered {
            occurrences: episodes.values().map(|episode| episode.occurrences).sum(),
            lasted: now.saturating_duration_since(began),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<HashMap<K, Episode>>> {
        // Counts alone: whoever panicked here left nothing half done.
        self.episodes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<K: Eq + Hash> Default for Throttle<K> {
    fn default() -> Self {
        Self::new()
    }
}

/// A text from outside as it stands in a log line, an error or a row: at most [`LONGEST_TEXT`] bytes, with its
/// full length where it was cut, and without characters that break the line or turn its direction.
pub fn truncated(text: &str) -> Cow<'_, str> {
    truncated_to(text, LONGEST_TEXT)
}

/// As [`truncated`], with at most `longest` bytes of the text.
pub fn truncated_to(text: &str, longest: usize) -> Cow<'_, str> {
    let cut = &text[..text.floor_char_boundary(longest)];
    if cut.len() == text.len() && !text.chars().any(is_unprintable) {
        return Cow::Borrowed(text);
    }
    let mut shown: String = cut.chars().map(|c| if is_unprintable(c) { '\u{fffd}' } else { c }).collect();
    if cut.len() < text.len() {
        shown.push_str(&format!("… ({} bytes)", text.len()));
    }
    Cow::Owned(shown)
}

/// Control characters, line and paragraph separators, and those that turn the direction of what follows.
fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_logged_when_it_begins_then_once_a_period_with_a_count_and_when_it_is_over() {
        let throttle = Throttle::every(Duration::from_secs(10));
        let begin = Instant::now();
        let at = |seconds| begin + Duration::from_secs(seconds);
        assert_eq!(throttle.occurred_at((), at(0)), Some(Line { left_out: 0, lasted: Duration::ZERO }));
        for second in 1..10 {
            assert_eq!(throttle.occurred_at((), at(second)), None);
        }
        assert_eq!(throttle.occurred_at((), at(10)), Some(Line { left_out: 9, lasted: Duration::from_secs(10) }));
        assert_eq!(throttle.occurred_at((), at(11)), None);
        let over = Recovered { occurrences: 12, lasted: Duration::from_secs(20) };
        assert_eq!(throttle.recovered_at(at(20)), Some(over));
        assert_eq!(throttle.recovered_at(at(21)), None);
        assert!(throttle.occurred_at((), at(22)).is_some(), "a new fault has a first line of its own");
    }

    #[test]
    fn one_kind_of_fault_does_not_hide_another() {
        let throttle = Throttle::new();
        assert!(throttle.occurred("transport").is_some());
        assert!(throttle.occurred("transport").is_none());
        assert!(throttle.occurred("authentication").is_some());
        assert_eq!(throttle.recovered().map(|over| over.occurrences), Some(3));
    }

    #[test]
    fn a_text_is_cut_between_characters_and_says_how_long_it_was() {
        assert_eq!(truncated("plain"), "plain");
        assert_eq!(truncated_to("ääää", 5), "ää… (8 bytes)");
        assert_eq!(truncated_to("🦀", 2), "… (4 bytes)");
        let long = "x".repeat(900_000);
        assert!(truncated(&long).len() < LONGEST_TEXT + 32);
        assert!(truncated(&long).ends_with("(900000 bytes)"));
    }

    #[test]
    fn a_text_breaks_no_line_and_turns_no_direction() {
        assert_eq!(truncated("a\nb\u{202e}c\u{1b}[31m\u{2028}d"), "a\u{fffd}b\u{fffd}c\u{fffd}[31m\u{fffd}d");
        assert_eq!(truncated("हिन्दी"), "हिन्दी");
    }
}

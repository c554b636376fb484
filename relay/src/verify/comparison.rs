//! One partition's archived rows against the messages that stand in it. No I/O: rows and messages
//! come in order of their offsets, findings go out.

use std::collections::{BTreeSet, HashMap};

use sha2::{Digest, Sha256};
use uuid::Uuid;

use super::{
    records::ArchivedRow,
    report::{Finding, FindingKind},
};

/// A message as it was read; its value as a SHA-256.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Logged {
    pub offset: i64,
    /// Milliseconds since 1970, by the clock of whoever set it.
    pub timestamp: Option<i64>,
    pub source: Option<String>,
    pub message_id: Option<Uuid>,
    pub key: Option<String>,
    pub seq: Option<i64>,
    pub replay_of: Option<i64>,
    pub value_hash: Option<Vec<u8>>,
}

/// Where a partition begins and ends, asked after it was read: retention does not stand still.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Bounds {
    /// First offset that is kept.
    pub low: i64,
    /// End of what can be read.
    pub readable: i64,
    /// End of what is there: more than that while a foreign transaction is open.
    pub high: i64,
    /// What is known of the topic's compaction.
    pub compaction: Compaction,
}

/// Whether Kafka may have removed a message from the middle of a partition, because its key has a later one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Compaction {
    Off,
    On,
    /// Kafka did not say, for this reason.
    Unknown(String),
}

/// What became of a partition's rows.
#[derive(Debug, Default)]
pub(crate) struct Outcome {
    pub rows: u64,
    pub proven: u64,
    pub replays: u64,
    pub expired: u64,
    pub topic_gone: u64,
    pub open_transaction: u64,
    pub compacted: u64,
    pub messages: u64,
    pub other_senders: u64,
    pub findings: Vec<Finding>,
    /// Rows that name no position: what became of them is known when all of Kafka was read.
    pub unpositioned: Vec<ArchivedRow>,
}

impl Outcome {
    pub(crate) fn add_row(&mut self, row: &ArchivedRow) {
        self.rows += 1;
        self.replays += u64::from(row.replay_of.is_some());
    }
}

/// What a key's newest proven row was.
struct Newest {
    seq: i64,
    first: i64,
}

/// Holds rows against messages. For each message: first [`row`](Self::row) for every row up to its
/// offset, then [`message`](Self::message).
///
/// It remembers 32 bytes a key, 24 a message of ours that is at no row's place, and the rows whose
/// place is empty; nothing else grows with the partition.
pub(crate) struct Comparison<'a> {
    low: i64,
    sources: &'a BTreeSet<String>,
    outcome: Outcome,
    newest: HashMap<[u8; 16], Newest>,
    /// Messages of ours that no row has claimed: a row further on may name a later copy.
    earlier: HashMap<Uuid, i64>,
    strays: Vec<Logged>,
    empty_places: Vec<ArchivedRow>,
    claimed: Option<i64>,
}

impl<'a> Comparison<'a> {
    pub(crate) fn new(low: i64, sources: &'a BTreeSet<String>) -> Self {
        Self {
            low,
            sources,
            outcome: Outcome::default(),
            newest: HashMap::new(),
            earlier: HashMap::new(),
            strays: Vec::new(),
            empty_places: Vec::new(),
            claimed: None,
        }
    }

    /// The next row, and the first message at or behind its offset.
    pub(crate) fn row(&mut self, row: ArchivedRow, next: Option<&Logged>) {
        self.outcome.add_row(&row);
        if !row.has_position() {
            return self.outcome.unpositioned.push(row);
        }
        match next.filter(|message| message.offset == row.offset) {
            Some(message) => match self.held_against(&row, message) {
                None => self.outcome.proven += 1,
                Some((kind, what)) => self.outcome.findings.push(row.finding(kind, what)),
            },
            None if row.offset < self.low => self.outcome.expired += 1,
            None => self.empty_places.push(row),
        }
    }

    /// The next message, after the rows of its offset.
    pub(crate) fn message(&mut self, message: Logged) {
        self.outcome.messages += 1;
        if self.claimed == Some(message.offset) {
            return;
        }
        if !message.source.as_ref().is_some_and(|source| self.sources.contains(source)) {
            self.outcome.other_senders += 1;
            return;
        }
        if let (Some(id), None) = (message.message_id, message.replay_of) {
            self.earlier.entry(id).or_insert(message.offset);
        }
        self.strays.push(message);
    }

    /// How many rows there were.
    pub(crate) fn rows(&self) -> u64 {
        self.outcome.rows
    }

    /// Messages of ours that no row claims, to be looked up.
    pub(crate) fn strays(&mut self, at_least: usize) -> Vec<Logged> {
        if self.strays.len() < at_least { Vec::new() } else { std::mem::take(&mut self.strays) }
    }

    /// Whether some row's place is empty: then `finish` needs fresh bounds.
    pub(crate) fn has_empty_places(&self) -> bool {
        !self.empty_places.is_empty()
    }

    /// No more rows, no more messages.
    pub(crate) fn finish(mut self, bounds: Bounds) -> Outcome {
        for row in self.empty_places {
            if row.offset < bounds.low {
                self.outcome.expired += 1;
            } else if (bounds.readable..bounds.high).contains(&row.offset) {
                self.outcome.open_transaction += 1;
            } else if row.offset < bounds.high && bounds.compaction == Compaction::On {
                self.outcome.compacted += 1;
            } else {
                let what = match (row.offset >= bounds.high, &bounds.compaction) {
                    (true, _) => format!("the partition ends before offset {}", bounds.high),
                    (false, Compaction::Unknown(reason)) => {
                        format!(
                            "no message stands there, and Kafka did not say whether the topic is compacted: {reason}"
                        )
                    }
                    (false, _) => "no message stands there".to_owned(),
                };
                self.outcome.findings.push(row.finding(FindingKind::Missing, what));
            }
        }
        self.outcome
    }

    /// What contradicts the row, if anything does.
    fn held_against(&mut self, row: &ArchivedRow, message: &Logged) -> Option<(FindingKind, String)> {
        if message.message_id != Some(row.message_id) {
            let other = message.message_id.map_or("without a ce_id".to_owned(), |id| id.to_string());
            return Some((FindingKind::Missing, format!("another message stands there: {other}")));
        }
        if self.claimed.replace(row.offset) == Some(row.offset) {
            return Some((FindingKind::Shared, "an earlier row of the archive names the same message".to_owned()));
        }
        let differing: Vec<&str> = [
            ("key", message.key.as_deref() == Some(&row.key)),
            ("value", message.value_hash.as_ref() == Some(&row.value_hash)),
            ("aggregate-seq", message.seq == Some(row.seq)),
            ("replay-of", message.replay_of == row.replay_of),
        ]
        .into_iter()
        .filter_map(|(part, same)| (!same).then_some(part))
        .collect();
        if !differing.is_empty() {
            return Some((FindingKind::Different, format!("archive and Kafka differ in: {}", differing.join(", "))));
        }
        self.out_of_order(row).map(|what| (FindingKind::OutOfOrder, what))
    }

    /// A row's first occurrence has to stand behind that of every earlier row of its key. A replay
    /// stands outside the order.
    fn out_of_order(&mut self, row: &ArchivedRow) -> Option<String> {
        if row.replay_of.is_some() {
            return None;
        }
        let first = self.earlier.get(&row.message_id).copied().unwrap_or(row.offset);
        // Saturating: a row that somebody has changed may have any number.
        let before = Newest { seq: row.seq.saturating_sub(1), first: first.saturating_sub(1) };
        let newest = self.newest.entry(short_hash(&row.key)).or_insert(before);
        if row.seq <= newest.seq {
            return Some(format!("message {} of its key stands before it, at offset {}", newest.seq, newest.first));
        }
        if first < newest.first {
            let (seq, at) = (newest.seq, newest.first);
            return Some(format!("a copy at offset {first} stands before message {seq} of its key, at offset {at}"));
        }
        *newest = Newest { seq: row.seq, first };
        None
    }
}

/// Keys may be long; half of a SHA-256 of each is enough to tell them apart.
fn short_hash(key: &str) -> [u8; 16] {
    let mut short = [0; 16];
    short.copy_from_slice(&Sha256::digest(key)[..16]);
    short
}

#[cfg(test)]
mod tests;

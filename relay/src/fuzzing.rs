//! Opens to `tests/fuzz` what this crate reads of bytes that others wrote. No part of its interface.

use std::collections::BTreeSet;

use rdkafka::{Message, message::OwnedHeaders};

use crate::{
    inbox::Bytes,
    publisher,
    verify::{
        comparison::{Bounds, Compaction, Comparison, Logged},
        log_reader,
        records::ArchivedRow,
    },
};

/// The headers of a stored row, as they go to Kafka.
pub fn stored_headers(json: &str) -> Option<OwnedHeaders> {
    publisher::stored_headers(json).ok()
}

/// The headers of a message as the inbox keeps them, in JSON, and as they are read from there.
pub fn kept_headers(bytes: &Bytes) -> (String, Bytes) {
    let kept = serde_json::to_string(&bytes.kept_headers()).unwrap_or_default();
    let mut read = Bytes { key: bytes.key.clone(), payload: bytes.payload.clone(), ..Bytes::default() };
    read.add_kept(serde_json::from_str(&kept).unwrap_or_default());
    (kept, read)
}

/// What a comparison counted.
#[derive(Debug)]
pub struct Compared {
    /// Rows.
    pub rows: u64,
    /// Rows that their messages prove.
    pub proven: u64,
    /// Messages.
    pub messages: u64,
    /// What contradicts, in words.
    pub findings: Vec<String>,
}

/// Compares the messages of a partition with rows that say the same of them, `shift` offsets away.
pub fn compare(messages: &[impl Message], sources: &BTreeSet<String>, shift: i64) -> Compared {
    let messages: Vec<Logged> = messages.iter().map(log_reader::logged).collect();
    let mut rows = messages.iter().filter_map(|message| row(message, shift)).peekable();
    let mut comparison = Comparison::new(0, sources);
    for message in messages.clone() {
        while let Some(row) = rows.next_if(|row| row.offset <= message.offset) {
            comparison.row(row, Some(&message));
        }
        comparison.message(message);
    }
    rows.for_each(|row| comparison.row(row, None));
    let end = messages.len() as i64;
    let outcome = comparison.finish(Bounds { low: 0, readable: end, high: end, compaction: Compaction::Off });
    let findings = outcome.findings.into_iter().map(|finding| format!("{finding:?}")).collect();
    Compared { rows: outcome.rows, proven: outcome.proven, messages: outcome.messages, findings }
}

fn row(message: &Logged, shift: i64) -> Option<ArchivedRow> {
    Some(ArchivedRow {
        id: message.offset,
        key: message.key.clone()?,
        seq: message.seq?,
        message_id: message.message_id?,
        topic: "topic".to_owned(),
        partition: 0,
        offset: message.offset.checked_add(shift)?,
        replay_of: message.replay_of,
        value_hash: message.value_hash.clone().unwrap_or_default(),
    })
}

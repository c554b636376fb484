//! What a verification found: figures, places and names, no payloads. Meant to be kept.

use chrono::{DateTime, Utc};
use serde::Serialize;
use uuid::Uuid;

use super::{
    comparison::{Logged, Outcome},
    records::Known,
};

/// At most this many findings, and this many copies, are listed; all are counted.
pub const MAX_LISTED: usize = 100_000;

/// What a verification found.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Report {
    /// When, by the database's clock.
    pub made_at: DateTime<Utc>,
    /// Rows published then or later were looked at.
    pub from: DateTime<Utc>,
    /// Up to then, that moment excluded.
    pub to: DateTime<Utc>,
    /// Only of this topic.
    pub topic: Option<String>,
    /// Kafka was read this many seconds before and after the window, too.
    pub margin_seconds: u64,
    /// The database.
    pub database: DatabaseIdentity,
    /// The Kafka cluster's own id.
    pub kafka_cluster_id: String,
    /// Messages of these `ce_source`s are ours.
    pub sources: Vec<String>,
    /// Since when the archive speaks of the window: later than `from` where nothing older is left.
    pub archive_since: DateTime<Utc>,
    /// What was read of each partition.
    pub partitions: Vec<PartitionReport>,
    /// Everything counted.
    pub totals: Totals,
    /// What contradicts the archive.
    pub findings: Vec<Finding>,
    /// Messages of ours that stand in Kafka and that no row knows: a foreign producer sent them, or the database
    /// went back in time and forgot them.
    pub unmatched: Vec<Unmatched>,
    /// Messages that were appended, in whatever window, and are in no table any more.
    pub vanished: Vec<Vanished>,
    /// Keys whose messages stand in more than one partition.
    pub moved_keys: Vec<MovedKey>,
    /// Messages that stand in Kafka more than once, as at-least-once allows.
    pub copies: Vec<FurtherCopy>,
    /// Findings, unmatched messages and copies that are counted but not listed.
    pub unlisted: u64,
    /// SHA-256 over a line `id,ce_id,topic,partition,offset` for each row, in order of topic (by bytes),
    /// partition, offset and id, each line ended by a line feed.
    pub rows_sha256: String,
    /// What it comes to.
    pub verdict: Verdict,
}

/// Which database a report speaks of.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct DatabaseIdentity {
    /// Its name.
    pub name: String,
    /// PostgreSQL's version.
    pub server_version: String,
    /// The cluster's own number, which copies of it share; where it may be read.
    pub system_identifier: Option<String>,
}

/// What a verification comes to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Copy)]
#[serde(rename_all = "camelCase")]
pub enum Verdict {
    /// Every row stands in Kafka where the archive says, and nothing contradicts it.
    Proven,
    /// Nothing contradicts, but something can't be proven any more.
    NotFullyProvable,
    /// Something contradicts.
    Contradicted,
}

/// One partition.
#[derive(Debug, Clone, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PartitionReport {
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Whether its topic exists.
    pub topic_exists: bool,
    /// Whether it exists itself.
    pub exists: bool,
    /// First offset that was kept before reading.
    pub low: i64,
    /// End of what was readable before reading.
    pub high: i64,
    /// First offset that was asked for.
    pub from: i64,
    /// Where reading ended, that offset excluded.
    pub to: i64,
    /// Messages read.
    pub messages: u64,
    /// Rows of the window.
    pub rows: u64,
    /// Of them, found as the archive says.
    pub proven: u64,
}

/// Everything counted.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Totals {
    /// Rows of the window.
    pub rows: u64,
    /// Of them, those that send another one again.
    pub replays: u64,
    /// Rows found at their offset, with their id, key, place in the key and value, in order.
    pub proven: u64,
    /// Rows below the first offset that Kafka still has.
    pub expired: u64,
    /// Rows of topics that are gone.
    pub topic_gone: u64,
    /// Rows of compacted topics at whose offset nothing stands any more.
    pub compacted: u64,
    /// Rows that name no position and were sent again since.
    pub sent_again: u64,
    /// Keys whose messages stand in more than one partition.
    pub moved_keys: u64,
    /// Rows behind an open transaction of another producer: nobody may read them yet.
    pub open_transaction: u64,
    /// Messages read.
    pub messages: u64,
    /// Of them, those of other senders.
    pub other_senders: u64,
    /// Of ours, those whose row was published outside the window, or that were sent outside it.
    pub outside: u64,
    /// Messages of the window that were sent before the archive begins.
    pub before_archive: u64,
    /// Messages whose row is still in the outbox, or parked.
    pub not_archived: u64,
    /// Further copies of archived messages.
    pub copies: u64,
    /// Of them, copies of replays.
    pub replay_copies: u64,
    /// Rows that name no position: nothing says that the broker has their messages.
    pub no_position: u64,
    /// Rows whose message is not at its place.
    pub missing: u64,
    /// Rows, and copies, that differ from the message in Kafka.
    pub different: u64,
    /// Rows that name a message another row names too.
    pub shared: u64,
    /// Rows out of the order of their key.
    pub out_of_order: u64,
    /// Rows that do not follow the one before them in their key.
    pub sequence: u64,
    /// Messages of ours that no row knows.
    pub unmatched: u64,
    /// Messages that were appended and are in no table, with nothing of their key behind them.
    pub vanished: u64,
    /// Rows that are not out yet; no part of the proof.
    pub pending: u64,
    /// Rows that are held back; no part of the proof.
    pub parked: u64,
}

/// Something that contradicts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Finding {
    /// What kind.
    pub kind: FindingKind,
    /// In words.
    pub what: String,
    /// The archive's row; none for a message that no row knows.
    pub row_id: Option<i64>,
    /// Key.
    pub key: Option<String>,
    /// Place in the key.
    pub seq: Option<i64>,
    /// The message's id.
    pub ce_id: Option<Uuid>,
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Offset: the archive's for a row, the message's own for one that no row knows.
    pub offset: i64,
}

/// Kinds of findings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub enum FindingKind {
    /// The row names no position.
    NoPosition,
    /// The message is not there.
    Missing,
    /// It is there, and differs.
    Different,
    /// Two rows name it.
    Shared,
    /// It is out of the order of its key.
    OutOfOrder,
    /// The message before it in its key is missing, or its place is taken twice.
    Sequence,
}

/// A message of ours that stands in Kafka and that no row knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Unmatched {
    /// The message's id.
    pub ce_id: Option<Uuid>,
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
    /// Key.
    pub key: Option<String>,
    /// Place in the key.
    pub aggregate_seq: Option<i64>,
    /// The row it sends again.
    pub replay_of: Option<i64>,
    /// When it was sent.
    pub sent_at: Option<DateTime<Utc>>,
    /// The row of another message that has the same number in the same key.
    pub number_also_of: Option<i64>,
}

/// A key whose messages stand in more than one partition of a topic: partitions were added, or the topic was made
/// anew with another number of them. Kafka keeps no order across partitions.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct MovedKey {
    /// Key.
    pub key: String,
    /// Topic.
    pub topic: String,
    /// The partitions.
    pub partitions: Vec<i32>,
}

/// The end of a key that is in no table: its counter says that more was appended. Something took the rows out of
/// the database before they were sent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct Vanished {
    /// Key.
    pub key: String,
    /// The last message that is out, in the outbox or parked; 0 for none.
    pub known_seq: i64,
    /// The last that was appended.
    pub last_seq: i64,
}

/// A message that stands in Kafka beside its archived place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct FurtherCopy {
    /// The archive's row.
    pub row_id: i64,
    /// The row it sends again.
    pub replay_of: Option<i64>,
    /// Key.
    pub key: Option<String>,
    /// Place in the key.
    pub seq: Option<i64>,
    /// The message's id.
    pub ce_id: Option<Uuid>,
    /// Topic.
    pub topic: String,
    /// The partition the archive names.
    pub partition: i32,
    /// The offset the archive names.
    pub offset: i64,
    /// The copy's partition.
    pub also_in: i32,
    /// The copy's offset.
    pub also_at: i64,
}

impl Report {
    /// Counts a finding, and lists it while there is room.
    pub(crate) fn found(&mut self, finding: Finding) {
        let totals = &mut self.totals;
        *match finding.kind {
            FindingKind::NoPosition => &mut totals.no_position,
            FindingKind::Missing => &mut totals.missing,
            FindingKind::Different => &mut totals.different,
            FindingKind::Shared => &mut totals.shared,
            FindingKind::OutOfOrder => &mut totals.out_of_order,
            FindingKind::Sequence => &mut totals.sequence,
        } += 1;
        list(&mut self.findings, finding, &mut self.unlisted);
    }

    /// Counts a message that no row knows, and lists it while there is room.
    pub(crate) fn unmatched(&mut self, part: &PartitionReport, message: Logged, number_also_of: Option<i64>) {
        self.totals.unmatched += 1;
        let unmatched = Unmatched {
            ce_id: message.message_id,
            topic: part.topic.clone(),
            partition: part.partition,
            offset: message.offset,
            key: message.key,
            aggregate_seq: message.seq,
            replay_of: message.replay_of,
            sent_at: message.timestamp.and_then(DateTime::from_timestamp_millis),
            number_also_of,
        };
        list(&mut self.unmatched, unmatched, &mut self.unlisted);
    }

    /// Counts a copy, and lists it while there is room.
    pub(crate) fn copied(&mut self, part: &PartitionReport, message: Logged, row: &Known) {
        self.totals.copies += 1;
        self.totals.replay_copies += u64::from(row.replay_of.is_some());
        let (partition, offset) = row.place.unwrap_or((part.partition, message.offset));
        let copy = FurtherCopy {
            row_id: row.id,
            replay_of: row.replay_of,
            key: message.key,
            seq: message.seq,
            ce_id: message.message_id,
            topic: part.topic.clone(),
            partition,
            offset,
            also_in: part.partition,
            also_at: message.offset,
        };
        list(&mut self.copies, copy, &mut self.unlisted);
    }

    /// Adds what became of a partition's rows.
    pub(crate) fn add(&mut self, outcome: Outcome) {
        let totals = &mut self.totals;
        totals.rows += outcome.rows;
        totals.replays += outcome.replays;
        totals.proven += outcome.proven;
        totals.expired += outcome.expired;
        totals.topic_gone += outcome.topic_gone;
        totals.open_transaction += outcome.open_transaction;
        totals.compacted += outcome.compacted;
        totals.messages += outcome.messages;
        totals.other_senders += outcome.other_senders;
        outcome.findings.into_iter().for_each(|finding| self.found(finding));
    }
}

impl PartitionReport {
    /// How many offsets were asked for.
    pub(crate) fn offsets(&self) -> u64 {
        (self.to - self.from).max(0) as u64
    }

    /// A finding about a message that is at no row's place.
    pub(crate) fn finding(&self, kind: FindingKind, what: String, message: Logged) -> Finding {
        Finding {
            kind,
            what,
            row_id: None,
            key: message.key,
            seq: message.seq,
            ce_id: message.message_id,
            topic: self.topic.clone(),
            partition: self.partition,
            offset: message.offset,
        }
    }
}

impl Totals {
    /// How many things contradict.
    pub fn contradictions(&self) -> u64 {
        let rows = self.no_position + self.missing + self.different + self.shared + self.out_of_order + self.sequence;
        rows + self.unmatched + self.vanished
    }

    /// How many rows, messages and keys can't be proven, or not any more.
    pub fn unprovable(&self) -> u64 {
        let rows = self.expired + self.topic_gone + self.compacted + self.sent_again + self.open_transaction;
        rows + self.before_archive + self.moved_keys
    }

    pub(crate) fn verdict(&self) -> Verdict {
        match (self.contradictions(), self.unprovable()) {
            (0, 0) => Verdict::Proven,
            (0, _) => Verdict::NotFullyProvable,
            _ => Verdict::Contradicted,
        }
    }
}

fn list<T>(list: &mut Vec<T>, item: T, unlisted: &mut u64) {
    match list.len() < MAX_LISTED {
        true => list.push(item),
        false => *unlisted += 1,
    }
}

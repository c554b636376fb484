//! The reconciler: holds the archive's rows of a window against what stands in Kafka.
//!
//! # What is proven
//!
//! For every row of `outbox_archive` published in the window (half-open, by the database's clock):
//! at its topic, partition and offset stands a message with its `ce_id`, key, `aggregate-seq`,
//! `replay-of` and, byte for byte, its value; no other row names that message; and within its
//! partition the first occurrence that was read of each message stands behind those of all earlier
//! messages of its key. In the archive, the messages of a key follow each other without a gap.
//!
//! And the other way round: every message of ours that was read, sent in the window, is known to the
//! archive, the outbox or the parking lot. One that is not came from a foreign producer, or its
//! database was lost or went back in time (see `unmatched` in the report).
//!
//! A row that names no position (offset below 0) contradicts, whatever Kafka still has. Earlier releases took
//! a delivery report without an offset for an acknowledgement.
//!
//! And of every key, whatever the window: the last message that was appended is out, in the outbox or parked.
//!
//! # What is not proven
//!
//! - The other headers, `saga_id` and the times: who changes those in the archive is not found out. A row whose
//!   `published_at` was moved out of the window is not looked at; its message counts as outside.
//! - The order of messages of a key in different topics or partitions: Kafka has none.
//!
//! # What is no contradiction
//!
//! - A further copy of an archived message, before or behind it: a relay that dies between the broker's
//!   acknowledgement and the archive's commit leaves one. Copies are counted and listed, and have to
//!   carry the same value. Replays have rows, and places, of their own.
//! - What can't be proven any more: rows below the first offset that Kafka still has, rows of topics
//!   that are gone, rows that compaction may have taken, messages from before the archive begins. They are
//!   counted, and the verdict is [`Verdict::NotFullyProvable`].
//! - Keys whose messages stand in several partitions of a topic, because partitions were added. They are
//!   listed, and the verdict is the same: Kafka keeps no order across partitions.
//! - Rows that name no position and were sent again since, with the same verdict.
//! - Offsets at which nothing stands: markers of transactions, compaction.
//!
//! # What it reads
//!
//! Of every partition of every topic with rows in the window, and of [`Window::written_topics`] (or of the one
//! topic that was asked for):
//! from the first to the last row's offset, and at least what was sent from `margin` before the window
//! to `margin` after it. A copy further away is not seen. Memory grows with the keys of one partition,
//! not with the window: see `comparison`. Nothing is written, in Kafka or in PostgreSQL.
//!
//! A window that ends now may end between a row and its commit: to compare the SHA-256 of two reports,
//! let it end a minute ago. Ask the primary: a replica that lags knows less than Kafka does.

pub(crate) mod comparison;
pub(crate) mod log_reader;
mod plan;
pub(crate) mod records;
mod report;
mod strays;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

pub use log_reader::LogError;
pub use report::{
    DatabaseIdentity, Finding, FindingKind, FurtherCopy, MAX_LISTED, MovedKey, PartitionReport, Report, Totals,
    Unmatched, Vanished, Verdict,
};

use crate::{KafkaSettings, admin};
use comparison::{Bounds, Compaction, Comparison, Logged, Outcome};
use log_reader::{LogReader, Stretch};
use plan::plan;
use records::{ArchivedRow, Overview, Records, Share};
use strays::{Stray, Times};

/// What to verify.
#[derive(Debug, Clone)]
pub struct Window {
    /// From this moment, the moment included.
    pub from: DateTime<Utc>,
    /// To this moment, the moment excluded.
    pub to: DateTime<Utc>,
    /// Only this topic.
    pub topic: Option<String>,
    /// Topics that are read even if no row of the window names them, unless one topic is asked for. Those that don't
    /// exist are passed over.
    pub written_topics: Vec<String>,
    /// Messages with this `ce_source` are ours, beside those the archive names.
    pub source: String,
    /// How long before and after the window Kafka is read, to see copies near its ends.
    pub margin: Duration,
}

/// How far a verification is.
#[derive(Debug, Clone, Copy, Default)]
pub struct Progress {
    /// Offsets gone through.
    pub offsets: u64,
    /// Offsets to go through.
    pub of: u64,
    /// Rows held against them.
    pub rows: u64,
}

/// Why there is no report.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// The database failed.
    #[error("the database: {0}")]
    Database(#[from] sqlx::Error),
    /// Kafka failed.
    #[error(transparent)]
    Kafka(#[from] LogError),
}

/// The database's clock: what windows are cut by.
pub async fn clock(conn: &mut PgConnection) -> Result<DateTime<Utc>, sqlx::Error> {
    sqlx::query_scalar("select clock_timestamp()").fetch_one(conn).await
}

/// Verifies a window. Give it a connection of its own, without a statement timeout; it needs no more
/// than SELECT. `progress` is called often.
pub async fn verify(
    conn: &mut PgConnection,
    kafka: &KafkaSettings,
    window: &Window,
    mut progress: impl FnMut(Progress),
) -> Result<Report, VerifyError> {
    let (mut verification, shares) = Verification::begin(conn, kafka, window).await?;
    let plan = plan(&verification.log, &shares, window).await?;
    let mut done = Progress { of: plan.iter().map(PartitionReport::offsets).sum(), ..Progress::default() };
    for mut part in plan {
        let (before, from) = (done, part.from);
        let so_far = |offset: i64, rows: u64| {
            let offsets = before.offsets + (offset - from) as u64;
            progress(Progress { offsets, rows: before.rows + rows, ..before });
        };
        match part.exists {
            true => verification.check(&mut part, so_far).await?,
            false => verification.no_partition(&mut part).await?,
        }
        done.offsets += part.offsets();
        done.rows += part.rows;
        verification.report.partitions.push(part);
    }
    verification.end().await
}

/// Messages that no row claims are looked up so many at a time.
const LOOK_UP: usize = 1000;

struct Verification<'c> {
    log: LogReader,
    records: Records<'c>,
    sources: BTreeSet<String>,
    times: Times,
    report: Report,
    /// Rows that name no position.
    unpositioned: Vec<ArchivedRow>,
    /// Where the messages of such rows stand, as far as they were read, by row.
    found: BTreeMap<i64, (i32, i64)>,
}

impl<'c> Verification<'c> {
    async fn begin(
        conn: &'c mut PgConnection,
        kafka: &KafkaSettings,
        window: &Window,
    ) -> Result<(Self, Vec<Share>), VerifyError> {
        let log = LogReader::new(kafka)?;
        // First: a broker that is away should not be found out after millions of rows were sorted.
        let kafka_cluster_id = log.cluster_id().await?;
        let made_at = clock(conn).await?;
        let database = records::identity(conn).await?;
        let figures = admin::figures(conn).await?;
        let (records, overview) = Records::open(conn, &(window.from..window.to), window.topic.as_deref()).await?;
        let Overview { shares, sources, since, findings, vanished, moved, moved_keys } = overview;
        let sources: BTreeSet<String> = sources.into_iter().chain([window.source.clone()]).collect();
        let times = Times {
            window: window.from.timestamp_millis()..window.to.timestamp_millis(),
            archive_since: since.timestamp_millis(),
        };
        let mut report = Report {
            made_at,
            from: window.from,
            to: window.to,
            topic: window.topic.clone(),
            margin_seconds: window.margin.as_secs(),
            database,
            kafka_cluster_id,
            sources: sources.iter().cloned().collect(),
            archive_since: since,
            partitions: Vec::new(),
            totals: Totals {
                pending: figures.pending as u64,
                parked: figures.parked as u64,
                moved_keys,
                vanished: vanished.iter().map(|key| (key.last_seq - key.known_seq) as u64).sum(),
                ..Totals::default()
            },
            findings: Vec::new(),
            unmatched: Vec::new(),
            vanished,
            moved_keys: moved,
            copies: Vec::new(),
            unlisted: 0,
            rows_sha256: String::new(),
            verdict: Verdict::Proven,
        };
        findings.into_iter().for_each(|finding| report.found(finding));
        let (unpositioned, found) = (Vec::new(), BTreeMap::new());
        Ok((Self { log, records, sources, times, report, unpositioned, found }, shares))
    }

    /// Rows and messages of one partition, side by side.
    async fn check(&mut self, part: &mut PartitionReport, mut so_far: impl FnMut(i64, u64)) -> Result<(), VerifyError> {
        let (topic, partition) = (part.topic.clone(), part.partition);
        let here = |row: &ArchivedRow| row.topic == topic && row.partition == partition;
        let sources = self.sources.clone();
        let mut comparison = Comparison::new(part.low, &sources);
        let log = self.log.clone();
        let mut reading = log.read(Stretch { topic: &topic, partition, from: part.from, to: part.to })?;
        while let Some(message) = reading.next().await? {
            while let Some(row) = self.records.next_if(|row| here(row) && row.offset <= message.offset).await? {
                comparison.row(row, Some(&message));
            }
            so_far(message.offset, comparison.rows());
            comparison.message(message);
            let strays = comparison.strays(LOOK_UP);
            self.look_up(part, strays).await?;
        }
        while let Some(row) = self.records.next_if(here).await? {
            comparison.row(row, None);
        }
        let strays = comparison.strays(0);
        self.look_up(part, strays).await?;
        let bounds = match comparison.has_empty_places() {
            true => {
                let (low, readable) = log.bounds(&topic, partition).await?;
                let (high, compaction) = (log.end(&topic, partition).await?, log.compaction(&topic).await);
                Bounds { low, readable, high, compaction }
            }
            false => Bounds { low: part.low, readable: part.high, high: part.high, compaction: Compaction::Off },
        };
        let mut outcome = comparison.finish(bounds);
        self.unpositioned.append(&mut outcome.unpositioned);
        (part.messages, part.rows, part.proven) = (outcome.messages, outcome.rows, outcome.proven);
        self.report.add(outcome);
        Ok(())
    }

    /// A topic that is gone can prove nothing any more; one that is there never had that partition.
    async fn no_partition(&mut self, part: &mut PartitionReport) -> Result<(), VerifyError> {
        let here = |row: &ArchivedRow| row.topic == part.topic && row.partition == part.partition;
        let mut outcome = Outcome::default();
        while let Some(row) = self.records.next_if(here).await? {
            outcome.add_row(&row);
            if !row.has_position() {
                self.unpositioned.push(row);
            } else if part.topic_exists {
                let what = "the topic has no such partition".to_owned();
                outcome.findings.push(row.finding(FindingKind::Missing, what));
            } else {
                outcome.topic_gone += 1;
            }
        }
        part.rows = outcome.rows;
        self.report.add(outcome);
        Ok(())
    }

    async fn look_up(&mut self, part: &PartitionReport, strays: Vec<Logged>) -> Result<(), VerifyError> {
        if strays.is_empty() {
            return Ok(());
        }
        let known = self.records.look_up(&strays).await?;
        let mut unmatched = Vec::new();
        for (message, known) in strays.into_iter().zip(&known) {
            match strays::judge(&message, &part.topic, part.partition, known, &self.times) {
                Stray::Outside | Stray::Beyond => self.report.totals.outside += 1,
                Stray::NotArchived => self.report.totals.not_archived += 1,
                Stray::BeforeArchive => self.report.totals.before_archive += 1,
                Stray::Copy(row) => self.report.copied(part, message, row),
                Stray::Unpositioned(row) => {
                    self.found.entry(row.id).or_insert((part.partition, message.offset));
                }
                Stray::Altered(row) => {
                    let what = format!("it repeats row {} with another value", row.id);
                    self.report.found(part.finding(FindingKind::Different, what, message));
                }
                Stray::Unmatched => unmatched.push(message),
            }
        }
        let numbers = self.records.holders_of_number(&unmatched).await?;
        for (message, number_also_of) in unmatched.into_iter().zip(numbers) {
            self.report.unmatched(part, message, number_also_of);
        }
        Ok(())
    }

    /// Rows without a position: nothing but Kafka itself can say whether their messages are there.
    async fn conclude_unpositioned(&mut self) -> Result<(), VerifyError> {
        let sent_again = self.records.sent_again(&self.unpositioned).await?;
        for row in std::mem::take(&mut self.unpositioned) {
            if sent_again.contains(&row.id) {
                self.report.totals.sent_again += 1;
                continue;
            }
            let what = match self.found.get(&row.id) {
                Some((partition, offset)) => {
                    format!(
                        "the archive names no position; its message stands in partition {partition} at offset {offset}"
                    )
                }
                None => "the archive names no position, and its message was not found in what was read: send it \
                         again by a replay"
                    .to_owned(),
            };
            self.report.found(row.finding(FindingKind::NoPosition, what));
        }
        Ok(())
    }

    async fn end(mut self) -> Result<Report, VerifyError> {
        self.conclude_unpositioned().await?;
        let Self { log, records, mut report, .. } = self;
        report.rows_sha256 = records.close().await?;
        report.verdict = report.totals.verdict();
        // Leaving Kafka blocks; it has nothing to say any more.
        let _ = tokio::task::spawn_blocking(move || drop(log)).await;
        Ok(report)
    }
}

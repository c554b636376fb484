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
//! database was lost.
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
//!   that are gone, messages from before the archive begins. They are counted, and the verdict is
//!   [`Verdict::NotFullyProvable`].
//! - Offsets at which nothing stands: markers of transactions, compaction.
//!
//! # What it reads
//!
//! Of every partition of every topic with rows in the window (or of the one topic that was asked for):
//! from the first to the last row's offset, and at least what was sent from `margin` before the window
//! to `margin` after it. A copy further away is not seen. Memory grows with the keys of one partition,
//! not with the window: see `comparison`. Nothing is written, in Kafka or in PostgreSQL.
//!
//! A window that ends now may end between a row and its commit: to compare the SHA-256 of two reports,
//! let it end a minute ago. Ask the primary: a replica that lags knows less than Kafka does.

mod comparison;
mod log_reader;
mod plan;
mod records;
mod report;
mod strays;

use std::{collections::BTreeSet, time::Duration};

use chrono::{DateTime, Utc};
use sqlx::PgConnection;

pub use log_reader::LogError;
pub use report::{
    DatabaseIdentity, Finding, FindingKind, FurtherCopy, MAX_LISTED, PartitionReport, Report, Totals, Vanished, Verdict,
};

use crate::{KafkaSettings, admin};
use comparison::{Bounds, Comparison, Logged, Outcome};
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
        let Overview { shares, sources, since, findings, vanished } = overview;
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
                vanished: vanished.iter().map(|key| (key.last_seq - key.known_seq) as u64).sum(),
                ..Totals::default()
            },
            findings: Vec::new(),
            vanished,
            copies: Vec::new(),
            unlisted: 0,
            rows_sha256: String::new(),
            verdict: Verdict::Proven,
        };
        findings.into_iter().for_each(|finding| report.found(finding));
        Ok((Self { log, records, sources, times, report }, shares))
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
                Bounds { low, readable, high: log.end(&topic, partition).await? }
            }
            false => Bounds { low: part.low, readable: part.high, high: part.high },
        };
        let outcome = comparison.finish(bounds);
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
            if part.topic_exists {
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
        for (message, known) in strays.into_iter().zip(&known) {
            match strays::judge(&message, &part.topic, part.partition, known, &self.times) {
                Stray::Outside | Stray::Beyond => self.report.totals.outside += 1,
                Stray::NotArchived => self.report.totals.not_archived += 1,
                Stray::BeforeArchive => self.report.totals.before_archive += 1,
                Stray::Copy(row) => self.report.copied(part, message, row),
                Stray::Altered(row) => {
                    let what = format!("it repeats row {} with another value", row.id);
                    self.report.found(part.finding(FindingKind::Different, what, message));
                }
                Stray::Unknown => {
                    let what = "no row has this ce_id, key and aggregate-seq".to_owned();
                    self.report.found(part.finding(FindingKind::Unknown, what, message));
                }
            }
        }
        Ok(())
    }

    async fn end(self) -> Result<Report, VerifyError> {
        let Self { log, records, mut report, .. } = self;
        report.rows_sha256 = records.close().await?;
        report.verdict = report.totals.verdict();
        // Leaving Kafka blocks; it has nothing to say any more.
        let _ = tokio::task::spawn_blocking(move || drop(log)).await;
        Ok(report)
    }
}

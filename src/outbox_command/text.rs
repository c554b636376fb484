//! Reports as text, for people.

use std::{fmt::Write, time::Duration};

use chrono::{DateTime, SecondsFormat, Utc};
use outbox_relay::verify::{
    Finding, FurtherCopy, MovedKey, PartitionReport, Progress, Report, Totals, Unmatched, Vanished,
};

use super::verify::Product;

/// At most this many findings and copies are spelt out.
const SPELT_OUT: usize = 50;

/// The whole report.
pub fn report(product: &Product) -> String {
    let Product { made_by, report } = product;
    let mut text = format!("{made_by}: what the archive says, held against Kafka\n\n");
    for (name, value) in head(report) {
        line(&mut text, name, &value);
    }
    text.push('\n');
    partitions(&mut text, &report.partitions);
    text.push('\n');
    for (name, count) in figures(&report.totals) {
        line(&mut text, name, &count.to_string());
    }
    line(&mut text, "SHA-256 of rows", &report.rows_sha256);
    let Totals { vanished: gone, unmatched: forgotten, moved_keys, .. } = report.totals;
    let of_rows = report.totals.contradictions() - gone - forgotten;
    listed(&mut text, "contradictions", of_rows, &report.findings, finding);
    listed(&mut text, "unmatched: in Kafka, and not in the database", forgotten, &report.unmatched, unmatched);
    listed(&mut text, "vanished from the database", report.vanished.len() as u64, &report.vanished, vanished);
    let moved = "partitions were added: order across partitions is not proven";
    listed(&mut text, moved, moved_keys, &report.moved_keys, moved_key);
    listed(&mut text, "copies", report.totals.copies, &report.copies, copy);
    text.push('\n');
    text + &conclusion(report) + "\n"
}

/// What it comes to, in one line.
pub fn conclusion(report: &Report) -> String {
    let totals = &report.totals;
    let proven = format!("proven {} of {}", totals.proven, totals.rows);
    match (totals.contradictions(), reasons(totals)) {
        (0, reasons) if reasons.is_empty() => match totals.copies {
            _ if totals.rows == 0 => format!("{proven}: the archive has no row of this window"),
            0 => format!("{proven}: each once, at its offset, in order"),
            copies => format!("{proven}: each at its offset, in order; beside them {copies} more copies"),
        },
        (0, reasons) => format!("{proven}; nothing contradicts, but not everything can be proven any more: {reasons}"),
        (contradictions, _) => format!("{proven}; CONTRADICTED {contradictions} times, listed in the report"),
    }
}

/// How far it is.
pub fn progress(progress: &Progress, elapsed: Duration) -> String {
    let seconds = elapsed.as_secs_f64().max(0.001);
    let rate = progress.rows as f64 / seconds;
    let left = match progress.offsets {
        0 => String::new(),
        done => {
            let left = progress.of.saturating_sub(done) as f64 * seconds / done as f64;
            format!(", about {} left", humantime::format_duration(Duration::from_secs(left as u64)))
        }
    };
    format!("{} rows, {rate:.0} rows/s, {} of {} offsets{left}", progress.rows, progress.offsets, progress.of)
}

fn head(report: &Report) -> Vec<(&'static str, String)> {
    let database = &report.database;
    let system = database.system_identifier.as_ref().map(|id| format!(", system {id}")).unwrap_or_default();
    let mut head = vec![
        ("made", format!("{} by the database's clock", moment(report.made_at))),
        ("window", format!("{} to {}, that moment excluded", moment(report.from), moment(report.to))),
        (
            "topic",
            report
                .topic
                .clone()
                .unwrap_or_else(|| "all that have rows in the window, and those that the service writes to".to_owned()),
        ),
        ("database", format!("{}, PostgreSQL {}{system}", database.name, database.server_version)),
        ("Kafka cluster", report.kafka_cluster_id.clone()),
        ("our ce_source", report.sources.join(", ")),
        ("margin", format!("{} s before and after the window", report.margin_seconds)),
    ];
    if report.archive_since > report.from {
        head.push(("archive begins", moment(report.archive_since)));
    }
    head
}

fn partitions(text: &mut String, partitions: &[PartitionReport]) {
    let width = partitions.iter().map(|part| part.topic.len()).max().unwrap_or(0).max("topic".len());
    let _ = writeln!(text, "{:width$}  partition  {:>24}  messages      rows    proven", "topic", "offsets read");
    for part in partitions {
        let read = match (part.exists, part.from < part.to) {
            (false, _) => "not there".to_owned(),
            (true, false) => "nothing".to_owned(),
            (true, true) => format!("{} to {}", part.from, part.to - 1),
        };
        let PartitionReport { topic, partition, messages, rows, proven, .. } = part;
        let _ = writeln!(text, "{topic:width$}  {partition:>9}  {read:>24}  {messages:>8}  {rows:>8}  {proven:>8}");
    }
}

fn figures(totals: &Totals) -> Vec<(&'static str, u64)> {
    let always = [("rows", totals.rows), ("proven", totals.proven), ("messages read", totals.messages)];
    let if_any = [
        ("replays", totals.replays),
        ("copies", totals.copies),
        ("  of replays", totals.replay_copies),
        ("no position", totals.no_position),
        ("missing", totals.missing),
        ("different", totals.different),
        ("shared", totals.shared),
        ("out of order", totals.out_of_order),
        ("broken sequence", totals.sequence),
        ("unmatched", totals.unmatched),
        ("vanished", totals.vanished),
        ("expired", totals.expired),
        ("topic gone", totals.topic_gone),
        ("compacted", totals.compacted),
        ("sent again", totals.sent_again),
        ("moved keys", totals.moved_keys),
        ("not readable yet", totals.open_transaction),
        ("before archive", totals.before_archive),
        ("outside window", totals.outside),
        ("other senders", totals.other_senders),
        ("not archived yet", totals.not_archived),
        ("not out yet", totals.pending),
        ("parked", totals.parked),
    ];
    always.into_iter().chain(if_any.into_iter().filter(|(_, count)| *count > 0)).collect()
}

fn reasons(totals: &Totals) -> String {
    let reasons = [
        (totals.expired, "rows below the first offset that Kafka still has"),
        (totals.topic_gone, "rows of topics that are gone"),
        (totals.compacted, "rows of compacted topics, which can't be proven"),
        (totals.sent_again, "rows without a position that were sent again since"),
        (
            totals.moved_keys,
            "keys in more than one partition: partitions were added, and order across them is not proven",
        ),
        (totals.open_transaction, "rows behind another producer's open transaction"),
        (totals.before_archive, "messages from before the archive begins"),
    ];
    let any: Vec<_> = reasons.iter().filter(|(n, _)| *n > 0).map(|(n, what)| format!("{n} {what}")).collect();
    any.join(", ")
}

fn listed<T>(text: &mut String, what: &str, count: u64, items: &[T], spelt: fn(&T) -> String) {
    if count == 0 {
        return;
    }
    let _ = writeln!(text, "\n{what}:");
    for item in items.iter().take(SPELT_OUT) {
        let _ = writeln!(text, "  {}", spelt(item));
    }
    let shown = items.len().min(SPELT_OUT) as u64;
    if count > shown {
        let _ = writeln!(text, "  and {} more: --json lists up to 100,000", count - shown);
    }
}

fn finding(finding: &Finding) -> String {
    let row = finding.row_id.map(|id| format!("row {id}, ")).unwrap_or_default();
    let Finding { kind, what, topic, partition, offset, .. } = finding;
    let message = message(finding.key.as_deref(), finding.seq, finding.ce_id);
    format!("{kind:?}: {row}{message}, {topic} partition {partition} offset {offset}: {what}")
}

fn unmatched(unmatched: &Unmatched) -> String {
    let Unmatched { topic, partition, offset, .. } = unmatched;
    let message = message(unmatched.key.as_deref(), unmatched.aggregate_seq, unmatched.ce_id);
    let sent = unmatched.sent_at.map(|at| format!(", sent {}", moment(at))).unwrap_or_default();
    let also = unmatched.number_also_of.map(|row| format!("; row {row} has the same number")).unwrap_or_default();
    format!("{message}, {topic} partition {partition} offset {offset}{sent}{also}")
}

fn moved_key(MovedKey { key, topic, partitions }: &MovedKey) -> String {
    let partitions: Vec<_> = partitions.iter().map(i32::to_string).collect();
    format!("key {key:?} of {topic}: in partitions {}", partitions.join(", "))
}

fn vanished(Vanished { key, known_seq, last_seq }: &Vanished) -> String {
    format!("key {key:?}: appended up to number {last_seq}, and nothing behind number {known_seq} is in any table")
}

fn copy(copy: &FurtherCopy) -> String {
    let FurtherCopy { row_id, topic, partition, offset, also_in, also_at, .. } = copy;
    let message = message(copy.key.as_deref(), copy.seq, copy.ce_id);
    let partition_of_copy = if also_in == partition { String::new() } else { format!(" of partition {also_in}") };
    format!(
        "row {row_id}, {message}, {topic} partition {partition} offset {offset}: also at offset {also_at}{partition_of_copy}"
    )
}

/// Keys come from outside: shown escaped.
fn message(key: Option<&str>, seq: Option<i64>, ce_id: Option<uuid::Uuid>) -> String {
    let key = key.map_or("no key".to_owned(), |key| format!("key {key:?}"));
    let seq = seq.map_or("without number".to_owned(), |seq| format!("number {seq}"));
    let ce_id = ce_id.map_or("without ce_id".to_owned(), |id| format!("ce_id {id}"));
    format!("{key} {seq}, {ce_id}")
}

fn moment(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Millis, true)
}

/// Writing to a String can't fail.
fn line(text: &mut String, name: &str, value: &str) {
    let _ = writeln!(text, "{name:17}{value}");
}

//! What to read of Kafka for a window.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    Window,
    log_reader::{LogError, LogReader},
    records::Share,
    report::PartitionReport,
};

/// Every partition of every topic concerned, in the order of the rows.
pub(crate) async fn plan(log: &LogReader, shares: &[Share], window: &Window) -> Result<Vec<PartitionReport>, LogError> {
    // With a database that went back in time, the archive may name none of the topics that were written to.
    let written: &[String] = if window.topic.is_none() { &window.written_topics } else { &[] };
    let topics: BTreeSet<&String> =
        shares.iter().map(|share| &share.topic).chain(&window.topic).chain(written).collect();
    let mut plan = Vec::new();
    for topic in topics {
        let existing: BTreeSet<i32> = log.partitions(topic).await?.into_iter().collect();
        let shares: BTreeMap<i32, &Share> =
            shares.iter().filter(|share| share.topic == *topic).map(|share| (share.partition, share)).collect();
        // A row may name a partition that is not there.
        for partition in existing.union(&shares.keys().copied().collect()).copied() {
            let part = PartitionReport {
                topic: topic.clone(),
                partition,
                topic_exists: !existing.is_empty(),
                exists: existing.contains(&partition),
                ..PartitionReport::default()
            };
            let share = shares.get(&partition).copied();
            plan.push(if part.exists { bounded(log, part, share, window).await? } else { part });
        }
    }
    Ok(plan)
}

/// From the first row's offset to the last one's, and at least the window's time with its margin.
async fn bounded(
    log: &LogReader,
    part: PartitionReport,
    share: Option<&Share>,
    window: &Window,
) -> Result<PartitionReport, LogError> {
    let (topic, partition) = (part.topic.as_str(), part.partition);
    let (low, high) = log.bounds(topic, partition).await?;
    let margin = i64::try_from(window.margin.as_millis()).unwrap_or(i64::MAX);
    let begins = window.from.timestamp_millis().saturating_sub(margin);
    let ends = window.to.timestamp_millis().saturating_add(margin);
    let begins = log.offset_at(topic, partition, begins).await?.unwrap_or(high);
    let ends = log.offset_at(topic, partition, ends).await?.unwrap_or(high);
    let (first, last) = share.map_or((None, None), |share| (share.first, share.last));
    let from = first.map_or(begins, |first| first.min(begins)).clamp(low, high);
    let to = last.map_or(ends, |last| last.saturating_add(1).max(ends)).clamp(from, high);
    Ok(PartitionReport { low, high, from, to, ..part })
}

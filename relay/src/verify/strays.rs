//! Messages of ours that stand where no row of the window says one should: what the rest of the
//! database knows of them. No I/O.

use std::ops::Range;

use super::{comparison::Logged, records::Known};

/// What such a message is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stray<'k> {
    /// A row published before or after the window is at this very place.
    Outside,
    /// It repeats this archived row, which is at another place.
    Copy(&'k Known),
    /// It is the message of this archived row, which names no position.
    Unpositioned(&'k Known),
    /// It repeats this row, with another value.
    Altered(&'k Known),
    /// Its row is still in the outbox, or parked.
    NotArchived,
    /// No row knows it, and it was sent at a time the archive does not speak of.
    BeforeArchive,
    /// As [`Stray::BeforeArchive`], at a time nobody asked about.
    Beyond,
    /// No row knows it.
    Unmatched,
}

/// The times, in milliseconds since 1970.
#[derive(Debug, Clone)]
pub(crate) struct Times {
    /// What was asked about.
    pub window: Range<i64>,
    /// Since when the archive goes back: retention has dropped what was before.
    pub archive_since: i64,
}

/// Decides about one message. `known` are the rows with its `ce_id`, key and place in the key.
pub(crate) fn judge<'k>(message: &Logged, topic: &str, partition: i32, known: &'k [Known], times: &Times) -> Stray<'k> {
    // A replay repeats its own row, not the one it sends again.
    let same = || known.iter().filter(|row| row.topic == topic && row.replay_of == message.replay_of);
    if let Some(row) = same().find(|row| message.value_hash.as_ref() != Some(&row.value_hash)) {
        return Stray::Altered(row);
    }
    if same().any(|row| row.place == Some((partition, message.offset))) {
        return Stray::Outside;
    }
    // A row that was sent again by an operator is archived, and its replay may be pending.
    if let Some(row) = same().find(|row| row.place.is_some() && !row.is_unpositioned()) {
        return Stray::Copy(row);
    }
    if let Some(row) = same().find(|row| row.is_unpositioned()) {
        return Stray::Unpositioned(row);
    }
    if same().next().is_some() {
        return Stray::NotArchived;
    }
    match message.timestamp {
        Some(at) if !times.window.contains(&at) => Stray::Beyond,
        Some(at) if at < times.archive_since => Stray::BeforeArchive,
        _ => Stray::Unmatched,
    }
}

#[cfg(test)]
mod tests {
    use uuid::Uuid;

    use super::*;

    const TIMES: Times = Times { window: 1000..2000, archive_since: 1200 };

    fn message(offset: i64) -> Logged {
        Logged {
            offset,
            timestamp: Some(1500),
            source: Some("test".to_owned()),
            message_id: Some(Uuid::nil()),
            key: Some("a".to_owned()),
            seq: Some(1),
            replay_of: None,
            value_hash: Some(vec![1]),
        }
    }

    fn known(id: i64, replay_of: Option<i64>, place: Option<(i32, i64)>) -> Known {
        Known { asked: 0, id, replay_of, topic: "t".to_owned(), value_hash: vec![1], place }
    }

    #[test]
    fn a_message_of_a_row_outside_the_window_is_no_copy() {
        let rows = [known(1, None, Some((0, 5)))];
        assert_eq!(judge(&message(5), "t", 0, &rows, &TIMES), Stray::Outside);
        assert_eq!(judge(&message(5), "t", 1, &rows, &TIMES), Stray::Copy(&rows[0]));
        assert_eq!(judge(&message(4), "t", 0, &rows, &TIMES), Stray::Copy(&rows[0]));
    }

    #[test]
    fn a_row_that_is_acknowledged_and_not_archived_yet_vouches_for_its_message() {
        assert_eq!(judge(&message(5), "t", 0, &[known(1, None, None)], &TIMES), Stray::NotArchived);
    }

    #[test]
    fn a_row_without_a_position_is_told_where_its_message_stands() {
        let row = known(1, None, Some((0, -1001)));
        assert_eq!(judge(&message(5), "t", 0, std::slice::from_ref(&row), &TIMES), Stray::Unpositioned(&row));
        let replay = Logged { replay_of: Some(1), ..message(9) };
        assert_eq!(judge(&replay, "t", 0, &[row, known(2, Some(1), Some((0, 9)))], &TIMES), Stray::Outside);
    }

    #[test]
    fn a_replay_needs_a_replay_row() {
        let rows = [known(1, None, Some((0, 5)))];
        let replay = Logged { replay_of: Some(1), ..message(9) };
        assert_eq!(judge(&replay, "t", 0, &rows, &TIMES), Stray::Unmatched);
        let rows = [rows[0].clone(), known(2, Some(1), Some((0, 8)))];
        assert_eq!(judge(&replay, "t", 0, &rows, &TIMES), Stray::Copy(&rows[1]));
    }

    #[test]
    fn a_copy_with_another_value_is_none() {
        let rows = [known(1, None, Some((0, 5)))];
        let altered = Logged { value_hash: Some(vec![2]), ..message(9) };
        assert_eq!(judge(&altered, "t", 0, &rows, &TIMES), Stray::Altered(&rows[0]));
        let tombstone = Logged { value_hash: None, ..message(9) };
        assert_eq!(judge(&tombstone, "t", 0, &rows, &TIMES), Stray::Altered(&rows[0]));
    }

    #[test]
    fn the_id_of_a_row_of_another_topic_vouches_for_nothing() {
        assert_eq!(judge(&message(5), "u", 0, &[known(1, None, Some((0, 5)))], &TIMES), Stray::Unmatched);
    }

    #[test]
    fn what_no_row_knows_is_unmatched_only_where_the_archive_would_know_it() {
        let sent = |timestamp| judge(&Logged { timestamp, ..message(5) }, "t", 0, &[], &TIMES);
        assert_eq!(sent(Some(999)), Stray::Beyond);
        assert_eq!(sent(Some(1199)), Stray::BeforeArchive);
        assert_eq!(sent(Some(1200)), Stray::Unmatched);
        assert_eq!(sent(Some(2000)), Stray::Beyond);
        assert_eq!(sent(None), Stray::Unmatched);
    }
}

use proptest::prelude::*;

use super::*;

fn sources() -> BTreeSet<String> {
    BTreeSet::from(["test".to_owned()])
}

fn id(key: u8, seq: i64) -> Uuid {
    Uuid::from_u128(u128::from(key) << 64 | seq as u128)
}

fn message(offset: i64, key: u8, seq: i64) -> Logged {
    Logged {
        offset,
        timestamp: Some(offset),
        source: Some("test".to_owned()),
        message_id: Some(id(key, seq)),
        key: Some(key.to_string()),
        seq: Some(seq),
        replay_of: None,
        value_hash: Some(vec![key, seq as u8]),
    }
}

fn foreign(offset: i64) -> Logged {
    Logged { source: None, message_id: None, seq: None, ..message(offset, 0, 0) }
}

fn row(offset: i64, key: u8, seq: i64) -> ArchivedRow {
    ArchivedRow {
        id: 1000 + offset,
        key: key.to_string(),
        seq,
        message_id: id(key, seq),
        topic: "t".to_owned(),
        partition: 0,
        offset,
        replay_of: None,
        value_hash: vec![key, seq as u8],
    }
}

/// As the caller does it. Answers with the strays, too.
fn compare_from(low: i64, rows: &[ArchivedRow], messages: &[Logged], bounds: Bounds) -> (Outcome, Vec<Logged>) {
    let sources = sources();
    let mut comparison = Comparison::new(low, &sources);
    let mut rows = rows.iter().cloned().peekable();
    for message in messages {
        while let Some(row) = rows.next_if(|row| row.offset <= message.offset) {
            comparison.row(row, Some(message));
        }
        comparison.message(message.clone());
    }
    rows.for_each(|row| comparison.row(row, None));
    let strays = comparison.strays(0);
    (comparison.finish(bounds), strays)
}

fn compare(rows: &[ArchivedRow], messages: &[Logged]) -> (Outcome, Vec<Logged>) {
    let end = messages.last().map_or(0, |message| message.offset + 1);
    compare_from(0, rows, messages, Bounds { low: 0, readable: end, high: end, compaction: Compaction::Off })
}

fn kinds(outcome: &Outcome) -> Vec<FindingKind> {
    outcome.findings.iter().map(|finding| finding.kind).collect()
}

#[test]
fn a_row_whose_offset_another_message_holds_is_missing_and_that_message_a_stray() {
    let (outcome, strays) = compare(&[row(4, 1, 1)], &[message(4, 1, 2)]);
    assert_eq!((outcome.proven, kinds(&outcome)), (0, vec![FindingKind::Missing]));
    assert_eq!(strays, [message(4, 1, 2)]);
}

#[test]
fn a_row_may_have_any_number() {
    for seq in [i64::MIN, -1, 0, i64::MAX] {
        let (outcome, _) = compare(&[row(4, 1, seq)], &[message(4, 1, seq)]);
        assert_eq!((outcome.rows, outcome.proven + outcome.findings.len() as u64), (1, 1), "{seq}");
    }
}

#[test]
fn each_part_that_differs_is_named() {
    let tampered = [
        (ArchivedRow { key: "2".to_owned(), ..row(4, 1, 1) }, "key"),
        (ArchivedRow { value_hash: vec![9], ..row(4, 1, 1) }, "value"),
        (ArchivedRow { seq: 7, ..row(4, 1, 1) }, "aggregate-seq"),
        (ArchivedRow { replay_of: Some(1), ..row(4, 1, 1) }, "replay-of"),
    ];
    for (row, part) in tampered {
        let (outcome, strays) = compare(&[row], &[message(4, 1, 1)]);
        assert_eq!((outcome.proven, kinds(&outcome)), (0, vec![FindingKind::Different]));
        assert!(outcome.findings[0].what.ends_with(&format!(": {part}")), "{}", outcome.findings[0].what);
        assert!(strays.is_empty());
    }
    let tombstone = Logged { value_hash: None, ..message(4, 1, 1) };
    let empty = ArchivedRow { value_hash: Vec::new(), ..row(4, 1, 1) };
    assert_eq!(kinds(&compare(&[empty], &[tombstone]).0), [FindingKind::Different]);
}

#[test]
fn two_rows_do_not_prove_themselves_by_one_message() {
    let twin = ArchivedRow { id: 1, ..row(4, 1, 1) };
    let (outcome, _) = compare(&[twin, row(4, 1, 1)], &[message(4, 1, 1)]);
    assert_eq!((outcome.proven, kinds(&outcome)), (1, vec![FindingKind::Shared]));
}

#[test]
fn an_empty_place_is_expired_unreadable_or_missing_by_where_it_is() {
    let rows = [row(2, 1, 1), row(6, 1, 2), row(11, 1, 3), row(15, 1, 4)];
    // Low was 3 when reading began and is 5 at the end; a foreign transaction is open from 10 to 14.
    let bounds = Bounds { low: 5, readable: 10, high: 14, compaction: Compaction::Off };
    let (outcome, _) = compare_from(3, &rows, &[foreign(5), foreign(9)], bounds.clone());
    assert_eq!((outcome.expired, outcome.open_transaction), (1, 1));
    assert_eq!(kinds(&outcome), [FindingKind::Missing, FindingKind::Missing]);
    let offsets: Vec<_> = outcome.findings.iter().map(|finding| finding.offset).collect();
    assert_eq!(offsets, [6, 15]);
    // Retention went past a row while the partition was read.
    let (outcome, _) = compare_from(3, &[row(4, 1, 1)], &[foreign(5)], bounds);
    assert_eq!((outcome.expired, outcome.findings.len()), (1, 0));
}

#[test]
fn compaction_explains_an_empty_place_and_nothing_else() {
    let rows = [row(2, 1, 1), row(6, 1, 2), row(7, 1, 3), row(15, 1, 4)];
    let bounds = |compaction| Bounds { low: 0, readable: 14, high: 14, compaction };
    let compared = |compaction| compare_from(0, &rows, &[message(6, 2, 1), message(7, 1, 3)], bounds(compaction)).0;
    let outcome = compared(Compaction::On);
    assert_eq!((outcome.compacted, outcome.proven), (1, 1));
    // Another message stands at 6, and the partition ends before 15.
    assert_eq!(kinds(&outcome), [FindingKind::Missing, FindingKind::Missing]);
    let outcome = compared(Compaction::Unknown("not allowed".to_owned()));
    assert_eq!((outcome.compacted, outcome.findings.len()), (0, 3));
    assert!(outcome.findings.iter().any(|finding| finding.what.ends_with("compacted: not allowed")));
}

#[test]
fn a_row_without_a_position_is_neither_expired_nor_proven() {
    let unpositioned = [row(-1001, 1, 1), row(-1, 2, 1), ArchivedRow { partition: -1, ..row(3, 3, 1) }];
    let bounds = Bounds { low: 4, readable: 9, high: 9, compaction: Compaction::On };
    let (outcome, strays) = compare_from(4, &unpositioned, &[message(5, 1, 1)], bounds);
    assert_eq!((outcome.rows, outcome.proven, outcome.expired, outcome.compacted), (3, 0, 0, 0));
    assert_eq!(outcome.unpositioned, unpositioned);
    assert_eq!(strays, [message(5, 1, 1)]);
}

#[test]
fn an_expired_offset_that_was_read_all_the_same_is_proven() {
    let (outcome, _) = compare_from(
        9,
        &[row(4, 1, 1)],
        &[message(4, 1, 1)],
        Bounds { low: 9, readable: 9, high: 9, compaction: Compaction::Off },
    );
    assert_eq!((outcome.proven, outcome.expired), (1, 0));
}

#[test]
fn a_key_whose_messages_changed_places_is_out_of_order_and_other_keys_are_not() {
    let rows = [row(1, 1, 2), row(2, 2, 1), row(3, 1, 1), row(4, 1, 3)];
    let (outcome, _) = compare(&rows, &[message(1, 1, 2), message(2, 2, 1), message(3, 1, 1), message(4, 1, 3)]);
    assert_eq!((outcome.proven, kinds(&outcome)), (3, vec![FindingKind::OutOfOrder]));
    assert_eq!(outcome.findings[0].offset, 3);
}

#[test]
fn the_first_copy_counts_for_the_order_even_where_the_archive_names_a_later_one() {
    let messages = [message(1, 1, 2), message(2, 1, 1), message(3, 1, 2)];
    let (outcome, strays) = compare(&[row(2, 1, 1), row(3, 1, 2)], &messages);
    assert_eq!((outcome.proven, kinds(&outcome)), (1, vec![FindingKind::OutOfOrder]));
    assert_eq!(strays, [message(1, 1, 2)]);
    // The same with the copy behind its predecessor is what a relay that died leaves.
    let messages = [message(1, 1, 1), message(2, 1, 2), message(3, 1, 2)];
    let (outcome, _) = compare(&[row(1, 1, 1), row(3, 1, 2)], &messages);
    assert_eq!((outcome.proven, outcome.findings.len()), (2, 0));
}

#[test]
fn a_replay_is_proven_outside_the_order() {
    let replayed = ArchivedRow { replay_of: Some(1), ..row(3, 1, 1) };
    let again = Logged { replay_of: Some(1), ..message(3, 1, 1) };
    let (outcome, strays) =
        compare(&[row(1, 1, 1), row(2, 1, 2), replayed], &[message(1, 1, 1), message(2, 1, 2), again]);
    assert_eq!((outcome.proven, outcome.replays, outcome.findings.len(), strays.len()), (3, 1, 0, 0));
}

/// One message of a key as the relay publishes it.
#[derive(Debug, Clone)]
struct Step {
    key: u8,
    /// Acknowledged and not archived, so many times.
    lost: usize,
    /// A copy of an earlier message arrives behind it.
    late: Option<prop::sample::Index>,
    foreign: bool,
    /// Markers, or what compaction took.
    gap: i64,
}

fn step() -> impl Strategy<Value = Step> {
    let late = prop::option::weighted(0.2, any::<prop::sample::Index>());
    (0..4u8, prop_oneof![4 => Just(0), 1 => 1..3usize], late, any::<bool>(), 0..3i64)
        .prop_map(|(key, lost, late, foreign, gap)| Step { key, lost, late, foreign, gap })
}

/// What such a history leaves in the archive and in Kafka, and how many copies.
fn history(steps: &[Step]) -> (Vec<ArchivedRow>, Vec<Logged>, usize) {
    let (mut rows, mut messages, mut copies, mut offset) = (vec![], vec![], 0, 0);
    let mut last = [0; 4];
    for step in steps {
        let seq = &mut last[usize::from(step.key)];
        *seq += 1;
        for _ in 0..=step.lost {
            offset += 1 + step.gap;
            messages.push(message(offset, step.key, *seq));
        }
        rows.push(row(offset, step.key, *seq));
        copies += step.lost;
        if let Some(index) = &step.late {
            offset += 1;
            let copied: &ArchivedRow = index.get(&rows);
            messages.push(Logged { offset, ..message(0, copied.key.parse().unwrap(), copied.seq) });
            copies += 1;
        }
        if step.foreign {
            offset += 1;
            messages.push(foreign(offset));
        }
    }
    (rows, messages, copies)
}

proptest! {
    #[test]
    fn whatever_a_relay_may_leave_is_proven(steps in prop::collection::vec(step(), 0..40)) {
        let (rows, messages, copies) = history(&steps);
        let (outcome, strays) = compare(&rows, &messages);
        prop_assert_eq!(outcome.proven as usize, rows.len());
        prop_assert!(outcome.findings.is_empty(), "{:?}", outcome.findings);
        prop_assert_eq!(strays.len(), copies);
        let others = steps.iter().filter(|step| step.foreign).count();
        prop_assert_eq!((outcome.messages as usize, outcome.other_senders as usize), (messages.len(), others));
    }

    #[test]
    fn no_tampering_with_a_row_or_its_message_is_passed(
        steps in prop::collection::vec(step(), 1..40),
        at in any::<prop::sample::Index>(),
        how in 0..6,
    ) {
        let (mut rows, mut messages, copies) = history(&steps);
        let index = at.index(rows.len());
        let archived = rows[index].clone();
        let stands = messages.iter().position(|message| message.offset == archived.offset).unwrap();
        let expected_strays = match how {
            0 => { messages.remove(stands); copies }
            1 => { messages[stands].value_hash = Some(vec![77]); copies }
            2 => { messages[stands].seq = Some(archived.seq + 1); copies }
            3 => { messages[stands].message_id = Some(Uuid::max()); copies + 1 }
            4 => { rows[index].key = "forged".to_owned(); copies }
            _ => { rows.remove(index); copies + 1 }
        };
        let (outcome, strays) = compare(&rows, &messages);
        prop_assert_eq!(strays.len(), expected_strays);
        if how < 5 {
            prop_assert!(outcome.findings.iter().any(|finding| finding.row_id == Some(archived.id)));
            prop_assert!((outcome.proven as usize) < rows.len());
        }
    }
}

use proptest::prelude::*;
use serde_json::value::RawValue;
use sqlx::types::Json;

use super::*;

fn row(id: i64, key: &str, seq: i64) -> PendingRow {
    PendingRow {
        id,
        lane: lane_of(key),
        key: key.into(),
        seq,
        topic: "t".into(),
        payload: vec![],
        headers: Json(RawValue::from_string("{}".to_owned()).unwrap()),
        replay_of: None,
        created_at: chrono::DateTime::UNIX_EPOCH,
        published_seq: 0,
        blocked: false,
    }
}

fn send_next(window: &mut Window) -> Option<i64> {
    window.next_to_send().map(|row| row.id)
}

#[test]
fn a_key_has_one_message_in_flight_and_others_go_on() {
    let mut window = Window::default();
    assert!(window.admit(vec![row(1, "a", 1), row(2, "a", 2), row(3, "b", 1)]).is_empty());
    assert_eq!([send_next(&mut window), send_next(&mut window), send_next(&mut window)], [Some(1), Some(3), None]);
    window.acknowledged(1);
    assert_eq!(send_next(&mut window), Some(2));
}

#[test]
fn a_row_whose_predecessor_is_missing_is_refused_with_everything_behind_it() {
    let mut window = Window::default();
    let refused = window.admit(vec![row(5, "a", 2), row(6, "a", 3), row(7, "b", 1)]);
    assert_eq!(refused.len(), 1);
    assert_eq!(refused[0].1, Refusal::Gap { expected: 1 });
    assert_eq!([send_next(&mut window), send_next(&mut window)], [Some(7), None]);
}

#[test]
fn a_row_behind_a_parked_one_is_refused() {
    let mut window = Window::default();
    let blocked = PendingRow { blocked: true, published_seq: 1, ..row(5, "a", 3) };
    assert_eq!(window.admit(vec![blocked])[0].1, Refusal::Behind);
}

#[test]
fn a_row_whose_place_is_out_already_is_refused_and_stops_nobody() {
    let mut window = Window::default();
    let stale = PendingRow { published_seq: 4, ..row(8, "a", 3) };
    let next = PendingRow { published_seq: 4, ..row(9, "a", 5) };
    let refused = window.admit(vec![stale, next]);
    assert_eq!((refused.len(), &refused[0].1), (1, &Refusal::Stale));
    assert_eq!(send_next(&mut window), Some(9));
}

#[test]
fn a_replay_goes_out_beside_what_is_parked() {
    let mut window = Window::default();
    let blocked = PendingRow { blocked: true, published_seq: 1, ..row(5, "a", 3) };
    let replay = PendingRow { blocked: true, replay_of: Some(1), published_seq: 1, ..row(6, "a", 1) };
    assert_eq!(window.admit(vec![blocked, replay]).len(), 1);
    assert_eq!(send_next(&mut window), Some(6));
}

#[test]
fn an_evicted_key_starts_over_where_it_stood() {
    let mut window = Window::default();
    window.admit(vec![row(1, "a", 1), row(2, "a", 2), row(3, "a", 3)]);
    send_next(&mut window);
    window.acknowledged(1);
    send_next(&mut window);
    window.evict("a");
    assert_eq!(window.acknowledged(2).map(|r| r.id), None, "a late report of an evicted row counts for nothing");
    // Row 1 is sent but not archived, so the database still says that nothing is out.
    assert!(window.admit(vec![row(2, "a", 2), row(3, "a", 3)]).is_empty());
    assert_eq!(send_next(&mut window), Some(2));
}

#[test]
fn a_replay_stands_outside_the_sequence_but_in_line() {
    let mut window = Window::default();
    let replay = PendingRow { replay_of: Some(1), published_seq: 4, ..row(9, "a", 2) };
    let next = PendingRow { published_seq: 4, ..row(10, "a", 5) };
    assert!(window.admit(vec![replay, next]).is_empty());
    assert_eq!([send_next(&mut window), send_next(&mut window)], [Some(9), None]);
}

/// Everything a broker and a database can do to the window, in any order.
#[derive(Debug, Clone)]
enum Happening {
    Read,
    Send,
    Ack(usize),
    Fail(usize),
    Archive,
}

fn happenings() -> impl Strategy<Value = Vec<Happening>> {
    let one = prop_oneof![
        3 => Just(Happening::Read),
        5 => Just(Happening::Send),
        4 => any::<usize>().prop_map(Happening::Ack),
        1 => any::<usize>().prop_map(Happening::Fail),
        2 => Just(Happening::Archive),
    ];
    proptest::collection::vec(one, 1..200)
}

proptest! {
    /// First sends of a key are in order, whatever fails in between, and no row is lost: what
    /// is not archived is still in the outbox or in the window.
    #[test]
    fn first_appends_of_a_key_keep_their_order(script in happenings()) {
        let mut outbox: Vec<(i64, &str, i64)> =
            (0..30).map(|n| (n + 1, ["a", "b", "c"][n as usize % 3], n / 3 + 1)).collect();
        let mut window = Window::default();
        let mut flying: Vec<i64> = vec![];
        let mut unarchived: Vec<i64> = vec![];
        let mut out: HashMap<&str, i64> = HashMap::new();
        let mut appended: HashMap<&str, Vec<i64>> = HashMap::new();
        let of = |id: i64| (["a", "b", "c"][(id - 1) as usize % 3], (id - 1) / 3 + 1);
        for happening in script {
            match happening {
                Happening::Read => {
                    let known = window.row_ids();
                    let rows = outbox.iter().filter(|(id, ..)| !known.contains(id)).take(7)
                        .map(|&(id, key, seq)| PendingRow {
                            published_seq: out.get(key).copied().unwrap_or(0), ..row(id, key, seq)
                        }).collect();
                    prop_assert!(window.admit(rows).is_empty());
                }
                Happening::Send => if let Some(id) = send_next(&mut window) {
                    let (key, seq) = of(id);
                    let log = appended.entry(key).or_default();
                    if !log.contains(&seq) {
                        prop_assert_eq!(log.last().map_or(1, |last| last + 1), seq);
                        log.push(seq);
                    }
                    flying.push(id);
                },
                Happening::Ack(which) if !flying.is_empty() => {
                    let id = flying.remove(which % flying.len());
                    if window.acknowledged(id).is_some() { unarchived.push(id); }
                }
                Happening::Fail(which) if !flying.is_empty() => {
                    let id = flying.remove(which % flying.len());
                    let key = window.in_flight_row(id).map(|row| row.key.clone());
                    if let Some(key) = key { window.evict(&key); }
                }
                Happening::Archive => {
                    for id in unarchived.drain(..) {
                        outbox.retain(|(row_id, ..)| *row_id != id);
                        let (key, seq) = of(id);
                        out.insert(key, seq);
                        window.archived([id]);
                    }
                }
                Happening::Ack(_) | Happening::Fail(_) => {}
            }
        }
    }
}

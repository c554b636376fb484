//! The relay by itself: rows in, messages out.

use std::{collections::BTreeMap, time::Duration};

use outbox_relay::{
    KafkaSettings, NewMessage, Relay, RelaySettings, Replayed, SESSION, Wake, admin, append, lane_of, replay,
};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::support::{eventually, kafka, parts::PARTS};

/// Small: an eighth of an eighth of it is one row.
const BATCH: usize = 64;

struct Outbox {
    pool: PgPool,
    topic: String,
}

struct RunningRelay {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Outbox {
    async fn new() -> Self {
        let outbox = Self::without_topic().await;
        PARTS.create_topics(std::slice::from_ref(&outbox.topic)).await;
        outbox
    }

    async fn without_topic() -> Self {
        let database = PARTS.database().await;
        let pool = PgPoolOptions::new().max_connections(20).connect_lazy_with(PARTS.connect_options(&database));
        Self { pool, topic: format!("relay.{}", Uuid::new_v4().simple()) }
    }

    fn message(&self, key: &str, text: &str) -> NewMessage {
        NewMessage {
            id: Uuid::now_v7(),
            topic: self.topic.clone(),
            key: key.to_owned(),
            source: "test".to_owned(),
            payload: serde_json::json!({ "text": text }).to_string().into_bytes(),
            content_type: "application/json",
            headers: BTreeMap::new(),
            saga_id: None,
        }
    }

    async fn append(&self, key: &str, text: &str) -> i64 {
        let mut tx = self.pool.begin().await.unwrap();
        let appended = append(&mut tx, &self.message(key, text)).await.unwrap();
        tx.commit().await.unwrap();
        appended.row_id
    }

    fn relay(&self, name: &str) -> RunningRelay {
        self.relay_with(name, &PARTS.brokers(), &[])
    }

    /// A relay that will never hear of its messages: there is no broker at that address.
    fn relay_without_broker(&self, name: &str) -> RunningRelay {
        self.relay_with(name, "127.0.0.1:1", &[])
    }

    fn relay_with(&self, name: &str, brokers: &str, client: &[(&str, &str)]) -> RunningRelay {
        let options = (*self.pool.connect_options()).clone().options(SESSION);
        let pool = PgPoolOptions::new().max_connections(6).connect_lazy_with(options);
        let settings = RelaySettings {
            name: name.to_owned(),
            kafka: KafkaSettings {
                brokers: brokers.to_owned(),
                client: client.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            },
            lease: Duration::from_secs(2),
            batch: BATCH,
            workers: 2,
            poll: Duration::from_millis(100),
            fencing: false,
        };
        let stop = CancellationToken::new();
        let relay = Relay::new(pool, settings, Wake::default());
        let stopping = stop.clone();
        let task = tokio::spawn(async move { relay.run(stopping).await.unwrap() });
        RunningRelay { stop, task }
    }

    /// Time passes: whoever has not renewed since is taken for dead.
    async fn expire_leases(&self) {
        sqlx::query("delete from outbox_relays").execute(&self.pool).await.unwrap();
    }

    async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.unwrap()
    }

    async fn until(&self, query: &'static str, expected: i64) {
        eventually(&format!("{query} = {expected}"), || async { (self.count(query).await == expected).then_some(()) })
            .await;
    }

    async fn texts_by_key(&self) -> BTreeMap<String, Vec<String>> {
        let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for seen in kafka::read_all(&PARTS.brokers(), std::slice::from_ref(&self.topic)).await {
            texts.entry(seen.key.clone()).or_default().push(seen.value["text"].as_str().unwrap_or("?").to_owned());
        }
        texts
    }
}

impl RunningRelay {
    async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    /// As if the process had been killed: nothing is given back.
    async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

fn numbers(up_to: usize) -> Vec<String> {
    (0..up_to).map(|n| n.to_string()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn everything_committed_comes_out_once_and_in_order_of_each_key() {
    let outbox = Outbox::new().await;
    for n in 0..40 {
        for key in ["a", "b", "c"] {
            outbox.append(key, &n.to_string()).await;
        }
    }
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_archive", 120).await;
    relay.stop().await;
    assert_eq!(outbox.count("select count(*) from outbox").await, 0);
    let texts = outbox.texts_by_key().await;
    assert_eq!(texts.len(), 3);
    assert!(texts.values().all(|of_key| *of_key == numbers(40)), "{texts:?}");
    assert_eq!(outbox.count("select count(*) from outbox_lanes where owner is not null or not clean").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rolls_back_is_never_sent_and_leaves_no_gap() {
    let outbox = Outbox::new().await;
    let mut tx = outbox.pool.begin().await.unwrap();
    append(&mut tx, &outbox.message("a", "gone")).await.unwrap();
    tx.rollback().await.unwrap();
    outbox.append("a", "0").await;
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"], numbers(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_transaction_that_commits_late_is_not_stepped_over() {
    let outbox = Outbox::new().await;
    let relay = outbox.relay("one");
    let mut early = outbox.pool.begin().await.unwrap();
    append(&mut early, &outbox.message("a", "0")).await.unwrap();
    // Higher ids of the same lane are committed and archived first, and the marks move on.
    let neighbour = (0..).map(|n| format!("b{n}")).find(|key| lane_of(key) == lane_of("a")).unwrap();
    for n in 0..5 {
        outbox.append(&neighbour, &n.to_string()).await;
    }
    outbox.until("select count(*) from outbox_archive", 5).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    early.commit().await.unwrap();
    outbox.until("select count(*) from outbox_archive", 6).await;
    relay.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"], numbers(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn two_relays_share_the_lanes_and_keep_the_order() {
    let outbox = Outbox::new().await;
    let (one, two) = (outbox.relay("one"), outbox.relay("two"));
    outbox.until("select count(distinct owner) from outbox_lanes", 2).await;
    outbox.until("select coalesce(max(n) - min(n), 99) from (select count(*) as n from outbox_lanes where owner is not null group by owner having count(*) < 64) c", 0).await;
    for n in 0..30 {
        for key in ["a", "b", "c", "d", "e", "f"] {
            outbox.append(key, &n.to_string()).await;
        }
    }
    outbox.until("select count(*) from outbox_archive", 180).await;
    one.stop().await;
    two.stop().await;
    let texts = outbox.texts_by_key().await;
    assert!(texts.values().all(|of_key| *of_key == numbers(30)), "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_relays_lanes_are_taken_over_and_nothing_is_lost() {
    let outbox = Outbox::new().await;
    let doomed = outbox.relay_without_broker("doomed");
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    for n in 0..20 {
        outbox.append("a", &n.to_string()).await;
    }
    doomed.kill().await;
    let heir = outbox.relay("heir");
    outbox.until("select count(*) from outbox_archive", 20).await;
    assert_eq!(outbox.count("select count(*) from outbox_relays where name = 'doomed'").await, 0);
    // What was sent without a death restores trust in its lane.
    outbox.until("select count(*) from outbox_lanes where attempt_limit is not null and lane in (select lane from outbox_archive)", 0).await;
    heir.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"], numbers(20));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_kills_twice_while_alone_is_parked_and_its_lane_goes_on() {
    let outbox = Outbox::new().await;
    let (killer, neighbour) = same_lane();
    let row = outbox.append(&killer, "0").await;
    outbox.append(&neighbour, "0").await;
    // An eighth, then one at a time; then twice the same row, alone.
    for _ in 0..2 {
        outbox.until("select count(*) from outbox_lanes where owner is not null", 0).await;
        let doomed = outbox.relay_without_broker("doomed");
        outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
        doomed.kill().await;
        outbox.expire_leases().await;
    }
    for kills in 0..2 {
        let doomed = outbox.relay_without_broker("doomed");
        eventually("the row is written down as suspect", || async {
            let found: Option<i16> = sqlx::query_scalar("select suspect_kills from outbox_lanes where suspect_id = $1")
                .bind(row)
                .fetch_optional(&outbox.pool)
                .await
                .unwrap();
            (found == Some(kills)).then_some(())
        })
        .await;
        doomed.kill().await;
        outbox.expire_leases().await;
    }
    let relay = outbox.relay("survivor");
    outbox.until("select count(*) from outbox_parked where reason like '%died 2 times%'", 1).await;
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
    let texts = outbox.texts_by_key().await;
    assert_eq!(texts.keys().collect::<Vec<_>>(), [&neighbour]);
}

/// Two keys of one lane.
fn same_lane() -> (String, String) {
    let lane = lane_of("0");
    let other = (1..).map(|n: u32| n.to_string()).find(|key| lane_of(key) == lane).unwrap();
    ("0".to_owned(), other)
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_writes_after_its_lanes_were_taken_has_no_effect() {
    let outbox = Outbox::new().await;
    let relay = outbox.relay_without_broker("frozen");
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    outbox.append("a", "0").await;
    // As if it had been frozen past its lease: its row is gone, and with it every ownership.
    outbox.expire_leases().await;
    let heir = outbox.relay("heir");
    outbox.until("select count(*) from outbox_archive", 1).await;
    outbox.until("select count(distinct owner) from outbox_lanes", 2).await;
    relay.stop().await;
    heir.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"], numbers(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_sent_under_a_term_that_is_over_is_left_to_the_next_owner() {
    let outbox = Outbox::new().await;
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    // Whoever takes the lane over holds its row while the relay, with the acknowledgement in its hands,
    // comes to archive.
    let mut takeover = outbox.pool.begin().await.unwrap();
    let lane = lane_of("a");
    let term: i64 = sqlx::query_scalar("select term from outbox_lanes where lane = $1 for update")
        .bind(lane)
        .fetch_one(&mut *takeover)
        .await
        .unwrap();
    outbox.append("a", "0").await;
    outbox
        .until(
            "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'
                and query like '%insert into outbox_archive%'",
            1,
        )
        .await;
    sqlx::query("update outbox_lanes set owner = null, term = term + 1 where lane = $1")
        .bind(lane)
        .execute(&mut *takeover)
        .await
        .unwrap();
    takeover.commit().await.unwrap();
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
    let archived: i64 = sqlx::query_scalar("select term from outbox_archive").fetch_one(&outbox.pool).await.unwrap();
    assert_eq!(archived, term + 2, "archived by the owner after the take-over");
    assert_eq!(outbox.texts_by_key().await["a"], ["0", "0"], "sent by both, a copy under the same id");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_parks_its_key_in_order_and_no_other() {
    let outbox = Outbox::new().await;
    outbox.append("a", "0").await;
    let large = outbox.append("a", &"x".repeat(40_000)).await;
    outbox.append("a", "2").await;
    outbox.append("b", "0").await;
    let relay = outbox.relay_with("one", &PARTS.brokers(), &[("message.max.bytes", "20000")]);
    outbox.until("select count(*) from outbox_parked", 2).await;
    outbox.until("select count(*) from outbox_archive", 2).await;
    // Appended behind a parked row: it joins the others.
    outbox.append("a", "3").await;
    outbox.until("select count(*) from outbox_parked", 3).await;
    relay.stop().await;
    let mut conn = outbox.pool.acquire().await.unwrap();
    let row = admin::show(&mut conn, large).await.unwrap().unwrap();
    assert_eq!(row.status, "parked");
    assert!(row.reason.unwrap().to_lowercase().contains("too large"));

    // The operator raises the limit and replays: everything goes out, in order.
    let mut tx = outbox.pool.begin().await.unwrap();
    let Replayed::Parked { rows, .. } = replay(&mut tx, large, false).await.unwrap() else { panic!("it was parked") };
    assert_eq!(rows.len(), 3);
    tx.commit().await.unwrap();
    let relay = outbox.relay("two");
    outbox.until("select count(*) from outbox_archive", 5).await;
    relay.stop().await;
    let lengths: Vec<usize> = outbox.texts_by_key().await["a"].iter().map(String::len).collect();
    assert_eq!(lengths, [1, 40_000, 1, 1]);
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_come_back_below_the_marks_are_no_gap() {
    let outbox = Outbox::new().await;
    let (key, neighbour) = same_lane();
    let large = outbox.append(&key, &"x".repeat(40_000)).await;
    let relay = outbox.relay_with("one", &PARTS.brokers(), &[("message.max.bytes", "20000")]);
    outbox.until("select count(*) from outbox_parked", 1).await;
    relay.stop().await;
    // The marks of the lane move past the parked row, which then goes back to where it was, with a
    // new one of its key above the marks.
    let relay = outbox.relay("two");
    for n in 0..40 {
        outbox.append(&neighbour, &n.to_string()).await;
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut tx = outbox.pool.begin().await.unwrap();
    replay(&mut tx, large, false).await.unwrap();
    append(&mut tx, &outbox.message(&key, "1")).await.unwrap();
    tx.commit().await.unwrap();
    outbox.until("select count(*) from outbox_archive", 42).await;
    assert_eq!(outbox.count("select count(*) from outbox_parked").await, 0);
    relay.stop().await;
    assert_eq!(outbox.texts_by_key().await[&key].len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_topic_stops_that_topic_alone_until_it_is_there() {
    let outbox = Outbox::without_topic().await;
    let other = Outbox { pool: outbox.pool.clone(), topic: format!("{}.other", outbox.topic) };
    PARTS.create_topics(std::slice::from_ref(&other.topic)).await;
    outbox.append("a", "0").await;
    let relay = outbox.relay("one");
    for n in 0..10 {
        other.append(&format!("k{n}"), "0").await;
    }
    outbox.until("select count(*) from outbox_archive", 10).await;
    assert_eq!(outbox.count("select count(*) from outbox").await, 1);
    PARTS.create_topics(std::slice::from_ref(&outbox.topic)).await;
    outbox.until("select count(*) from outbox_archive", 11).await;
    assert_eq!(outbox.count("select count(*) from outbox_parked").await, 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_message_is_sent_again_under_its_old_id_unless_later_ones_exist() {
    let outbox = Outbox::new().await;
    let first = outbox.append("a", "0").await;
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_archive", 1).await;
    let mut conn = outbox.pool.acquire().await.unwrap();
    replay(&mut conn, first, false).await.unwrap();
    outbox.until("select count(*) from outbox_archive", 2).await;
    let ids: Vec<String> = kafka::read_all(&PARTS.brokers(), std::slice::from_ref(&outbox.topic))
        .await
        .iter()
        .map(|seen| seen.header("ce_id").to_owned())
        .collect();
    assert_eq!(ids[0], ids[1]);

    outbox.append("a", "1").await;
    let refused = replay(&mut conn, first, false).await.unwrap_err();
    assert!(refused.to_string().contains("raise the dead"), "{refused}");
    replay(&mut conn, first, true).await.unwrap();
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gap_in_a_keys_sequence_is_refused_and_visible() {
    let outbox = Outbox::new().await;
    let first = outbox.append("a", "0").await;
    outbox.append("a", "1").await;
    sqlx::query("delete from outbox where id = $1").bind(first).execute(&outbox.pool).await.unwrap();
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_parked where reason like 'sequence gap%'", 1).await;
    relay.stop().await;
    assert!(outbox.texts_by_key().await.is_empty());
}

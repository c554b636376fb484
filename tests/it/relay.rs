//! The relay by itself: everything out, once, in order.

use std::time::{Duration, Instant};

use outbox_relay::{append, lane_of, test_kit::horizon};
use sqlx::Connection;

use crate::support::{
    eventually,
    outbox::{Outbox, WAITING, numbers, same_lane},
    parts::PARTS,
};

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

/// What the settled marks are built on.
#[tokio::test(flavor = "multi_thread")]
async fn who_draws_a_row_id_has_a_number_already_and_the_horizon_knows_it() {
    let outbox = Outbox::new().await;
    let mut conn = outbox.pool.acquire().await.unwrap();
    let mut first = outbox.pool.begin().await.unwrap();
    append(&mut first, &outbox.message("a", "0")).await.unwrap();
    let (drawn, _) = horizon(&mut conn).await.unwrap();
    let mut second = outbox.pool.begin().await.unwrap();
    let message = outbox.message("a", "1");
    let second = tokio::spawn(async move {
        let mut nested = second.begin().await.unwrap();
        let appended = append(&mut nested, &message).await.unwrap();
        nested.commit().await.unwrap();
        (second, appended.row_id)
    });
    outbox.until(WAITING, 1).await;
    assert_eq!(horizon(&mut conn).await.unwrap().0, drawn, "who waits for the key has drawn no id");
    first.commit().await.unwrap();
    let (mut second, row_id) = second.await.unwrap();
    let number: i64 =
        sqlx::query_scalar("select pg_current_xact_id()::text::bigint").fetch_one(&mut *second).await.unwrap();
    // Others come and go meanwhile.
    outbox.append("b", "0").await;
    let (newest, oldest) = horizon(&mut conn).await.unwrap();
    assert!(newest > row_id && oldest <= number, "{newest} > {row_id}, {oldest} <= {number}");
    second.commit().await.unwrap();
    eventually("it has ended", || async {
        let (_, oldest) = horizon(&mut outbox.pool.acquire().await.unwrap()).await.unwrap();
        (oldest > number).then_some(())
    })
    .await;
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
async fn beside_a_missing_topic_the_other_rows_of_a_key_wait_for_no_poll() {
    let outbox = Outbox::new().await;
    let missing = Outbox { pool: outbox.pool.clone(), topic: format!("{}.missing", outbox.topic) };
    let (stuck, neighbour) = same_lane();
    missing.append(&stuck, "0").await;
    let relay = outbox.relay_with("one", |settings| settings.poll = Duration::from_secs(600));
    // Sooner or later the missing topic is noticed, and from then on paused for ever longer.
    let (since, mut appended) = (Instant::now(), 0);
    while since.elapsed() < Duration::from_secs(8) {
        let mut tx = outbox.pool.begin().await.unwrap();
        for text in ["0", "1", "2"] {
            append(&mut tx, &outbox.message(&neighbour, text)).await.unwrap();
        }
        sqlx::query("notify outbox_wake").execute(&mut *tx).await.unwrap();
        tx.commit().await.unwrap();
        appended += 3;
        eventually("all of them are out", || async {
            (outbox.count("select count(*) from outbox_archive").await == appended).then_some(())
        })
        .await;
    }
    relay.stop().await;
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

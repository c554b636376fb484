//! What can't be sent is parked, and sent again by an operator.

use std::time::Duration;

use outbox_relay::{NewMessage, Replayed, admin, append, replay};

use crate::support::{
    kafka,
    outbox::{Outbox, same_lane},
    parts::PARTS,
};

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_parks_its_key_in_order_and_no_other() {
    let outbox = Outbox::new().await;
    outbox.append("a", "0").await;
    let large = outbox.append("a", &"x".repeat(40_000)).await;
    outbox.append("a", "2").await;
    outbox.append("b", "0").await;
    let relay = outbox.relay_with("one", |relay| {
        relay.kafka.client = vec![("message.max.bytes".to_owned(), "20000".to_owned())];
    });
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
    let relay = outbox.relay_with("one", |relay| {
        relay.kafka.client = vec![("message.max.bytes".to_owned(), "20000".to_owned())];
    });
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
async fn what_is_before_a_parked_row_stays_where_it_is() {
    let outbox = Outbox::new().await;
    // The first waits for its topic; a replay stands outside the sequence and does not wait for the first.
    let mut tx = outbox.pool.begin().await.unwrap();
    let elsewhere = NewMessage { topic: format!("{}.missing", outbox.topic), ..outbox.message("a", "0") };
    append(&mut tx, &elsewhere).await.unwrap();
    let large = append(&mut tx, &outbox.message("a", &"x".repeat(40_000))).await.unwrap().row_id;
    sqlx::query("update outbox set replay_of = id where id = $1").bind(large).execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let relay = outbox.relay_with("one", |relay| {
        relay.kafka.client = vec![("message.max.bytes".to_owned(), "20000".to_owned())];
    });
    outbox.until("select count(*) from outbox_parked", 1).await;
    assert_eq!(outbox.count("select count(*) from outbox").await, 1);
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

#[tokio::test(flavor = "multi_thread")]
async fn headers_that_are_no_texts_are_that_rows_trouble_alone() {
    let outbox = Outbox::new().await;
    outbox.append("a", "0").await;
    outbox.append("b", "0").await;
    sqlx::query(r#"update outbox set headers = headers || '{"n": 1}' where key = 'a'"#)
        .execute(&outbox.pool)
        .await
        .unwrap();
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_parked where reason like '%headers%'", 1).await;
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
    assert_eq!(outbox.texts_by_key().await.keys().collect::<Vec<_>>(), ["b"]);
}

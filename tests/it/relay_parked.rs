//! What can't be sent is parked, and sent again by an operator.

use std::time::Duration;

use outbox_relay::{Replayed, admin, append, replay, test_kit::Courier};

use crate::support::outbox::{Outbox, numbers, same_lane, small_messages};

/// Relays that would park a row, and wait for the right to its lane.
const PARKING: &str = "select count(*) from pg_stat_activity
     where datname = current_database() and wait_event_type = 'Lock' and query like 'select lane from%for share'";

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_is_too_large_parks_its_key_in_order_and_no_other() {
    let outbox = Outbox::new().await;
    outbox.append("a", "0").await;
    let large = outbox.append("a", &"x".repeat(40_000)).await;
    outbox.append("a", "2").await;
    outbox.append("b", "0").await;
    let relay = outbox.relay_with("one", small_messages);
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
    let relay = outbox.relay_with("one", small_messages);
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
async fn what_is_before_a_refused_row_stays_where_it_is() {
    let outbox = Outbox::new().await;
    let first = outbox.append("a", "0").await;
    let (refused, behind) = (outbox.append("a", "1").await, outbox.append("a", "2").await);
    let mut conn = outbox.pool.acquire().await.unwrap();
    let mut courier = Courier::hire(&mut conn).await.unwrap();
    // The first is in the refused one's transaction at the broker, say, and was not archived yet.
    assert_eq!(courier.refuse(&mut conn, refused, "too large").await.unwrap(), 2);
    let ids =
        async |query: &'static str| -> Vec<i64> { sqlx::query_scalar(query).fetch_all(&outbox.pool).await.unwrap() };
    assert_eq!(ids("select id from outbox").await, [first]);
    assert_eq!(ids("select id from outbox_parked order by id").await, [refused, behind]);
    courier.resign(&mut conn).await.unwrap();
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

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_can_not_be_parked_does_not_stop_its_neighbours() {
    let outbox = Outbox::new().await;
    let (key, neighbour) = same_lane();
    outbox.append(&key, &"x".repeat(40_000)).await;
    let relay = outbox.relay_with("one", small_messages);
    outbox.until("select count(*) from outbox_parked", 1).await;
    sqlx::raw_sql(
        "create function no_room() returns trigger language plpgsql as $$ begin raise 'no room'; end $$;
         create trigger no_room before insert on outbox_parked for each row execute function no_room()",
    )
    .execute(&outbox.pool)
    .await
    .unwrap();
    outbox.append(&key, "1").await;
    for n in 0..3 {
        outbox.append(&neighbour, &n.to_string()).await;
        outbox.until("select count(*) from outbox_archive", n + 1).await;
    }
    sqlx::raw_sql("drop trigger no_room on outbox_parked").execute(&outbox.pool).await.unwrap();
    outbox.until("select count(*) from outbox_parked", 2).await;
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_gone_blocks_nothing() {
    let outbox = Outbox::new().await;
    let relay = outbox.relay_with("one", small_messages);
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    // The relay comes to park the row, and has to wait: meanwhile it went out, by another's hand.
    let mut other = outbox.pool.begin().await.unwrap();
    sqlx::query("select from outbox_lanes for update").execute(&mut *other).await.unwrap();
    outbox.append("a", &"x".repeat(40_000)).await;
    outbox.until(PARKING, 1).await;
    sqlx::query("with gone as (delete from outbox returning *) insert into outbox_progress select key, seq from gone")
        .execute(&mut *other)
        .await
        .unwrap();
    other.commit().await.unwrap();
    outbox.append("a", "1").await;
    outbox.until("select count(*) from outbox_archive", 1).await;
    assert_eq!(outbox.count("select count(*) from outbox_blocked").await, 0);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_was_put_back_by_hand_is_parked_alone() {
    let outbox = Outbox::new().await;
    let first = outbox.append("a", "0").await;
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_archive", 1).await;
    sqlx::query(
        "insert into outbox (lane, key, seq, message_id, topic, payload, headers)
         select lane, key, seq, message_id, topic, payload, headers from outbox_archive where id = $1",
    )
    .bind(first)
    .execute(&outbox.pool)
    .await
    .unwrap();
    outbox.until("select count(*) from outbox_parked where reason like '%was out already%'", 1).await;
    outbox.append("a", "1").await;
    outbox.until("select count(*) from outbox_archive", 2).await;
    relay.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"], numbers(2));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_contradict_each_other_do_not_keep_the_relay_busy() {
    let outbox = Outbox::new().await;
    let mut tx = outbox.pool.begin().await.unwrap();
    append(&mut tx, &outbox.message("a", "0")).await.unwrap();
    append(&mut tx, &outbox.message("a", "1")).await.unwrap();
    sqlx::query("update outbox set seq = 5 - seq").execute(&mut *tx).await.unwrap();
    sqlx::query("insert into outbox_progress values ('a', 2)").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let relay = outbox.relay("one");
    outbox.append("b", "0").await;
    outbox.until("select count(*) from outbox_archive", 1).await;
    // Each attempt to park is a transaction that is rolled back.
    let attempts = "select xact_rollback from pg_stat_database where datname = current_database()";
    let before = outbox.count(attempts).await;
    tokio::time::sleep(Duration::from_secs(3)).await;
    let attempts = outbox.count(attempts).await - before;
    assert!(attempts < 30, "{attempts} attempts in three seconds");
    assert_eq!(outbox.count("select count(*) from outbox where key = 'a'").await, 2);
    relay.stop().await;
}

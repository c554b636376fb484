//! What is out is sent again, and what is parked goes on: also when both happen at once.

use outbox_relay::{ReplayError, Replayed, parked_of_sagas, replay, test_kit::Courier};
use sqlx::{Connection, PgConnection};

use crate::support::{
    kafka,
    outbox::{Outbox, WAITING, small_messages},
    parts::PARTS,
};

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
async fn a_replay_that_is_parked_is_not_sent_a_second_time_beside_it() {
    let outbox = Outbox::new().await;
    let large = outbox.append("a", &"x".repeat(40_000)).await;
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
    let mut conn = outbox.pool.acquire().await.unwrap();
    replay(&mut conn, large, false).await.unwrap();
    let relay = outbox.relay_with("two", small_messages);
    outbox.until("select count(*) from outbox_parked", 1).await;
    let Err(ReplayError::ReplayParked { replay: parked, .. }) = replay(&mut conn, large, false).await else {
        panic!("its replay is parked")
    };
    // It stops nothing else of its key, and is overtaken then.
    outbox.append("a", "1").await;
    outbox.until("select count(*) from outbox_archive", 2).await;
    relay.stop().await;
    let refused = replay(&mut conn, parked, false).await.unwrap_err();
    assert!(matches!(refused, ReplayError::Overtaken { row, seq: 1, last: 2, .. } if row == parked), "{refused}");
    replay(&mut conn, parked, true).await.unwrap();
    let relay = outbox.relay("three");
    outbox.until("select count(*) from outbox_archive", 3).await;
    relay.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"].len(), 3);
    assert_eq!(outbox.count("select count(*) from outbox_parked").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_waits_for_the_one_before_to_be_parked() {
    let outbox = Outbox::new().await;
    let first = outbox.append("a", "0").await;
    let relay = outbox.relay("one");
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
    let mut conn = outbox.pool.acquire().await.unwrap();
    replay(&mut conn, first, false).await.unwrap();
    let mut parking = outbox.pool.begin().await.unwrap();
    sqlx::query(
        "with gone as (delete from outbox returning *)
         insert into outbox_parked
         select id, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at, now(), 'large'
           from gone",
    )
    .execute(&mut *parking)
    .await
    .unwrap();
    let second = tokio::spawn(async move { replay(&mut conn, first, false).await });
    outbox.until(WAITING, 1).await;
    parking.commit().await.unwrap();
    assert!(matches!(second.await.unwrap(), Err(ReplayError::ReplayParked { .. })));
    assert_eq!(outbox.count("select count(*) from outbox").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parked_replay_says_nothing_of_the_saga_whose_message_is_out() {
    let outbox = Outbox::new().await;
    outbox.append("a", "0").await;
    sqlx::query("update outbox set saga_id = gen_random_uuid()").execute(&outbox.pool).await.unwrap();
    let mut conn = outbox.pool.acquire().await.unwrap();
    let mut courier = Courier::hire(&mut conn).await.unwrap();
    courier.take_out(&mut conn).await.unwrap();
    let first: i64 = sqlx::query_scalar("select id from outbox_archive").fetch_one(&mut *conn).await.unwrap();
    let Replayed::Published { row: again, .. } = replay(&mut conn, first, false).await.unwrap() else {
        panic!("it was out")
    };
    assert_eq!(courier.refuse(&mut conn, again, "too large").await.unwrap(), 1);
    assert_eq!(parked_of_sagas(&mut conn, 0, 10).await.unwrap(), []);
    // A message that never was out is another matter.
    let second = outbox.append("a", "1").await;
    sqlx::query("update outbox set saga_id = gen_random_uuid()").execute(&outbox.pool).await.unwrap();
    assert_eq!(courier.refuse(&mut conn, second, "too large").await.unwrap(), 1);
    let parked: Vec<i64> = parked_of_sagas(&mut conn, 0, 10).await.unwrap().iter().map(|row| row.row_id).collect();
    assert_eq!(parked, [second]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_stands_beside_what_is_parked_of_its_key() {
    let outbox = Outbox::new().await;
    let first = outbox.append("a", "0").await;
    outbox.append("a", &"x".repeat(40_000)).await;
    let relay = outbox.relay_with("one", small_messages);
    outbox.until("select count(*) from outbox_parked", 1).await;
    outbox.until("select count(*) from outbox_archive", 1).await;
    // On its way for as long as its topic is missing, and meanwhile another row of the key is parked.
    let later = format!("{}.later", outbox.topic);
    sqlx::query("update outbox_archive set topic = $1").bind(&later).execute(&outbox.pool).await.unwrap();
    replay(&mut outbox.pool.acquire().await.unwrap(), first, true).await.unwrap();
    outbox.append("a", "2").await;
    outbox.until("select count(*) from outbox_parked where replay_of is null", 2).await;
    PARTS.create_topics(&[later]).await;
    outbox.until("select count(*) from outbox_archive", 2).await;
    assert_eq!(outbox.count("select count(*) from outbox_parked").await, 2);
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_that_is_refused_is_parked_beside_what_is_parked_of_its_key() {
    for fencing in [false, true] {
        let outbox = Outbox::new().await;
        let first = outbox.append("a", &"x".repeat(40_000)).await;
        let relay = outbox.relay("one");
        outbox.until("select count(*) from outbox_archive", 1).await;
        relay.stop().await;
        outbox.append("a", &"y".repeat(40_000)).await;
        let relay = outbox.relay_with("two", |settings| {
            small_messages(settings);
            settings.fencing = fencing;
        });
        outbox.until("select count(*) from outbox_parked", 1).await;
        replay(&mut outbox.pool.acquire().await.unwrap(), first, true).await.unwrap();
        outbox
            .until("select count(*) from outbox_parked where replay_of is not null and reason ilike '%too large%'", 1)
            .await;
        outbox.append("b", "0").await;
        outbox.until("select count(*) from outbox_archive", 2).await;
        relay.stop().await;
        // Each for itself: the one that is parked in its turn does not take the other along.
        let mut conn = outbox.pool.acquire().await.unwrap();
        let parked = async |conn: &mut PgConnection| -> Vec<i64> {
            sqlx::query_scalar("select id from outbox_parked order by id").fetch_all(conn).await.unwrap()
        };
        let [one, other] = parked(&mut conn).await[..] else { panic!("two are parked") };
        for (row, other) in [(one, other), (other, one)] {
            let mut tx = conn.begin().await.unwrap();
            let replayed = replay(&mut tx, row, true).await.unwrap();
            assert_eq!(replayed, Replayed::Parked { key: "a".to_owned(), rows: vec![row] });
            assert_eq!(parked(&mut tx).await, [other]);
            tx.rollback().await.unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_parked_again_between_two_replays_is_free_after_the_second() {
    let outbox = Outbox::new().await;
    outbox.append("a", "0").await;
    let large = outbox.append("a", &"x".repeat(40_000)).await;
    let relay = outbox.relay_with("one", small_messages);
    outbox.until("select count(*) from outbox_parked", 1).await;
    relay.stop().await;
    // The first replay, and a relay that parks the key anew, in one.
    let mut first = outbox.pool.begin().await.unwrap();
    for statement in ["delete from outbox_blocked", "insert into outbox_blocked select key, id from outbox_parked"] {
        sqlx::query(statement).execute(&mut *first).await.unwrap();
    }
    let mut conn = outbox.pool.acquire().await.unwrap();
    let second = tokio::spawn(async move { replay(&mut conn, large, false).await });
    outbox.until(WAITING, 1).await;
    first.commit().await.unwrap();
    second.await.unwrap().unwrap();
    assert_eq!(outbox.count("select count(*) from outbox_blocked").await, 0);
    let relay = outbox.relay("two");
    outbox.until("select count(*) from outbox_archive", 2).await;
    relay.stop().await;
}

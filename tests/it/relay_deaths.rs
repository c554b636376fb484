//! Relays that die, or are taken for dead.

use std::time::Duration;

use outbox_relay::lane_of;
use uuid::Uuid;

use crate::support::{
    eventually,
    outbox::{Outbox, numbers, same_lane},
};

/// Waits until this row is written down as in flight all alone, with so many deaths to its charge.
async fn until_on_trial(outbox: &Outbox, row: i64, kills: i16) {
    eventually("the row is on trial", || async {
        let found: Option<i16> =
            sqlx::query_scalar("select suspect_kills from outbox_lanes where suspect_id = $1 and on_trial")
                .bind(row)
                .fetch_optional(&outbox.pool)
                .await
                .unwrap();
        (found == Some(kills)).then_some(())
    })
    .await;
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
        until_on_trial(&outbox, row, kills).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn what_a_relay_writes_after_its_lanes_were_taken_has_no_effect() {
    let outbox = Outbox::new().await;
    let relay = outbox.relay_without_broker("frozen");
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    outbox.append("a", "0").await;
    // As if it had been frozen past its lease: its row is gone, and with it every ownership.
    let heir = outbox.relay("heir");
    eventually("the heir has sent it", || async {
        // As often as it takes lanes again before the heir does.
        sqlx::query("delete from outbox_relays where name = 'frozen'").execute(&outbox.pool).await.unwrap();
        (outbox.count("select count(*) from outbox_archive").await == 1).then_some(())
    })
    .await;
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
async fn a_relay_that_was_taken_for_dead_and_lives_acquits_the_row_it_had_on_trial() {
    let outbox = Outbox::new().await;
    let row = outbox.append("a", "0").await;
    sqlx::query("update outbox_lanes set attempt_limit = 1").execute(&outbox.pool).await.unwrap();
    let relay = outbox.relay_without_broker("slow");
    until_on_trial(&outbox, row, 0).await;
    // Taken for dead more often than a killer may kill.
    for _ in 0..3 {
        let before: Uuid =
            sqlx::query_scalar("delete from outbox_relays returning id").fetch_one(&outbox.pool).await.unwrap();
        eventually("it has come back under another name", || async {
            let now: Option<Uuid> = sqlx::query_scalar("select owner from outbox_lanes where lane = $1")
                .bind(lane_of("a"))
                .fetch_one(&outbox.pool)
                .await
                .unwrap();
            now.is_some_and(|now| now != before).then_some(())
        })
        .await;
        // Long before the client gives the message up, which would clear the row too.
        let acquitted = tokio::time::timeout(Duration::from_secs(5), until_on_trial(&outbox, row, 0)).await;
        acquitted.expect("it lives, so the row has not killed it");
    }
    relay.stop().await;
    assert_eq!(outbox.count("select count(*) from outbox_parked").await, 0);
    let relay = outbox.relay("survivor");
    outbox.until("select count(*) from outbox_archive", 1).await;
    relay.stop().await;
}

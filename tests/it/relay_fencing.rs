//! Relays that fence each other off at the broker.

use std::time::Duration;

use outbox_relay::{FENCES, session};
use sqlx::{Connection, PgConnection};

use crate::support::{
    eventually,
    outbox::{Outbox, RunningRelay, numbers, small_messages},
};

fn fencing(outbox: &Outbox, name: &str) -> RunningRelay {
    outbox.relay_with(name, |relay| relay.fencing = true)
}

/// Until when the fourth relay has its lease, in microseconds.
const LEASE_OF_FOUR: &str = "select (extract(epoch from lease_until) * 1000000)::bigint from outbox_relays
     where name = 'four'";

/// Writes down every moment in which the lanes behind one fence have two owners.
const WITNESS: &str = "
    create table splits (fence int, owners uuid[]);
    create function witness() returns trigger language plpgsql as $$ begin
        insert into splits
        select lane % 8, array_agg(distinct owner) from outbox_lanes where owner is not null
         group by lane % 8 having count(distinct owner) > 1;
        return null;
    end $$;
    create trigger witness after update on outbox_lanes for each statement execute function witness();";

#[tokio::test(flavor = "multi_thread")]
async fn everything_is_out_in_order_behind_fences() {
    let outbox = Outbox::new().await;
    for n in 0..30 {
        for key in ["a", "b", "c", "d", "e"] {
            outbox.append(key, &n.to_string()).await;
        }
    }
    let relay = fencing(&outbox, "one");
    outbox.until("select count(*) from outbox_archive", 150).await;
    relay.stop().await;
    let texts = outbox.texts_by_key().await;
    assert_eq!(texts.len(), 5);
    assert!(texts.values().all(|of_key| *of_key == numbers(30)), "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_behind_one_fence_have_one_owner() {
    assert_eq!(FENCES, 8, "the query counts groups of as many");
    let outbox = Outbox::new().await;
    sqlx::raw_sql(WITNESS).execute(&outbox.pool).await.unwrap();
    let relays = ["one", "two", "three"].map(|name| fencing(&outbox, name));
    outbox.until("select count(distinct owner) from outbox_lanes where owner is not null", 3).await;
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    let [one, two, three] = relays;
    // Its groups go to the others as wholes.
    one.stop().await;
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    outbox.until("select count(distinct owner) from outbox_lanes", 2).await;
    // A fourth comes, and a part of each group that it is to have stays away for a while.
    let mut tx = outbox.pool.begin().await.unwrap();
    sqlx::query("select from outbox_lanes where lane >= 56 for update").execute(&mut *tx).await.unwrap();
    let four = fencing(&outbox, "four");
    outbox.until("select least(count(*), 1) from outbox_lanes where owner is null", 1).await;
    // It renews its lease each time before it looks for lanes: when it has done so twice, it has looked once.
    for _ in 0..2 {
        let renewed = outbox.count(LEASE_OF_FOUR).await;
        eventually("the fourth looks for lanes", || async {
            (outbox.count(LEASE_OF_FOUR).await > renewed).then_some(())
        })
        .await;
    }
    tx.rollback().await.unwrap();
    outbox.until("select count(distinct owner) from outbox_lanes where owner is not null", 3).await;
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    for n in 0..10 {
        outbox.append("a", &n.to_string()).await;
    }
    outbox.until("select count(*) from outbox_archive", 10).await;
    for relay in [two, three, four] {
        relay.stop().await;
    }
    assert_eq!(outbox.count("select count(*) from splits").await, 0);
    assert_eq!(outbox.texts_by_key().await["a"], numbers(10));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_before_a_refused_message_goes_out_although_it_broke_their_transaction() {
    let outbox = Outbox::new().await;
    // Many keys, because it takes an acknowledgement that comes before its transaction is committed.
    let keys: Vec<String> = (0..24).map(|key| format!("key{key}")).collect();
    for key in &keys {
        for text in ["0", &"x".repeat(40_000), "2"] {
            outbox.append(key, text).await;
        }
    }
    let relay = outbox.relay_with("one", |relay| {
        relay.fencing = true;
        small_messages(relay);
    });
    outbox.until("select count(*) from outbox_archive", 24).await;
    outbox.until("select count(*) from outbox_parked", 48).await;
    relay.stop().await;
    let texts = outbox.texts_by_key().await;
    assert!(keys.iter().all(|key| texts[key] == numbers(1)), "{texts:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_relay_frozen_while_it_takes_lanes_does_not_stop_the_others() {
    let outbox = Outbox::new().await;
    let relay = fencing(&outbox, "one");
    outbox.append("a", "0").await;
    outbox.until("select count(*) from outbox_archive", 1).await;
    // What the frozen one would hold; the others' lease is over meanwhile, unless they renew it.
    let mut frozen = outbox.pool.begin().await.unwrap();
    sqlx::query("select from outbox_control for update").execute(&mut *frozen).await.unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    outbox.append("a", "1").await;
    outbox.until("select count(*) from outbox_archive", 2).await;
    frozen.rollback().await.unwrap();
    relay.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_frozen_in_a_transaction_is_ended_and_its_locks_with_it() {
    let outbox = Outbox::new().await;
    let mut frozen =
        PgConnection::connect_with(&(*outbox.pool.connect_options()).clone().options(session::RELAY)).await.unwrap();
    sqlx::raw_sql("begin; select from outbox_control for update").execute(&mut frozen).await.unwrap();
    // Waits for the lock, which is never given back.
    let waiting = sqlx::query("update outbox_control set paused_by = null").execute(&outbox.pool);
    tokio::time::timeout(Duration::from_secs(60), waiting).await.expect("the lock is free").unwrap();
    assert!(frozen.ping().await.is_err(), "the session is over");
}

//! Relays that fence each other off at the broker.

use outbox_relay::FENCES;

use crate::support::outbox::{Outbox, RunningRelay, numbers};

fn fencing(outbox: &Outbox, name: &str) -> RunningRelay {
    outbox.relay_with(name, |relay| relay.fencing = true)
}

/// How many groups of lanes are in more than one hand.
const SPLIT: &str = "select count(*) from
    (select lane % 8 from outbox_lanes group by lane % 8 having count(distinct coalesce(owner::text, '')) > 1) split";

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
    let relays = ["one", "two", "three"].map(|name| fencing(&outbox, name));
    outbox.until("select count(distinct owner) from outbox_lanes where owner is not null", 3).await;
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    assert_eq!(outbox.count(SPLIT).await, 0);
    let [one, two, three] = relays;
    // Its groups go to the others as wholes.
    one.stop().await;
    outbox.until("select count(*) from outbox_lanes where owner is not null", 64).await;
    outbox.until("select count(distinct owner) from outbox_lanes", 2).await;
    assert_eq!(outbox.count(SPLIT).await, 0);
    for n in 0..10 {
        outbox.append("a", &n.to_string()).await;
    }
    outbox.until("select count(*) from outbox_archive", 10).await;
    two.stop().await;
    three.stop().await;
    assert_eq!(outbox.texts_by_key().await["a"], numbers(10));
}

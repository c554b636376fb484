//! Harm to the broker and to the way there.

use std::time::Duration;

use tokio::time::sleep;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    keeper::Keeper,
    node::{self, Node},
    proxy::{Proxy, Wire},
    stage::Stage,
};

const PATIENCE: Duration = Duration::from_secs(120);

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("the broker killed and started", "kill -9 under load, started on its data", killed).on_own_broker(),
        scenario!("fenced: the broker killed and started", "with transactions open", killed).on_own_broker(),
        scenario!("fenced: the broker cut off, again and again", "with transactions open", cut).on_own_broker(),
        scenario!("the broker falls silent", "connections stay, nothing passes", silent).on_own_broker(),
        scenario!("the broker cut off, again and again", "every connection closed, new ones too", cut).on_own_broker(),
        scenario!("connections reset in the middle of a batch", "half a request arrives", reset).on_own_broker(),
        scenario!("a slow broker", "every packet late", slow).on_own_broker(),
        scenario!("fenced: a broker that comes back slow", "one probe, and everything again", back_slow)
            .on_own_broker(),
        scenario!("fenced: a slow broker", "every packet late", slow).on_own_broker(),
        scenario!("the first request refused, the second taken", "by a broker that is becoming leader", first_refused)
            .on_own_broker(),
        scenario!("fenced: the first request refused, the second taken", "in one transaction", first_refused)
            .on_own_broker(),
        scenario!("a producer forgotten by its broker", "the same after a rest", forgotten).on_own_broker(),
        scenario!("bootstrap addresses that lead nowhere", "beside a good one", dead_addresses),
        scenario!("no bootstrap address leads anywhere", "for a while, from the start on", no_address),
        scenario!("a topic that is not there yet", "the others go on; made later, it gets all", missing_topic),
        scenario!("a topic deleted and made anew", "under load", deleted_topic),
    ]
}

async fn start(stage: &Stage, node: &Node) -> (Fleet, Keeper) {
    let fleet = Fleet::new(stage, Wishes { brokers: Some(node.brokers()), ..Wishes::default() }).await;
    let all = fleet.all_roles().await;
    (fleet, all)
}

async fn load(fleet: &Fleet, all: &Keeper, stage: &Stage, harm: impl Future<Output = ()>) {
    fleet.load(&[all], stage.many(8), (8, stage.many(60)), harm).await;
}

async fn finish(fleet: Fleet, all: Keeper) -> Verdict {
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![all], Expected::default()).await
}

async fn killed(mut stage: Stage) -> Verdict {
    let mut node = node::node().await;
    let (fleet, all) = start(&stage, &node).await;
    let (before, length) = (stage.millis(0, 500), stage.seconds(2, 60));
    fleet.disturbed();
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        node.kill().await;
        sleep(length).await;
        node.up().await;
    })
    .await;
    finish(fleet, all).await
}

/// Longer than the client tries to deliver a message.
async fn silent(mut stage: Stage) -> Verdict {
    let node = node::node().await;
    let (fleet, all) = start(&stage, &node).await;
    let (before, length) = (stage.millis(0, 500), stage.seconds(14, 90));
    (0..3).for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        sleep(before).await;
        node.wire.set_for(Wire::Silent, length).await;
    })
    .await;
    finish(fleet, all).await
}

async fn cut(mut stage: Stage) -> Verdict {
    let node = node::node().await;
    let (fleet, all) = start(&stage, &node).await;
    let cuts: Vec<_> = (0..stage.many(4)).map(|_| (stage.millis(50, 900), stage.millis(10, 1500))).collect();
    cuts.iter().for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        for (before, length) in cuts {
            sleep(before).await;
            node.wire.set_for(Wire::Cut, length).await;
        }
    })
    .await;
    finish(fleet, all).await
}

async fn reset(mut stage: Stage) -> Verdict {
    let node = node::node().await;
    let (fleet, all) = start(&stage, &node).await;
    let resets: Vec<_> = (0..stage.many(5)).map(|_| (stage.roll(200, 20_000), stage.millis(300, 900))).collect();
    resets.iter().for_each(|_| fleet.disturbed());
    load(&fleet, &all, &stage, async {
        for (bytes, length) in resets {
            node.wire.set_for(Wire::ResetAfter(bytes), length).await;
        }
    })
    .await;
    finish(fleet, all).await
}

async fn slow(mut stage: Stage) -> Verdict {
    let node = node::node().await;
    let (fleet, all) = start(&stage, &node).await;
    let (by, length) = (stage.millis(50, 400), stage.seconds(4, 60));
    load(&fleet, &all, &stage, node.wire.set_for(Wire::Slow(by), length)).await;
    finish(fleet, all).await
}

/// Every acknowledgement takes longer than reports are collected, from the outage on.
async fn back_slow(mut stage: Stage) -> Verdict {
    let node = node::node().await;
    let (fleet, all) = start(&stage, &node).await;
    let (before, by) = (stage.millis(0, 500), stage.millis(30, 60));
    (0..2).for_each(|_| fleet.disturbed());
    let harm = async {
        sleep(before).await;
        node.wire.set_for(Wire::Cut, Duration::from_secs(3)).await;
        node.wire.set(Wire::Slow(by));
    };
    // Such a wire carries one packet after the other, and lets some ten fenced messages a second through: no more
    // of them than are out while anybody waits, however long the rest of the form.
    fleet.load(&[&all], stage.many(8), (8, stage.many(60).min(240)), harm).await;
    finish(fleet, all).await
}

/// The client holds that what it sent before is there as well, and says so without an offset.
async fn first_refused(stage: Stage) -> Verdict {
    let node = node::node().await;
    node.wire.set(Wire::FirstRefused(Duration::from_secs(3600)));
    let before = node.wire.refused();
    let fleet = Fleet::new(&stage, Wishes { brokers: Some(node.brokers()), ..Wishes::default() }).await;
    fleet.commit_together(WAITING, LARGE).await;
    let all = fleet.all_roles().await;
    fleet.disturbed();
    load(&fleet, &all, &stage, async {}).await;
    refused(&node, before, finish(fleet, all).await)
}

/// A broker that has forgotten a producer takes any of its requests for the first.
async fn forgotten(stage: Stage) -> Verdict {
    let node = node::node().await;
    node.remember_producers(Some(Duration::from_secs(1))).await;
    node.wire.set(Wire::FirstRefused(Duration::from_secs(3)));
    let (fleet, all) = start(&stage, &node).await;
    (0..3).for_each(|_| fleet.disturbed());
    let mut before = 0;
    for _ in 0..3 {
        before = node.wire.refused();
        fleet.commit_together(WAITING, LARGE).await;
        fleet.until_count("select count(*) from outbox", 0, PATIENCE).await;
        sleep(Duration::from_secs(4)).await;
    }
    let verdict = refused(&node, before, finish(fleet, all).await);
    node.remember_producers(None).await;
    verdict
}

/// So many at once, and so large, that the client sends what a partition gets in several requests.
const WAITING: usize = 64;
const LARGE: usize = 400_000;

fn refused(node: &Node, before: u64, mut verdict: Verdict) -> Verdict {
    let count = node.wire.refused() - before;
    verdict.measured.push(format!("{count} requests refused"));
    if count == 0 {
        verdict.findings.push("no second request came while the first was held: nothing was proven".to_owned());
    }
    verdict
}

async fn dead_addresses(stage: Stage) -> Verdict {
    let mut fleet = Fleet::new(&stage, Wishes::default()).await;
    let dead = [dead_address(), dead_address()].join(",");
    fleet.set("KAFKA_BROKERS", format!("{dead},{}", fleet.brokers));
    let all = fleet.all_roles().await;
    fleet.load(&[&all], stage.many(6), (8, stage.many(10)), async {}).await;
    finish(fleet, all).await
}

async fn no_address(mut stage: Stage) -> Verdict {
    let mut fleet = Fleet::new(&stage, Wishes::default()).await;
    let wire = Proxy::to(fleet.brokers.clone()).await;
    wire.set(Wire::Cut);
    fleet.set("KAFKA_BROKERS", format!("{},127.0.0.1:{}", dead_address(), wire.port));
    let all = fleet.all_roles().await;
    let length = stage.millis(4000, 8000);
    fleet
        .load(&[&all], stage.many(6), (8, stage.many(10)), async {
            sleep(length).await;
            wire.set(Wire::Whole);
        })
        .await;
    finish(fleet, all).await
}

/// Nobody listens there.
fn dead_address() -> String {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").and_then(|taken| taken.local_addr()).expect("a port");
    taken.to_string()
}

async fn missing_topic(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes { without: &["load"], ..Wishes::default() }).await;
    let all = fleet.all_roles().await;
    fleet.load(&[&all], stage.many(6), (8, stage.many(10)), async {}).await;
    // Registrations are through while the missing topic's events wait, and nothing else does.
    fleet.until_count("select count(*) from saga_state where status in ('running', 'resolving')", 0, PATIENCE).await;
    fleet.until_count("select count(*) from outbox", 8 * stage.many(10) as i64, PATIENCE).await;
    node::create_topics(&fleet.brokers, &[fleet.topic("load")], &[]).await;
    finish(fleet, all).await
}

/// What was in the topic is gone with it, by whoever deleted it: the events of before are not looked
/// for. Those that come after it was deleted are.
async fn deleted_topic(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.all_roles().await;
    fleet.commit_events_of("before".to_owned(), stage.many(30), 100).await;
    fleet.until_count("select count(*) from outbox", 0, PATIENCE).await;
    fleet.forget_events().await;
    node::delete_topics(&fleet.brokers, &[&fleet.topic("load")]).await;
    let length = stage.millis(500, 4000);
    fleet
        .load(&[&all], stage.many(6), (8, stage.many(20)), async {
            sleep(length).await;
            node::create_topics(&fleet.brokers, &[fleet.topic("load")], &[]).await;
        })
        .await;
    finish(fleet, all).await
}

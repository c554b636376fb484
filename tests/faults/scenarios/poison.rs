//! Messages that can't be sent, and what is behind them.

use std::time::Duration;

use outbox_relay::append;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    node,
    stage::Stage,
};

const PATIENCE: Duration = Duration::from_secs(120);

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("a message that kills the process", "found by ever fewer in flight, and parked", kills),
        scenario!("a message too large for the client", "parked with what is behind it", too_large),
        scenario!("a message too large for the topic", "the broker refuses it, and its batch", refused),
        scenario!("fenced: a message too large for the topic", "its transaction is refused", refused),
        scenario!("a blocked key before 10,000 others", "the others go on", blocked),
    ]
}

async fn kills(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes { no_user_service: true, ..Wishes::default() }).await;
    let relay = fleet.process("relay", "relay::enqueued=return(poison)", u32::MAX);
    fleet.commit_events(10, stage.many(10)).await;
    fleet.commit_events_of("poison".to_owned(), 3, 100).await;
    fleet.commit_events(10, stage.many(5)).await;
    fleet.until_count("select count(*) from outbox_parked", 3, PATIENCE).await;
    (0..relay.deaths()).for_each(|_| fleet.disturbed());
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![relay], Expected { parked_keys: 1, ..Expected::default() }).await
}

async fn too_large(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes { no_user_service: true, ..Wishes::default() }).await;
    let relay = fleet.process("relay", "", 0);
    fleet.commit_events_of("large".to_owned(), 2, 100).await;
    fleet.commit_events_of("large".to_owned(), 1, 2_000_000).await;
    fleet.commit_events_of("large".to_owned(), 5, 100).await;
    fleet.commit_events(10, stage.many(10)).await;
    fleet.until_count("select count(*) from outbox_parked", 6, PATIENCE).await;
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![relay], Expected { parked_keys: 1, ..Expected::default() }).await
}

async fn refused(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes { no_user_service: true, without: &["load"], ..Wishes::default() }).await;
    node::create_topics(&fleet.brokers, &[fleet.topic("load")], &[("max.message.bytes", "20000")]).await;
    fleet.commit_events_of("large".to_owned(), 2, 100).await;
    fleet.commit_events_of("large".to_owned(), 1, 50_000).await;
    fleet.commit_events_of("large".to_owned(), 5, 100).await;
    fleet.commit_events(40, stage.many(6)).await;
    // All are there before the relay is: the large one flies in the company of many.
    let relay = fleet.process("relay", "", 0);
    fleet.until_count("select count(*) from outbox_parked", 6, PATIENCE).await;
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![relay], Expected { parked_keys: 1, ..Expected::default() }).await
}

async fn blocked(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes { no_user_service: true, ..Wishes::default() }).await;
    let others = stage.many(10_000);
    let mut tx = fleet.db.begin().await.expect("a transaction");
    let mut told = vec![];
    for (key, bytes) in [("blocked".to_owned(), 2_000_000), ("blocked".to_owned(), 10)]
        .into_iter()
        .chain((0..others).map(|n| (format!("other{}", n % 1000), 10)))
    {
        let event = fleet.event(&key, bytes);
        append(&mut tx, &event).await.expect("appended");
        told.push((key, event.id));
    }
    tx.commit().await.expect("committed");
    {
        let mut events = fleet.told.lock().unwrap();
        told.into_iter().for_each(|(key, id)| events.events.entry(key).or_default().push(id));
    }
    let relay = fleet.process("relay", "", 0);
    fleet.until_count("select count(*) from outbox_parked", 2, PATIENCE).await;
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![relay], Expected { parked_keys: 1, ..Expected::default() }).await
}

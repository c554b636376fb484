//! Replies that do not come, come twice, late, forged, or in another order.

use std::time::Duration;

use outbox_relay::replay;
use rand::{Rng, SeedableRng, rngs::StdRng};
use serde_json::json;
use tokio::time::sleep;
use uuid::Uuid;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    keeper::Keeper,
    node,
    postman::Postman,
    proxy::{Proxy, Wire},
    stage::Stage,
    support::kafka,
};

const PATIENCE: Duration = Duration::from_secs(120);
const COMMANDS: [&str; 2] = ["user.create", "user.delete"];
const REPLIES: [&str; 4] = ["user.create.done", "user.create.close", "user.delete.done", "user.delete.close"];
const OPEN: &str = "select count(*) from saga_state where status in ('running', 'resolving')";

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("every message to the other service lost", "it is asked instead, and creates", commands_lost),
        scenario!("every reply lost", "it is asked instead, and has it", replies_lost),
        scenario!("every message doubled", "commands and replies", doubled),
        scenario!("every reply late", "after the deadline, while it is asked or later", late),
        scenario!("replies lost, doubled, late and shuffled", "by the dice", shuffled),
        scenario!("forged replies", "wrong saga, wrong user, garbage, a close for an active user", forged),
        scenario!("close races CreateUser", "a refusal comes while it is asked", racing),
        scenario!("compensated before the command is out", "the relay starts after the refusal", early),
        scenario!("the undo refused", "the saga is stuck and says so", undo_refused),
        scenario!("the undo can't be sent", "stuck until an operator has replayed it", undo_parked),
        scenario!("the other service unreachable for a while", "asked again, longer and longer", away),
        scenario!("the other service unreachable for good", "stuck, and says so", gone),
    ]
}

/// The two services with a postman each way, who does as `commands` and `replies` say.
async fn by_post(
    stage: &Stage,
    vars: Vec<(&'static str, String)>,
    commands: impl FnMut(&str) -> Vec<Duration> + Send + 'static,
    replies: impl FnMut(&str) -> Vec<Duration> + Send + 'static,
) -> (Fleet, Keeper, [Postman; 2]) {
    let other = format!("o{}.", Uuid::new_v4().simple());
    let wishes = Wishes { vars, other_prefix: Some(other.clone()), ..Wishes::default() };
    let fleet = Fleet::new(stage, wishes).await;
    let there = Postman::hire(&fleet.brokers, &fleet.prefix, &other, &COMMANDS, commands);
    let back = Postman::hire(&fleet.brokers, &other, &fleet.prefix, &REPLIES, replies);
    let all = fleet.all_roles().await;
    (fleet, all, [there, back])
}

fn once(_: &str) -> Vec<Duration> {
    vec![Duration::ZERO]
}

fn never(_: &str) -> Vec<Duration> {
    vec![]
}

fn twice(_: &str) -> Vec<Duration> {
    vec![Duration::ZERO, Duration::from_millis(300)]
}

async fn finish(fleet: Fleet, all: Keeper) -> Verdict {
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![all], Expected::default()).await
}

async fn commands_lost(stage: Stage) -> Verdict {
    // The undo command has to arrive, or nothing could ever be erased.
    let commands = |topic: &str| if topic == "user.create" { never(topic) } else { once(topic) };
    let (fleet, all, _post) = by_post(&stage, vec![("SAGA_STEP_TIMEOUT", "1s".into())], commands, never).await;
    fleet.register(&[&all], stage.many(9)).await;
    finish(fleet, all).await
}

async fn replies_lost(stage: Stage) -> Verdict {
    let (fleet, all, _post) = by_post(&stage, vec![("SAGA_STEP_TIMEOUT", "1s".into())], once, never).await;
    fleet.register(&[&all], stage.many(9)).await;
    finish(fleet, all).await
}

async fn doubled(stage: Stage) -> Verdict {
    let (fleet, all, _post) = by_post(&stage, vec![], twice, twice).await;
    fleet.register(&[&all], stage.many(9)).await;
    finish(fleet, all).await
}

async fn late(mut stage: Stage) -> Verdict {
    let mut dice = StdRng::seed_from_u64(stage.roll(0, u64::MAX - 1));
    let replies = move |_: &str| vec![Duration::from_millis(dice.random_range(900..3000))];
    let (fleet, all, _post) = by_post(&stage, vec![("SAGA_STEP_TIMEOUT", "1s".into())], once, replies).await;
    fleet.register(&[&all], stage.many(12)).await;
    finish(fleet, all).await
}

async fn shuffled(mut stage: Stage) -> Verdict {
    let chaos = |seed: u64, may_lose: bool| {
        let mut dice = StdRng::seed_from_u64(seed);
        move |_: &str| {
            let copies = dice.random_range(if may_lose { 0..4 } else { 1..4 });
            (0..copies).map(|_| Duration::from_millis(dice.random_range(0..2500))).collect()
        }
    };
    // Commands may come twice and late, and even behind their undo; Kafka loses none.
    let commands = chaos(stage.roll(0, u64::MAX - 1), false);
    let replies = chaos(stage.roll(0, u64::MAX - 1), true);
    let (fleet, all, _post) = by_post(&stage, vec![("SAGA_STEP_TIMEOUT", "1s".into())], commands, replies).await;
    fleet.register(&[&all], stage.many(15)).await;
    fleet.settle(PATIENCE).await;
    // What is still under way must not change what is at rest.
    sleep(Duration::from_secs(3)).await;
    finish(fleet, all).await
}

async fn forged(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.all_roles().await;
    fleet.register(&[&all], stage.many(9)).await;
    fleet.settle(PATIENCE).await;
    let users = fleet.told.lock().unwrap().users.clone();
    let unknown = Uuid::new_v4().to_string();
    let sagas: Vec<&String> = users.values().collect();
    let close = fleet.topic("user.create.close");
    let mut sent = 0;
    for (n, (id, saga)) in users.iter().enumerate() {
        let (key, value) = (id.to_string(), json!({ "id": id, "reason": "forged" }).to_string());
        let another = sagas[(n + 1) % sagas.len()].as_str();
        for headers in [&[("saga-id", saga.as_str())][..], &[("saga-id", another)], &[("saga-id", &unknown)], &[]] {
            kafka::send(&fleet.brokers, &close, &key, headers, value.as_bytes()).await;
            sent += 1;
        }
        for garbage in [&b"not json"[..], b"", b"{\"id\":\"one\"}", b"\xff\xfe\x00"] {
            kafka::send(&fleet.brokers, &close, &key, &[], garbage).await;
            sent += 1;
        }
    }
    let all_taken_in = "select count(*) from inbox where topic = 'user.create.close' and detail is not null";
    let refused = fleet.told.lock().unwrap().refused.len();
    let since = std::time::Instant::now();
    while fleet.count(all_taken_in).await < i64::from(sent) && since.elapsed() < PATIENCE {
        sleep(Duration::from_millis(100)).await;
    }
    let kept = fleet.count(all_taken_in).await;
    let mut verdict = finish(fleet, all).await;
    if kept < i64::from(sent) {
        verdict.findings.push(format!("{sent} forged replies were sent (beside {refused} good ones), {kept} are kept"));
    }
    verdict
}

/// The refusal arrives about when the saga's deadline has passed and `CreateUser` is on its way.
async fn racing(mut stage: Stage) -> Verdict {
    let vars = vec![("SAGA_STEP_TIMEOUT", "1s".into())];
    let (fleet, all, _post) =
        by_post(
            &stage,
            vars,
            once,
            |topic: &str| {
                if topic.starts_with("user.create") { never(topic) } else { once(topic) }
            },
        )
        .await;
    let rests: Vec<_> = (0..stage.many(8)).map(|_| stage.millis(700, 2300)).collect();
    for (n, rest) in rests.into_iter().enumerate() {
        fleet.register_one(&[&all], n, false).await;
        let last = fleet.told.lock().unwrap().users.iter().next_back().map(|(id, saga)| (*id, saga.clone()));
        let (id, saga) = last.expect("one was registered");
        fleet.told.lock().unwrap().undecided.insert(id);
        sleep(rest).await;
        refuse(&fleet, id, &saga).await;
    }
    finish(fleet, all).await
}

async fn early(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let rest = fleet.process("http,sagas", "", 0);
    rest.until_up().await;
    for n in 0..stage.many(6) {
        fleet.register_one(&[&rest], n, false).await;
    }
    let users = fleet.told.lock().unwrap().users.clone();
    fleet.told.lock().unwrap().refused.extend(users.keys());
    for (id, saga) in &users {
        refuse(&fleet, *id, saga).await;
    }
    fleet.until_count(OPEN, 0, PATIENCE).await;
    let relay = fleet.process("relay", "", 0);
    fleet.settle(PATIENCE).await;
    judge(fleet, vec![rest, relay], Expected::default()).await
}

async fn undo_refused(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.all_roles().await;
    fleet.register(&[&all], stage.many(9)).await;
    fleet.settle(PATIENCE).await;
    let told = {
        let told = fleet.told.lock().unwrap();
        told.refused.iter().map(|id| (*id, told.users[id].clone())).collect::<Vec<_>>()
    };
    for (id, saga) in &told {
        let value = json!({ "id": id, "reason": "legal hold" }).to_string();
        let topic = fleet.topic("user.delete.close");
        kafka::send(&fleet.brokers, &topic, &id.to_string(), &[("saga-id", saga)], value.as_bytes()).await;
    }
    let stuck = told.len() as i64;
    fleet.until_count("select count(*) from saga_state where status = 'stuck'", stuck, PATIENCE).await;
    judge(fleet, vec![all], Expected { stuck, ..Expected::default() }).await
}

/// The broker refuses the undo command for its size, until somebody raises the topic's limit.
async fn undo_parked(stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes { without: &["user.delete"], ..Wishes::default() }).await;
    let topic = fleet.topic("user.delete");
    node::create_topics(&fleet.brokers, std::slice::from_ref(&topic), &[("max.message.bytes", "100")]).await;
    let all = fleet.all_roles().await;
    fleet.register(&[&all], stage.many(9)).await;
    let refused = fleet.told.lock().unwrap().refused.len() as i64;
    assert!(refused > 0, "some are refused");
    let stuck = "select count(*) from saga_state where status = 'stuck' and stuck_reason like '%can''t be sent%'";
    fleet.until_count(stuck, refused, PATIENCE).await;

    node::set_of_topic(&fleet.brokers, &topic, "max.message.bytes", "100000").await;
    let mut tx = fleet.db.begin().await.expect("a transaction");
    let parked: Vec<i64> =
        sqlx::query_scalar("select id from outbox_parked").fetch_all(&mut *tx).await.expect("the parked");
    for row in parked {
        replay(&mut tx, row, false).await.expect("it goes out again");
    }
    tx.commit().await.expect("committed");
    fleet.until_count(stuck, 0, PATIENCE).await;
    finish(fleet, all).await
}

/// No command, no reply, and a wire to the other service that is silent.
async fn unreachable(stage: &Stage, attempts: &str) -> (Fleet, Proxy, Keeper) {
    let other = format!("o{}.", Uuid::new_v4().simple());
    let mut fleet = Fleet::new(stage, Wishes { other_prefix: Some(other), ..Wishes::default() }).await;
    let wire = Proxy::to(fleet.other_address()).await;
    fleet.set("USER_SERVICE_GRPC_URL", format!("http://127.0.0.1:{}", wire.port));
    fleet.set("SAGA_STEP_TIMEOUT", "1s".into());
    fleet.set("SAGA_RESOLVE_ATTEMPTS", attempts.into());
    let all = fleet.all_roles().await;
    (fleet, wire, all)
}

async fn away(mut stage: Stage) -> Verdict {
    let (fleet, wire, all) = unreachable(&stage, "10").await;
    let (silent, cut) = (stage.seconds(4, 60), stage.millis(1000, 4000));
    wire.set(Wire::Silent);
    fleet
        .load(&[&all], stage.many(6), (1, 1), async {
            sleep(silent).await;
            wire.set_for(Wire::Cut, cut).await;
        })
        .await;
    // Its undo commands are lost with everything else: only those it accepts are looked at.
    finish(fleet, all).await
}

async fn gone(stage: Stage) -> Verdict {
    let (fleet, wire, all) = unreachable(&stage, "2").await;
    wire.set(Wire::Cut);
    let users = stage.many(6);
    fleet.register(&[&all], users).await;
    fleet.until_count("select count(*) from saga_state where status = 'stuck'", users as i64, PATIENCE).await;
    judge(fleet, vec![all], Expected { stuck: users as i64, ..Expected::default() }).await
}

async fn refuse(fleet: &Fleet, id: i64, saga: &str) {
    let value = json!({ "id": id, "reason": "not welcome" }).to_string();
    let topic = fleet.topic("user.create.close");
    kafka::send(&fleet.brokers, &topic, &id.to_string(), &[("saga-id", saga)], value.as_bytes()).await;
}

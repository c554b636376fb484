//! The process ends at a named place between two steps, as `kill -9` would end it there, and is
//! started again to end there again.

use std::time::Duration;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    stage::Stage,
};

const LIVES: u32 = 3;

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("kill registration::prepared", "the process, before COMMIT", whole_process),
        scenario!("kill registration::committed", "the process, after COMMIT and before the answer", whole_process),
        scenario!("kill relay::lanes_taken", "the relay, with lanes just taken", relay),
        scenario!("kill relay::claimed", "the relay, rows read and none sent", relay),
        scenario!("kill relay::enqueued", "the relay, a message in the producer's queue", relay),
        scenario!("kill relay::acknowledged", "the relay, Kafka has it and the archive does not", relay),
        scenario!("kill relay::archived", "the relay, the archive has it", relay),
        scenario!("kill sagas::received", "the consumer, a reply read", consumer),
        scenario!("kill sagas::in_inbox", "the consumer, before it decides", consumer),
        scenario!("kill sagas::decided", "the consumer, before COMMIT", consumer),
        scenario!("kill sagas::committed", "the consumer, before the offset is stored", consumer),
        scenario!("kill sagas::offset_stored", "the consumer, before the offset is committed", consumer),
        scenario!("kill sagas::resolving", "whoever asks, before the question", asker),
        scenario!("kill sagas::asked", "whoever asks, before the answer is noted", asker),
        scenario!("fenced: kill relay::enqueued", "the relay, a message in an open transaction", relay),
        scenario!("fenced: kill relay::acknowledged", "the relay, acknowledged and not committed", relay),
        scenario!("fenced: kill relay::settled", "the relay, committed at the broker and not archived", relay),
        scenario!("panic in the relay's worker", "a worker dies, its process lives", worker),
    ]
}

async fn whole_process(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let all = fleet.process("", &armed(&mut stage, 3), LIVES);
    fleet.load(&[&all], stage.many(12), (6, stage.many(10)), async {}).await;
    finish(fleet, vec![all], 1).await
}

async fn relay(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let rest = fleet.process("http,sagas", "", 0);
    // Lanes are looked at twice a second; the other places are passed with every row.
    let most = if stage.name.ends_with("lanes_taken") { 1 } else { 6 };
    let relay = fleet.process("relay", &armed(&mut stage, most), LIVES);
    rest.until_up().await;
    fleet.load(&[&rest], stage.many(6), (6, stage.many(20)), async {}).await;
    finish(fleet, vec![relay, rest], 1).await
}

/// Nobody can be asked, so that a reply that is lost leaves its saga open; and each reply is held long
/// enough for an offset that was stored too early to be committed before the process ends.
async fn consumer(mut stage: Stage) -> Verdict {
    let vars = vec![("USER_SERVICE_GRPC_URL", String::new()), ("SAGA_STEP_TIMEOUT", "10m".to_owned())];
    let fleet = Fleet::new(&stage, Wishes { vars, ..Wishes::default() }).await;
    let rest = fleet.process("http,relay", "", 0);
    let place = armed(&mut stage, 2);
    let held =
        if place.starts_with("sagas::received") { place } else { format!("sagas::received=sleep(1200);{place}") };
    let sagas = fleet.process("sagas", &held, LIVES);
    rest.until_up().await;
    fleet.register(&[&rest], stage.many(9)).await;
    finish(fleet, vec![sagas, rest], 1).await
}

/// No reply comes: every saga is settled by asking.
async fn asker(mut stage: Stage) -> Verdict {
    let vars = vec![("SAGA_STEP_TIMEOUT", "1s".to_owned())];
    let fleet = Fleet::new(&stage, Wishes { vars, replies_lost: true, ..Wishes::default() }).await;
    let rest = fleet.process("http,relay", "", 0);
    let sagas = fleet.process("sagas", &armed(&mut stage, 2), LIVES);
    rest.until_up().await;
    fleet.register(&[&rest], stage.many(9)).await;
    finish(fleet, vec![sagas, rest], 1).await
}

async fn worker(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let skip = stage.roll(0, 20);
    let all = fleet.process("", &format!("relay::acknowledged={skip}*off->2*panic"), LIVES);
    all.until_up().await;
    (0..2).for_each(|_| fleet.disturbed());
    fleet.load(&[&all], stage.many(6), (6, stage.many(20)), async {}).await;
    finish(fleet, vec![all], 0).await
}

/// The place this scenario is named after, struck after a few passings.
fn armed(stage: &mut Stage, most: u64) -> String {
    let place = stage.name.trim_start_matches("fenced: ").trim_start_matches("kill ");
    format!("{place}={}*off->return", stage.roll(0, most))
}

async fn finish(fleet: Fleet, keepers: Vec<crate::keeper::Keeper>, least_deaths: u32) -> Verdict {
    (0..LIVES).for_each(|_| fleet.disturbed());
    fleet.settle(Duration::from_secs(90)).await;
    let deaths = keepers[0].deaths();
    let mut verdict = judge(fleet, keepers, Expected::default()).await;
    if deaths < least_deaths {
        verdict.findings.push("the place was never reached: nothing was proven".to_owned());
    }
    verdict
}

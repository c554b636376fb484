//! Several relays: leases that run out, processes that stand still, hand-overs.

use std::time::{Duration, Instant};

use nix::sys::signal::Signal;
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;

use super::{Scenario, scenario};
use crate::{
    checker::{Expected, Verdict, judge},
    fleet::{Fleet, Wishes},
    keeper::Keeper,
    node,
    stage::Stage,
};

pub fn scenarios() -> Vec<Scenario> {
    vec![
        scenario!("a relay frozen past its lease, thawed", "SIGSTOP, take-over, SIGCONT, twice", frozen),
        scenario!("frozen between looking and sending", "thawed when the other has sent it all", frozen_while_sending),
        scenario!("fenced: frozen between looking and sending", "not a copy", frozen_while_sending),
        scenario!("fenced: both relays frozen by turns", "not a copy of what the other has sent", frozen_by_turns),
        scenario!("fenced: a relay killed under load, again and again", "the other takes over", killed),
        scenario!("fenced: hand-over under load", "whole groups of lanes", handed_over),
        scenario!("fenced: all relays killed in mid-transaction", "what consumers wait for", killed_in_transaction)
            .rare(),
        scenario!("both relays frozen by turns", "each is thawed into the other's lanes", frozen_by_turns),
        scenario!("a relay killed under load, again and again", "the other takes over", killed),
        scenario!("hand-over under load", "SIGTERM to one of two, and a new one joins", handed_over),
        scenario!("all replicas restarted in a row", "a rolling update of three", rolling),
        scenario!("clocks apart", "two replicas an hour apart, both ways", clocks_apart),
    ]
}

const EACH: usize = 8;

/// Both hold lanes before anything is done to either.
async fn pair(fleet: &Fleet) -> [Keeper; 2] {
    let pair = [fleet.process("", "", 0), fleet.process("", "", 0)];
    for keeper in &pair {
        keeper.until_up().await;
    }
    fleet.until_count("select count(distinct owner) from outbox_lanes", 2, Duration::from_secs(20)).await;
    pair
}

/// Load until it is told that the harm is done.
async fn under_load(fleet: &Fleet, keepers: &[&Keeper], stage: &Stage, harm: impl Future<Output = ()>) {
    fleet.load(keepers, stage.many(EACH), (12, stage.many(60)), harm).await;
}

async fn finish(fleet: Fleet, keepers: Vec<Keeper>) -> Verdict {
    fleet.settle(Duration::from_secs(90)).await;
    judge(fleet, keepers, Expected::default()).await
}

async fn freeze(fleet: &Fleet, keeper: &Keeper, length: Duration) {
    fleet.disturbed();
    keeper.signal(Signal::SIGSTOP);
    sleep(length).await;
    keeper.signal(Signal::SIGCONT);
}

async fn frozen(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let [first, second] = pair(&fleet).await;
    let (before, between) = (stage.millis(0, 800), stage.millis(500, 3000));
    let length = stage.seconds(5, 40);
    under_load(&fleet, &[&second], &stage, async {
        sleep(before).await;
        freeze(&fleet, &first, length).await;
        sleep(between).await;
        freeze(&fleet, &first, length).await;
    })
    .await;
    finish(fleet, vec![first, second]).await
}

async fn frozen_by_turns(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let pair = pair(&fleet).await;
    let rests: Vec<Duration> = (0..3).map(|_| stage.millis(0, 1500)).collect();
    let length = stage.seconds(4, 20);
    under_load(&fleet, &[&pair[0], &pair[1]], &stage, async {
        for (turn, rest) in rests.into_iter().enumerate() {
            sleep(rest).await;
            freeze(&fleet, &pair[turn % 2], length).await;
        }
    })
    .await;
    finish(fleet, pair.into()).await
}

/// The relay has looked whether the lanes are its own, and sends when another has sent it all and archived it.
async fn frozen_while_sending(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let rest = fleet.process("http,sagas", "", 0);
    // There before the relay is, so that it has much to send.
    fleet.commit_events(stage.many(40), 3).await;
    let skip = stage.roll(0, 20);
    let frozen = fleet.process("relay", &format!("relay::sending={skip}*off->1*return(SIGSTOP)->off"), 1);
    fleet.disturbed();
    frozen.until_frozen().await;
    let other = fleet.process("relay", "", 0);
    fleet.until_count("select count(*) from outbox", 0, Duration::from_secs(90)).await;
    frozen.signal(Signal::SIGCONT);
    rest.until_up().await;
    under_load(&fleet, &[&rest], &stage, sleep(Duration::from_secs(1))).await;
    finish(fleet, vec![rest, frozen, other]).await
}

async fn killed(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let [first, second] = pair(&fleet).await;
    let rests: Vec<Duration> = (0..stage.many(3)).map(|_| stage.millis(200, 3000)).collect();
    under_load(&fleet, &[&second], &stage, async {
        for rest in rests {
            sleep(rest).await;
            fleet.disturbed();
            first.signal(Signal::SIGKILL);
        }
    })
    .await;
    finish(fleet, vec![first, second]).await
}

/// Consumers read nothing behind the open transactions before these are aborted: by those that come after, or by Kafka
/// when they have timed out.
async fn killed_in_transaction(mut stage: Stage) -> Verdict {
    // As in production: the lanes of the dead are free when it has run out.
    let vars = vec![("RELAY_LEASE", "10s".to_owned())];
    let fleet = Fleet::new(&stage, Wishes { vars, ..Wishes::default() }).await;
    let rest = fleet.process("http,sagas", "", 0);
    fleet.commit_events(24, 2).await;
    let armed = format!("relay::enqueued={}*off->return", stage.roll(3, 8));
    let relays = [fleet.process("relay", &armed, 1), fleet.process("relay", &armed, 1)];
    (0..2).for_each(|_| fleet.disturbed());
    rest.until_up().await;
    let watched = CancellationToken::new();
    let (waited, ()) = tokio::join!(longest_open(&fleet, &watched), async {
        // Little: rows whose relays have died twice go one at a time.
        fleet.load(&[&rest], stage.many(4), (12, stage.many(8)), async {}).await;
        fleet.settle(Duration::from_secs(90)).await;
        watched.cancel();
    });
    let died = relays.iter().all(|relay| relay.deaths() > 0);
    let [first, second] = relays;
    let mut verdict = finish(fleet, vec![rest, first, second]).await;
    verdict.measured.push(format!("consumers waited {:.1} s", waited.as_secs_f64()));
    if !died {
        verdict.findings.push("not all relays were killed: nothing was proven".to_owned());
    }
    verdict
}

/// The longest that a partition ended for consumers at one place, with more behind it.
async fn longest_open(fleet: &Fleet, enough: &CancellationToken) -> Duration {
    let topic = fleet.topic("load");
    let (mut open, mut longest) = ([None; 4], Duration::ZERO);
    while !enough.is_cancelled() {
        let now = node::open_transactions(&fleet.brokers, &topic).await;
        for (known, end) in open.iter_mut().zip(now) {
            *known = end.map(|end| match *known {
                Some((before, since)) if before == end => (end, since),
                _ => (end, Instant::now()),
            });
            longest = longest.max(known.map_or(Duration::ZERO, |(_, since)| since.elapsed()));
        }
        sleep(Duration::from_millis(100)).await;
    }
    longest
}

async fn handed_over(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let [first, second] = pair(&fleet).await;
    let rests: Vec<Duration> = (0..stage.many(3)).map(|_| stage.millis(200, 2500)).collect();
    under_load(&fleet, &[&second], &stage, async {
        for rest in rests {
            sleep(rest).await;
            first.signal(Signal::SIGTERM);
        }
    })
    .await;
    // In good order: not one copy.
    finish(fleet, vec![first, second]).await
}

async fn rolling(mut stage: Stage) -> Verdict {
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let [first, second] = pair(&fleet).await;
    let third = fleet.all_roles().await;
    let all = [first, second, third];
    let rest = stage.millis(300, 1500);
    under_load(&fleet, &[&all[0], &all[1], &all[2]], &stage, async {
        for one in &all {
            let before = one.deaths();
            one.signal(Signal::SIGTERM);
            while one.deaths() == before || one.http().is_empty() {
                sleep(Duration::from_millis(50)).await;
            }
            sleep(rest).await;
        }
    })
    .await;
    finish(fleet, all.into()).await
}

/// A library of ten lines stands before libc's clock in one of the two processes.
async fn clocks_apart(mut stage: Stage) -> Verdict {
    let shift = if stage.roll(0, 1) == 0 { 3600 } else { -3600 };
    let fleet = Fleet::new(&stage, Wishes::default()).await;
    let shifted = clock_shifter();
    let preload = [("LD_PRELOAD".to_owned(), shifted), ("CLOCK_SHIFT_SECONDS".to_owned(), shift.to_string())];
    let pair = [fleet.process("", "", 0), fleet.process_with("", &preload)];
    for keeper in &pair {
        keeper.until_up().await;
    }
    fleet.until_count("select count(distinct owner) from outbox_lanes", 2, Duration::from_secs(20)).await;
    under_load(&fleet, &[&pair[0], &pair[1]], &stage, async {
        sleep(Duration::from_secs(1)).await;
        fleet.disturbed();
        pair[0].signal(Signal::SIGKILL);
    })
    .await;
    finish(fleet, pair.into()).await
}

/// Compiles it; a C compiler is needed to build the service too.
fn clock_shifter() -> String {
    const SOURCE: &str = r#"
#define _GNU_SOURCE
#include <stdlib.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
int clock_gettime(clockid_t clock, struct timespec *now) {
    long failed = syscall(SYS_clock_gettime, clock, now);
    const char *shift = getenv("CLOCK_SHIFT_SECONDS");
    if (!failed && clock == CLOCK_REALTIME && shift) now->tv_sec += atol(shift);
    return failed;
}
"#;
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, library) = (folder.join("clock-shifter.c"), folder.join("clock-shifter.so"));
    std::fs::write(&source, SOURCE).expect("the source");
    let compiled = std::process::Command::new("cc").args(["-shared", "-fPIC", "-o"]).args([&library, &source]).status();
    assert!(compiled.expect("a C compiler").success());
    library.to_str().expect("UTF-8").to_owned()
}

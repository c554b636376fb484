//! The fault suite. Every scenario has a database and topics of its own, runs the built binary as
//! child processes, does its harm, waits until everything is at rest, and is then judged by a checker
//! that reads Kafka from the beginning and compares it with what the clients were answered.
//!
//! - [`stage`], [`fleet`]: what a scenario plays on: database, topics, load, the other service;
//! - [`keeper`]: processes that are started again when they die; [`node`]: a Kafka that may be harmed;
//! - [`cluster`]: three of them; [`protocol`]: what is asked of them; [`control`]: a plain producer beside;
//! - [`proxy`]: wires that break; [`refusal`]: one that speaks Kafka; [`postman`]: messages that come badly;
//! - [`checker`]: the counts;
//! - [`scenarios`]: what goes wrong.
//!
//! Everything random comes from the seed: the same `--seed` and `--only` play the same scenario.

#![expect(clippy::disallowed_methods, reason = "a test looks at the database by itself")]

mod checker;
mod cluster;
mod control;
mod fleet;
mod keeper;
mod node;
mod postman;
mod protocol;
mod proxy;
mod refusal;
mod scenarios;
mod stage;

/// The harness of `tests/it`, which uses more of it.
#[allow(dead_code)]
#[path = "../it/support/mod.rs"]
mod support;

use std::{
    process::ExitCode,
    sync::Arc,
    time::{Duration, Instant},
};

use clap::Parser;
use tokio::{sync::Semaphore, task::JoinSet};

use self::{
    checker::Verdict,
    scenarios::{Lane, Scenario},
    stage::Stage,
};

/// Break what can break, and count what is lost, out of order or half done.
///
/// A round is every scenario once. The seed decides everything that is random; a scenario that failed is played
/// again by its line's seed and --only NAME.
#[derive(Parser)]
#[command(bin_name = "tests/faults/run", max_term_width = 100)]
struct Arguments {
    /// How often every scenario is played, each time with the next seed
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// The first round's seed
    #[arg(long, default_value_t = 1, value_name = "S")]
    seed: u64,
    /// Only scenarios whose name contains this
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// With the rare scenarios and the long waits: minutes instead of seconds, and more load
    #[arg(long)]
    full: bool,
    /// Scenarios played at once, beside two that have an Apache Kafka of their own and one on three of them
    #[arg(long, default_value_t = 8, value_name = "N")]
    at_once: usize,
    /// Name the scenarios and end
    #[arg(long)]
    list: bool,
}

/// How many further Apache Kafkas may run at once.
const OWN_BROKERS: usize = 2;

/// A scenario that has been played.
struct Played {
    scenario: &'static Scenario,
    seed: u64,
    took: Duration,
    /// An error is what it failed with: it could not even be judged.
    verdict: Result<Verdict, String>,
}

#[tokio::main]
async fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let chosen: Vec<&'static Scenario> = scenarios::all()
        .filter(|scenario| match &arguments.only {
            Some(only) => scenario.name.contains(only.as_str()),
            None => arguments.full || arguments.list || !scenario.rare,
        })
        .collect();
    if arguments.list {
        chosen.iter().for_each(|scenario| println!("{:<44} {}", scenario.name, scenario.about));
        return ExitCode::SUCCESS;
    }
    let there = |program: &str| std::process::Command::new(program).arg("-version").output().is_ok();
    if !there("java") || !there("mvn") {
        eprintln!(
            "the fault suite needs real Apache Kafka: install Java 17 or newer and Maven (tests/kafka/run --help)"
        );
        return ExitCode::from(2);
    }
    if chosen.is_empty() {
        eprintln!("no scenario has such a name; --list names them");
        return ExitCode::from(2);
    }
    // What a scenario asserts in vain stands in its line.
    std::panic::set_hook(Box::new(|_| {}));
    let since = Instant::now();
    let played = play(&arguments, &chosen).await;
    let good = summary(&played, since.elapsed());
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn play(arguments: &Arguments, chosen: &[&'static Scenario]) -> Vec<Played> {
    let room = Arc::new(Semaphore::new(arguments.at_once.max(1)));
    let own_broker = Arc::new(Semaphore::new(OWN_BROKERS));
    let cluster = Arc::new(Semaphore::new(1));
    let mut playing = JoinSet::new();
    let total = chosen.len() as u64 * arguments.rounds;
    for seed in arguments.seed..arguments.seed + arguments.rounds {
        for &scenario in chosen {
            let (room, own_broker, cluster) = (room.clone(), own_broker.clone(), cluster.clone());
            let full = arguments.full;
            playing.spawn(async move {
                // Those with a broker of their own wait for nobody else, or they would all come last.
                let lane = match scenario.lane {
                    Lane::Shared => room,
                    Lane::OwnBroker => own_broker,
                    Lane::Cluster => cluster,
                };
                let _room = lane.acquire_owned().await.expect("open");
                play_one(scenario, seed, full).await
            });
        }
    }
    let mut played = vec![];
    while let Some(one) = playing.join_next().await {
        let one = one.expect("the player");
        println!("[{:>3}/{total}] {}", played.len() + 1, line(&one));
        played.push(one);
    }
    played
}

async fn play_one(scenario: &'static Scenario, seed: u64, full: bool) -> Played {
    // Brokers take their time to start, and a cluster's are started again and again.
    let patience = match (full, scenario.lane) {
        (true, _) => Duration::from_secs(1200),
        (false, Lane::Cluster) => Duration::from_secs(480),
        (false, _) => Duration::from_secs(240),
    };
    let since = Instant::now();
    // A task of its own: what it asserts in vain ends it, not the suite.
    let mut playing = tokio::spawn((scenario.play)(Stage::new(scenario.name, seed, full)));
    let verdict = match tokio::time::timeout(patience, &mut playing).await {
        Ok(Ok(verdict)) => Ok(verdict),
        Ok(Err(failure)) => Err(said(failure)),
        Err(_) => {
            playing.abort();
            Err(format!("not done after {patience:?}"))
        }
    };
    Played { scenario, seed, took: since.elapsed(), verdict }
}

fn said(failure: tokio::task::JoinError) -> String {
    match failure.try_into_panic() {
        Ok(panic) => panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned()))
            .unwrap_or_else(|| "it panicked".to_owned()),
        Err(failure) => failure.to_string(),
    }
}

fn line(played: &Played) -> String {
    let Played { scenario, seed, took, verdict } = played;
    let (mark, words) = match verdict {
        Ok(verdict) if verdict.is_good() => ("ok    ", verdict.to_string()),
        Ok(verdict) => ("FAILED", format!("{verdict}\n         {}", verdict.findings.join("\n         "))),
        Err(why) => ("FAILED", why.clone()),
    };
    format!("{mark} {:<44} seed {seed} {:>4.0} s  {words}", scenario.name, took.as_secs_f64())
}

/// Prints the table; its last line is the whole verdict. `true` when everything held.
fn summary(played: &[Played], took: Duration) -> bool {
    let mut total = Verdict::default();
    played.iter().filter_map(|one| one.verdict.as_ref().ok()).for_each(|verdict| total.add(verdict));
    let failed: Vec<_> = played.iter().filter(|one| !one.verdict.as_ref().is_ok_and(Verdict::is_good)).collect();
    println!("\n{} scenarios played in {:.0} s", played.len(), took.as_secs_f64());
    println!("  answered    {:>8}  registrations and commits a client was told of", total.answered);
    println!("  published   {:>8}  distinct messages in Kafka", total.published);
    println!("  duplicates  {:>8}  copies under a known ce_id; {} were allowed for", total.duplicates, total.allowed);
    println!("  parked      {:>8}  as it had to be", total.parked);
    println!("  stuck       {:>8}  sagas, as it had to be", total.stuck);
    println!("  deaths      {:>8}  of processes", total.deaths);
    for one in &failed {
        println!("  failed: tests/faults/run --seed {} --only \"{}\"", one.seed, one.scenario.name);
    }
    println!("lost={} reordered={} half_done={}", total.lost, total.reordered, total.half_done);
    failed.is_empty()
}

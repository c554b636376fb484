//! How fast the outbox empties, against what the producer alone reaches in the same run.
//!
//! ```sh
//! tests/bench/relay            # starts PostgreSQL and Apache Kafka, runs this, stops them
//! DATABASE_URL=… KAFKA_BROKERS=… cargo bench -p outbox-relay -- [drain|fenced|latency|archived|held]…
//! ```
//!
//! It makes a database of its own on that server and drops it at the end. Rows are one kilobyte and the
//! headers a registration has, over 10,000 keys; `synchronous_commit` is on and acks is `all`, as in
//! production. Rates are medians of three rounds, and what is compared is measured side by side. Processor
//! time is that of all processes of a name on this machine: meaningful where nothing else runs on it.

#![expect(clippy::disallowed_methods, reason = "a benchmark looks at the database by itself")]

mod cpu;
mod latency;
mod outbox;
mod producer;

use std::{env, time::Duration};

use self::{cpu::Clock, outbox::Outbox};

/// Distinct keys.
const KEYS: usize = 10_000;
/// Bytes of a value.
const PAYLOAD: usize = 1024;
/// How often a rate is measured.
const ROUNDS: usize = 3;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Which measurements were asked for; all of them when none was named.
struct Wanted(Vec<String>);

impl Wanted {
    fn has(&self, name: &str) -> bool {
        self.0.is_empty() || self.0.iter().any(|wanted| wanted == name)
    }
}

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_env_filter(env::var("RUST_LOG").unwrap_or_else(|_| "error".into())).init();
    let wanted = Wanted(env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect());
    let rows = number("BENCH_ROWS", 200_000);
    let outbox = Outbox::make().await?;

    // The first run is the broker's warming up.
    producer::rate(&outbox.brokers, rows).await?;
    let (mut raw, mut plain) = (vec![], vec![]);
    let mut clock = Clock::default();
    for _ in 0..ROUNDS {
        raw.push(producer::rate(&outbox.brokers, rows).await?);
        plain.push(outbox.drain(rows, &mut clock).await?);
    }
    line("producer alone, the same bytes", median(&raw), "messages/s", String::new());
    line("drain", median(&plain), "events/s", percent(&plain, &raw, "the producer"));
    println!("  {}", clock.per_event(ROUNDS * rows));
    let resident = resident_mib();
    if wanted.has("fenced") {
        let (mut plain, mut fenced) = (vec![], vec![]);
        for _ in 0..ROUNDS {
            plain.extend(drains(&outbox, rows, 1).await?);
            fenced.extend(drains(&outbox.fenced(), rows, 1).await?);
        }
        line("drain, fenced", median(&fenced), "events/s", percent(&fenced, &plain, "unfenced"));
    }
    if wanted.has("latency") {
        let rate = number("BENCH_RATE", 500);
        for (name, outbox) in [("commit → consumer", outbox.clone()), ("commit → consumer, fenced", outbox.fenced())]
        {
            let latency = latency::measure(&outbox, rate, Duration::from_secs(20)).await?;
            println!("{name:<32} at {rate} events/s: {latency}");
        }
    }
    if wanted.has("archived") {
        let archived = number("BENCH_ARCHIVED", 5_000_000);
        let without = drains(&outbox, rows, ROUNDS).await?;
        outbox.fill_archive(archived).await?;
        let with = drains(&outbox, rows, ROUNDS).await?;
        line(&format!("drain, {archived} archived"), median(&with), "events/s", percent(&with, &without, "without"));
    }
    if wanted.has("held") {
        let held_for = Duration::from_secs(number("BENCH_HELD_SECONDS", 120) as u64);
        let (without, held) = outbox.drain_under_held_snapshot(rows, held_for).await?;
        // Dead rows pile up behind the snapshot: the last rounds have the most of them.
        let last = &held[held.len().saturating_sub(ROUNDS)..];
        let name = format!("drain, snapshot held {} s", held_for.as_secs());
        line(&name, median(last), "events/s", percent(last, &without, "without"));
    }
    println!(
        "resident memory, this process    {resident:.0} MiB after the first drains, {:.0} at the end",
        resident_mib()
    );
    outbox.drop_database().await
}

async fn drains(outbox: &Outbox, rows: usize, rounds: usize) -> Result<Vec<f64>> {
    let mut rates = vec![];
    for _ in 0..rounds {
        rates.push(outbox.drain(rows, &mut Clock::default()).await?);
    }
    Ok(rates)
}

fn line(name: &str, rate: f64, unit: &str, comment: String) {
    println!("{name:<32} {rate:>8.0} {unit:<12} {comment}");
}

fn percent(rates: &[f64], of: &[f64], what: &str) -> String {
    format!("{:.0} % of {what}", 100.0 * median(rates) / median(of))
}

fn median(rates: &[f64]) -> f64 {
    let mut sorted = rates.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    sorted[sorted.len() / 2]
}

fn number(variable: &str, default: usize) -> usize {
    env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0.0) / 1024.0
}

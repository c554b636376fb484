//! Registrations per second over HTTP, against what bcrypt alone allows on the same cores in the
//! same run. A registration is one hash and one transaction: the hash is the limit.
//!
//! ```sh
//! cargo bench --bench registrations
//! ```

use std::{
    thread,
    time::{Duration, Instant},
};

use auth_service::{
    config::LogFormat,
    crypto,
    dev::system::{System, Wanted},
    telemetry,
};
use reqwest::Client;
use serde_json::json;
use tokio::task::JoinSet;

const COST: u32 = 12;
const LENGTH: Duration = Duration::from_secs(20);
const CLIENTS: usize = 16;

fn main() -> anyhow::Result<()> {
    crypto::install_provider();
    let cores = thread::available_parallelism()?.get();
    let before = raw_bcrypt(cores);
    let registered = tokio::runtime::Runtime::new()?.block_on(registrations())?;
    let after = raw_bcrypt(cores);
    let raw = (before + after) / 2.0;
    println!("bcrypt alone, cost {COST}, {cores} cores   {raw:>6.2} hashes/s (before {before:.2}, after {after:.2})");
    println!("registrations, {CLIENTS} clients       {registered:>6.2} /s   {:.0} % of it", 100.0 * registered / raw);
    Ok(())
}

/// Hashes per second on all cores, nothing else running.
fn raw_bcrypt(cores: usize) -> f64 {
    let since = Instant::now();
    let hashes: usize = thread::scope(|scope| {
        let working: Vec<_> = (0..cores)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = 0;
                    while since.elapsed() < LENGTH / 4 {
                        bcrypt::hash("a long enough secret", COST).expect("a hash");
                        done += 1;
                    }
                    done
                })
            })
            .collect();
        working.into_iter().map(|thread| thread.join().unwrap_or(0)).sum()
    });
    hashes as f64 / since.elapsed().as_secs_f64()
}

async fn registrations() -> anyhow::Result<f64> {
    let scratch = std::env::temp_dir().join(format!("auth-service-bench-{}", std::process::id()));
    let settings = vec![("SALT_ROUNDS", COST.to_string())];
    let wanted = Wanted { settings, ..Wanted::embedded(scratch.clone()) };
    let system = System::start(wanted, telemetry::init(LogFormat::Text, "error")?, |_| {}).await?;
    let address = system.running.http.ok_or_else(|| anyhow::anyhow!("no REST"))?;
    let place = system.cluster.as_ref().map(|cluster| cluster.location().to_owned());
    let client = Client::new();
    let since = Instant::now();
    let mut clients = JoinSet::new();
    for n in 0..CLIENTS {
        let client = client.clone();
        clients.spawn(async move {
            let mut done = 0u32;
            while since.elapsed() < LENGTH {
                let name = format!("bench{n}x{done}");
                let body = json!({
                    "username": name, "email": format!("{name}@example.com"), "password": "a long enough secret"
                });
                let answer = client.post(format!("http://{address}/auth/register")).json(&body).send().await?;
                anyhow::ensure!(answer.status() == 201, "{}", answer.text().await?);
                done += 1;
            }
            Ok(done)
        });
    }
    let mut registered = 0;
    while let Some(done) = clients.join_next().await {
        registered += done??;
    }
    let rate = f64::from(registered) / since.elapsed().as_secs_f64();
    system.stop().await;
    for folder in place.iter().chain([&scratch]) {
        let _ = std::fs::remove_dir_all(folder);
    }
    Ok(rate)
}

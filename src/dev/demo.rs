//! `auth-service demo`: a tour of the promises that ends by itself and counts what it did. Every
//! figure it prints was measured in this run.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context, bail};
use clap::Args;
use reqwest::{Client, StatusCode};
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::{
    ledger::{Ledger, Seen},
    system::{System, Wanted},
};
use crate::{config::LogFormat, telemetry};

const PATIENCE: Duration = Duration::from_secs(60);
const PASSWORD: &str = "correct horse battery";

/// How long the tour is.
#[derive(Debug, Args)]
pub struct DemoArgs {
    /// Registrations during the broker outage
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=500))]
    registrations: u32,
}

/// Walks through, prints the table, stops everything.
pub async fn run(args: DemoArgs) -> anyhow::Result<ExitCode> {
    // The outage of the tour is on purpose; its warnings would hide the tour.
    let filter = std::env::var("RUST_LOG").unwrap_or_else(|_| "off".to_owned());
    let metrics = telemetry::init(LogFormat::Text, &filter)?;
    let scratch = std::env::temp_dir().join(format!("auth-service-demo-{}", Uuid::new_v4().simple()));
    let wanted = Wanted::embedded(scratch.clone());
    println!("auth-service demo: real PostgreSQL, embedded Kafka-compatible broker, reference user-service\n");
    let system = System::start(wanted, metrics, |step| println!("  starting {step} …")).await?;
    let place = system.cluster.as_ref().map(|cluster| cluster.location().to_owned());
    let toured = tour(&system, &args).await;
    system.stop().await;
    for folder in place.iter().chain([&scratch]) {
        let _ = std::fs::remove_dir_all(folder);
    }
    match toured? {
        true => Ok(ExitCode::SUCCESS),
        false => {
            println!("\na count is wrong");
            Ok(ExitCode::FAILURE)
        }
    }
}

struct Tour<'a> {
    system: &'a System,
    ledger: Ledger,
    client: Client,
    registered: Vec<Registered>,
    conn: PgConnection,
}

#[derive(Debug, Clone)]
struct Registered {
    saga_id: String,
    user_id: i64,
    took: Duration,
}

async fn tour(system: &System, args: &DemoArgs) -> anyhow::Result<bool> {
    let options = secrecy::ExposeSecret::expose_secret(&system.database_url).parse()?;
    let mut tour = Tour {
        system,
        ledger: Ledger::start(&system.brokers)?,
        client: Client::builder().timeout(Duration::from_secs(30)).build()?,
        registered: vec![],
        conn: PgConnection::connect_with(&options).await?,
    };
    tour.completes().await?;
    tour.is_refused().await?;
    tour.outlives_an_outage(args.registrations).await?;
    tour.table().await
}

impl Tour<'_> {
    async fn completes(&mut self) -> anyhow::Result<()> {
        println!("\n1. A registration that completes");
        let since = Instant::now();
        let ada = self.register("ada").await?;
        println!(
            "   201 after {:.0?}: user {}, refresh token, saga and outbox row in one transaction",
            ada.took, ada.user_id
        );
        self.until_published(&ada.saga_id).await?;
        println!("   user.create is in Kafka (seen by a consumer {:.0?} after the request)", since.elapsed());
        self.until_saga_is(&ada.saga_id, "completed").await?;
        println!("   user-service answered, the saga is completed ({:.0?} after the request)", since.elapsed());
        Ok(())
    }

    async fn is_refused(&mut self) -> anyhow::Result<()> {
        println!("\n2. One that user-service refuses");
        let refused = self.register("refuse_me").await?;
        println!("   201 after {:.0?}: user {}", refused.took, refused.user_id);
        self.until_saga_is(&refused.saga_id, "compensated").await?;
        let status = self.login("refuse_me").await?;
        println!("   user.create.close came: the user is gone again (login answers {status})");
        if status != StatusCode::UNAUTHORIZED {
            bail!("a user that was taken back could log in");
        }
        let again = self.register("refuse_me").await?;
        println!("   the same name and e-mail could register again (user {}), and were refused again", again.user_id);
        self.until_saga_is(&again.saga_id, "compensated").await
    }

    async fn outlives_an_outage(&mut self, count: u32) -> anyhow::Result<()> {
        println!("\n3. A broker outage");
        let Some(broker) = &self.system.broker else { bail!("the demo runs on the embedded broker") };
        broker.down().await?;
        println!("   the broker is down");
        let since = Instant::now();
        let mut slowest = Duration::ZERO;
        let first = self.registered.len();
        for n in 0..count {
            slowest = slowest.max(self.register(&format!("during_outage_{n}")).await?.took);
        }
        let waiting: i64 = sqlx::query_scalar("select count(*) from outbox").fetch_one(&mut self.conn).await?;
        println!(
            "   {count} registrations answered 201 in {:.1?} (slowest {slowest:.0?}); {waiting} events wait in the outbox",
            since.elapsed()
        );
        broker.up().await?;
        let since = Instant::now();
        println!("   the broker is back");
        for index in first..self.registered.len() {
            let saga_id = self.registered[index].saga_id.clone();
            self.until_published(&saga_id).await?;
            self.until_saga_is(&saga_id, "completed").await?;
        }
        println!("   all of them are published and completed {:.1?} later", since.elapsed());
        Ok(())
    }

    /// Waits until all is at rest, then counts.
    async fn table(&mut self) -> anyhow::Result<bool> {
        self.until("everything is at rest", "select (select count(*) from outbox) + (select count(*) from saga_state where status in ('running', 'resolving'))", 0).await?;
        let taken_back: Vec<String> = sqlx::query_scalar("select subject from saga_state where status = 'compensated'")
            .fetch_all(&mut self.conn)
            .await?;
        let erased = |seen: &Seen| taken_back.iter().all(|user| seen.deleted.contains(user));
        let since = Instant::now();
        while !erased(&self.ledger.seen()) && since.elapsed() < PATIENCE {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        let seen = self.ledger.seen();
        let registered = self.registered.len();
        let published = self.registered.iter().filter(|one| seen.created.contains(&one.saga_id)).count();
        let completed = self.count("select count(*) from saga_state where status = 'completed'").await?;
        let compensated = self.count("select count(*) from saga_state where status = 'compensated'").await?;
        let half_done = self.half_done().await?;
        let lost = registered - published;
        println!("\n   registered    {registered}");
        println!("   published     {published}");
        println!("   completed     {completed}");
        println!("   compensated   {compensated}");
        println!("   duplicated    {}", seen.duplicated);
        println!("   half done     {half_done}");
        println!("   lost {lost}");
        println!("   out of order {}", seen.out_of_order);
        let settled = completed + compensated == registered as i64;
        Ok(lost == 0 && seen.out_of_order == 0 && half_done == 0 && settled && compensated == 2 && erased(&seen))
    }

    /// Users without a profile and profiles without a user.
    async fn half_done(&mut self) -> anyhow::Result<i64> {
        let since = Instant::now();
        loop {
            let half_done = self
                .count(
                    "select count(*) from auth_users u full join user_service.profiles p on p.user_id = u.id
                      where u.id is null or p.user_id is null",
                )
                .await?;
            // The profile of a user that was taken back is erased a moment after the user.delete.
            if half_done == 0 || since.elapsed() > PATIENCE {
                return Ok(half_done);
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    async fn register(&mut self, username: &str) -> anyhow::Result<Registered> {
        let since = Instant::now();
        let body = json!({ "username": username, "email": format!("{username}@example.com"), "password": PASSWORD });
        let response = self.client.post(self.url("/auth/register")?).json(&body).send().await?;
        let took = since.elapsed();
        let status = response.status();
        let answer: Value = response.json().await?;
        if status != StatusCode::CREATED {
            bail!("registering {username} was answered {status}: {answer}");
        }
        let data = &answer["data"];
        let saga_id = data["sagaId"].as_str().context("an answer without sagaId")?.to_owned();
        let user_id = data["id"].as_i64().context("an answer without id")?;
        let registered = Registered { saga_id, user_id, took };
        self.registered.push(registered.clone());
        Ok(registered)
    }

    async fn login(&self, username: &str) -> anyhow::Result<StatusCode> {
        let body = json!({ "identifier": username, "password": PASSWORD });
        Ok(self.client.post(self.url("/auth/login")?).json(&body).send().await?.status())
    }

    fn url(&self, path: &str) -> anyhow::Result<String> {
        let address = self.system.running.http.context("no REST")?;
        Ok(format!("http://{address}{path}"))
    }

    async fn until_published(&self, saga_id: &str) -> anyhow::Result<()> {
        let since = Instant::now();
        while !self.ledger.seen().created.contains(saga_id) {
            if since.elapsed() > PATIENCE {
                bail!("waited {PATIENCE:?} in vain for the user.create of saga {saga_id}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        Ok(())
    }

    async fn until_saga_is(&mut self, saga_id: &str, status: &str) -> anyhow::Result<()> {
        let saga_id: Uuid = saga_id.parse()?;
        let since = Instant::now();
        loop {
            let found: String = sqlx::query_scalar("select status from saga_state where saga_id = $1")
                .bind(saga_id)
                .fetch_one(&mut self.conn)
                .await?;
            if found == status {
                return Ok(());
            }
            if since.elapsed() > PATIENCE {
                bail!("waited {PATIENCE:?} in vain for saga {saga_id} to be {status}; it is {found}");
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }

    async fn count(&mut self, query: &'static str) -> anyhow::Result<i64> {
        Ok(sqlx::query_scalar(query).fetch_one(&mut self.conn).await?)
    }

    async fn until(&mut self, what: &str, query: &'static str, expected: i64) -> anyhow::Result<()> {
        let since = Instant::now();
        while self.count(query).await? != expected {
            if since.elapsed() > PATIENCE {
                bail!("waited {PATIENCE:?} in vain until {what}");
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }
}

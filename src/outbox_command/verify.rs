//! `auth-service outbox verify`

use std::{
    fs::File,
    io::{self, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context;
use clap::Args;
use outbox_relay::{
    KafkaSettings, session,
    verify::{self, Progress, Report, Verdict, Window},
};
use serde::Serialize;
use sqlx::{ConnectOptions, PgConnection};

use super::{moment::Moment, text};
use crate::{
    app::SAGAS,
    cli::{Failure, from_environment},
    config::{self, OutboxPlaces},
};

/// What to verify, and where the report goes.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Rows published then or later: 2026-03-09T14:00:00Z, 2026-03-09 (midnight UTC) or 2h (so long ago)
    #[arg(long, value_name = "WHEN")]
    from: Moment,
    /// Rows published before then; now by default
    #[arg(long, value_name = "WHEN")]
    to: Option<Moment>,
    /// Only rows of this topic, its prefix included
    #[arg(long)]
    topic: Option<String>,
    /// How long before and after the window Kafka is read too, to see copies near its ends
    #[arg(long, value_name = "DURATION", default_value = "10m", value_parser = humantime::parse_duration)]
    margin: Duration,
    /// The report as JSON, with every finding
    #[arg(long)]
    json: bool,
    /// Write the report to this new file; nothing is overwritten
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// The report, and who made it.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Product {
    /// Name and version.
    pub made_by: &'static str,
    /// What was found.
    #[serde(flatten)]
    pub report: Report,
}

const MADE_BY: &str = concat!("auth-service ", env!("CARGO_PKG_VERSION"));
const SAY_EVERY: Duration = Duration::from_secs(5);

/// Verifies, writes the report, and answers with the exit code.
pub async fn run(args: VerifyArgs) -> Result<ExitCode, Failure> {
    let places = from_environment(config::outbox_places)?;
    if let Some(out) = args.out.as_deref().filter(|out| out.exists()) {
        return Err(Failure::Usage(format!("{} exists, and nothing is overwritten", out.display())));
    }
    let mut conn = connect(&places).await.map_err(Failure::NotDone)?;
    let window = window(&args, &places, &mut conn).await?;
    let kafka = KafkaSettings { brokers: places.kafka.brokers, client: places.kafka.client };
    let mut speaker = Speaker { since: Instant::now(), said: Instant::now() };
    let report = verify::verify(&mut conn, &kafka, &window, |progress| speaker.say(progress)).await;
    let report = report.context("the verification could not be carried out").map_err(Failure::NotDone)?;
    if let Some(topic) = &args.topic
        && report.totals.rows == 0
        && report.partitions.iter().all(|part| !part.topic_exists)
    {
        let what = "is in Kafka, and the archive has no rows of one in the window";
        return Err(Failure::Usage(format!("no topic {topic:?} {what} (--topic wants the name with its prefix)")));
    }
    let code = match report.verdict {
        Verdict::Proven => 0,
        Verdict::Contradicted => 1,
        Verdict::NotFullyProvable => 3,
    };
    write(&args, Product { made_by: MADE_BY, report }).map_err(Failure::NotDone)?;
    Ok(ExitCode::from(code))
}

/// A session that can write nothing, and may take the time that sorting a long window takes.
async fn connect(places: &OutboxPlaces) -> anyhow::Result<PgConnection> {
    const READ_ONLY: [session::Setting; 2] = [("statement_timeout", "0"), ("default_transaction_read_only", "on")];
    let options = places.database.options.clone().application_name("auth-service outbox verify");
    let connected = async {
        let mut conn = options.connect().await?;
        session::configure(&mut conn, &READ_ONLY).await?;
        Ok::<_, sqlx::Error>(conn)
    };
    connected.await.with_context(|| {
        let (host, port) = (options.get_host(), options.get_port());
        format!("the database at {host}:{port} (DATABASE_URL, or DB_HOST and DB_PORT)")
    })
}

async fn window(args: &VerifyArgs, places: &OutboxPlaces, conn: &mut PgConnection) -> Result<Window, Failure> {
    let now = verify::clock(conn).await.map_err(|error| Failure::NotDone(error.into()))?;
    let moment = |name: &str, moment: Moment| {
        moment.at(now).ok_or_else(|| Failure::Usage(format!("{name} lies before all time")))
    };
    let from = moment("--from", args.from)?;
    let to = args.to.map_or(Ok(now), |to| moment("--to", to))?;
    if to > now {
        // A report must not speak of what is yet to come.
        return Err(Failure::Usage(format!("--to is {to}, and the database's clock says {now}")));
    }
    if from >= to {
        return Err(Failure::Usage(format!("the window is empty: it begins at {from} and ends at {to}")));
    }
    let (topic, source) = (args.topic.clone(), places.sender.clone());
    let commands = SAGAS.iter().flat_map(|saga| saga.command_topics());
    let written_topics = commands.map(|topic| format!("{}{topic}", places.kafka.topic_prefix)).collect();
    Ok(Window { from, to, topic, written_topics, source, margin: args.margin })
}

fn write(args: &VerifyArgs, product: Product) -> anyhow::Result<()> {
    let written = match args.json {
        true => serde_json::to_string_pretty(&product)? + "\n",
        false => text::report(&product),
    };
    let Some(path) = &args.out else {
        return io::stdout().write_all(written.as_bytes()).context("the report could not be written");
    };
    create(path, &written).with_context(|| format!("the report could not be written to {}", path.display()))?;
    println!("{}", text::conclusion(&product.report));
    Ok(())
}

fn create(path: &Path, content: &str) -> io::Result<()> {
    let mut file = File::create_new(path)?;
    file.write_all(content.as_bytes())?;
    file.sync_all()
}

/// Says on standard error how far it is, every five seconds.
struct Speaker {
    since: Instant,
    said: Instant,
}

impl Speaker {
    fn say(&mut self, progress: Progress) {
        if self.said.elapsed() < SAY_EVERY {
            return;
        }
        self.said = Instant::now();
        eprintln!("{}", text::progress(&progress, self.since.elapsed()));
    }
}

//! How fast the outbox empties, against what the producer alone reaches in the same run.
//!
//! ```sh
//! tests/bench/relay            # starts PostgreSQL and Apache Kafka, runs this, stops them
//! DATABASE_URL=… KAFKA_BROKERS=… cargo bench -p outbox-relay -- [drain|latency|archived|held]…
//! ```
//!
//! It makes a database of its own on that server and drops it at the end. Rows are one kilobyte, over
//! 10,000 keys; `synchronous_commit` is on and acks is `all`, as in production.

use std::{
    collections::BTreeMap,
    env,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use outbox_relay::{KafkaSettings, NewMessage, Relay, RelaySettings, Wake, append, archive, lane_of};
use rdkafka::{
    ClientConfig, ClientContext, Message, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer},
    error::{KafkaError, RDKafkaErrorCode},
    producer::{BaseRecord, DeliveryResult, Producer, ProducerContext, ThreadedProducer},
};
use sqlx::{
    AssertSqlSafe, Connection, Executor, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

const KEYS: usize = 10_000;
const PAYLOAD: usize = 1024;
const WARM_UP_SECONDS: usize = 3;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

#[tokio::main]
async fn main() -> Result<()> {
    tracing_subscriber::fmt().with_env_filter(env::var("RUST_LOG").unwrap_or_else(|_| "warn".into())).init();
    let wanted: Vec<String> = env::args().skip(1).filter(|arg| !arg.starts_with('-')).collect();
    let wants = |name: &str| wanted.is_empty() || wanted.iter().any(|arg| arg == name);
    let rows = number("BENCH_ROWS", 200_000);
    let bench = Bench::start().await?;

    let raw = bench.raw_producer(rows).await?;
    println!("producer alone           {raw:>9.0} messages/s");
    if wants("drain") {
        let rate = bench.drain(rows).await?;
        println!("drain                    {rate:>9.0} events/s    {:.0} % of the producer", 100.0 * rate / raw);
    }
    if wants("latency") {
        let rate = number("BENCH_RATE", 500);
        let (p50, p99, max) = bench.latency(rate, Duration::from_secs(20)).await?;
        println!("commit → consumer        at {rate} events/s: p50 {p50:.1} ms, p99 {p99:.1} ms, longest {max:.1} ms");
    }
    if wants("archived") {
        let plain = bench.drain(rows).await?;
        let archived = number("BENCH_ARCHIVED", 5_000_000);
        bench.fill_archive(archived).await?;
        let rate = bench.drain(rows).await?;
        println!(
            "drain, {archived} archived {rate:>9.0} events/s    {:.0} % of the rate without ({plain:.0})",
            100.0 * rate / plain
        );
    }
    if wants("held") {
        let plain = bench.drain(rows).await?;
        let rate = bench.drain_under_held_snapshot(rows, Duration::from_secs(120)).await?;
        println!(
            "drain, snapshot held 2 min {rate:>7.0} events/s    {:.0} % of the rate without ({plain:.0})",
            100.0 * rate / plain
        );
    }
    println!("resident memory          {:>9.0} MiB", resident_mib());
    bench.end().await
}

struct Bench {
    server: PgConnectOptions,
    database: String,
    pool: PgPool,
    brokers: String,
}

impl Bench {
    async fn start() -> Result<Self> {
        let server: PgConnectOptions = env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL")?.parse()?;
        let brokers = env::var("KAFKA_BROKERS").map_err(|_| "set KAFKA_BROKERS")?;
        let database = format!("relay_bench_{}", std::process::id());
        let mut conn = PgConnection::connect_with(&server).await?;
        conn.execute(AssertSqlSafe(format!("create database {database}"))).await?;
        let pool = PgPoolOptions::new()
            .max_connections(16)
            .connect_with(server.clone().database(&database).options(outbox_relay::SESSION))
            .await?;
        sqlx::migrate!("../migrations").run(&pool).await?;
        archive::keep_up(&mut *pool.acquire().await?, chrono::Utc::now().date_naive(), None).await?;
        Ok(Self { server, database, pool, brokers })
    }

    async fn end(self) -> Result<()> {
        self.pool.close().await;
        let mut conn = PgConnection::connect_with(&self.server).await?;
        conn.execute(AssertSqlSafe(format!("drop database {} with (force)", self.database))).await?;
        Ok(())
    }

    async fn topic(&self) -> Result<String> {
        let name = format!("bench.{}", Uuid::new_v4().simple());
        let client: AdminClient<DefaultClientContext> =
            ClientConfig::new().set("bootstrap.servers", &self.brokers).create()?;
        let topic = NewTopic::new(&name, 4, TopicReplication::Fixed(1));
        for created in client.create_topics([&topic], &AdminOptions::new()).await? {
            created.map_err(|(name, code)| format!("{name}: {code}"))?;
        }
        Ok(name)
    }

    /// What an idempotent producer reaches that only sends: the limit.
    async fn raw_producer(&self, rows: usize) -> Result<f64> {
        struct Count(Arc<AtomicU64>);
        impl ClientContext for Count {}
        impl ProducerContext for Count {
            type DeliveryOpaque = ();
            fn delivery(&self, result: &DeliveryResult<'_>, _: ()) {
                self.0.fetch_add(u64::from(result.is_ok()), Ordering::Relaxed);
            }
        }
        let topic = self.topic().await?;
        let acknowledged = Arc::new(AtomicU64::new(0));
        let producer: ThreadedProducer<Count> = ClientConfig::new()
            .set("bootstrap.servers", &self.brokers)
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("linger.ms", "5")
            .create_with_context(Count(acknowledged.clone()))?;
        let counted = acknowledged.clone();
        let took = tokio::task::spawn_blocking(move || -> Result<Duration> {
            let payload = vec![b'x'; PAYLOAD];
            let since = Instant::now();
            for n in 0..rows {
                let key = (n % KEYS).to_string();
                let mut record = BaseRecord::to(&topic).key(&key).payload(&payload);
                while let Err((error, back)) = producer.send(record) {
                    if !matches!(error, KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull)) {
                        return Err(error.into());
                    }
                    record = back;
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            producer.flush(Duration::from_secs(60))?;
            Ok(since.elapsed())
        })
        .await??;
        assert_eq!(counted.load(Ordering::Relaxed), rows as u64);
        Ok(rows as f64 / took.as_secs_f64())
    }

    /// Fills the outbox as `append` would have, and times how long the relay takes to empty it.
    async fn drain(&self, rows: usize) -> Result<f64> {
        let topic = self.topic().await?;
        self.fill_outbox(&topic, rows).await?;
        let relay = self.relay();
        // The first lanes are taken before the clock starts: what is measured is the draining.
        let since = self.first_archived(&topic).await?;
        self.until_empty().await?;
        let took = since.elapsed();
        relay.stop().await?;
        Ok(rows as f64 / took.as_secs_f64())
    }

    async fn drain_under_held_snapshot(&self, rows: usize, held_for: Duration) -> Result<f64> {
        let mut holder = self.pool.begin().await?;
        sqlx::query("set transaction isolation level repeatable read").execute(&mut *holder).await?;
        sqlx::query("select count(*) from outbox_keys").execute(&mut *holder).await?;
        let since = Instant::now();
        let mut rates = vec![];
        // Rounds pile dead rows up behind the held snapshot; the last one counts.
        while rates.is_empty() || since.elapsed() < held_for {
            rates.push(self.drain(rows).await?);
        }
        holder.rollback().await?;
        println!("  under the held snapshot, round by round: {rates:.0?}");
        rates.last().copied().ok_or_else(|| "no round".into())
    }

    /// Commits at a steady rate, one transaction an event, and measures until a consumer has it.
    async fn latency(&self, rate: usize, length: Duration) -> Result<(f64, f64, f64)> {
        let topic = self.topic().await?;
        let total = rate * length.as_secs() as usize;
        let wake = Wake::default();
        let relay = self.relay_woken_by(wake.clone());
        let committed: Arc<Vec<AtomicU64>> = Arc::new((0..total).map(|_| AtomicU64::new(0)).collect());
        let began = Instant::now();
        let reader = tokio::task::spawn_blocking({
            let (brokers, topic, committed) = (self.brokers.clone(), topic.clone(), committed.clone());
            move || read_latencies(&brokers, &topic, began, &committed)
        });
        // As in production, where the relay's pool is its own.
        let writers =
            PgPoolOptions::new().max_connections(10).connect_with(self.server.clone().database(&self.database)).await?;
        while sqlx::query_scalar::<_, bool>("select exists (select from outbox_lanes where owner is null)")
            .fetch_one(&self.pool)
            .await?
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        let mut tick = tokio::time::interval(Duration::from_secs_f64(1.0 / rate as f64));
        for n in 0..total {
            tick.tick().await;
            let (pool, wake, topic, committed) = (writers.clone(), wake.clone(), topic.clone(), committed.clone());
            tokio::spawn(async move {
                let mut tx = pool.begin().await?;
                let mut payload = n.to_string().into_bytes();
                payload.resize(PAYLOAD, b' ');
                append(&mut tx, &message(&topic, &(n % KEYS).to_string(), payload)).await?;
                tx.commit().await?;
                committed[n].store(began.elapsed().as_micros() as u64, Ordering::Relaxed);
                wake.notify();
                Ok::<_, Box<dyn std::error::Error + Send + Sync>>(())
            });
        }
        // The first seconds are connections and first plans; what is measured is the steady state.
        let mut latencies = reader.await??.split_off(rate * WARM_UP_SECONDS);
        relay.stop().await?;
        latencies.sort_unstable_by(f64::total_cmp);
        let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize];
        Ok((at(0.5), at(0.99), at(1.0)))
    }

    fn relay(&self) -> RunningRelay {
        self.relay_woken_by(Wake::default())
    }

    fn relay_woken_by(&self, wake: Wake) -> RunningRelay {
        let settings = RelaySettings {
            name: "bench".into(),
            kafka: KafkaSettings { brokers: self.brokers.clone(), client: vec![] },
            lease: Duration::from_secs(10),
            batch: number("BENCH_BATCH", 2000),
            workers: number("BENCH_WORKERS", 2),
            poll: Duration::from_millis(500),
            fencing: env::var("BENCH_FENCING").is_ok(),
        };
        let stop = CancellationToken::new();
        let relay = Relay::new(self.pool.clone(), settings, wake);
        let task = tokio::spawn(relay.run(stop.clone()));
        RunningRelay { stop, task }
    }

    async fn first_archived(&self, topic: &str) -> Result<Instant> {
        loop {
            let now = Instant::now();
            let any: bool = sqlx::query_scalar(
                "select exists (select from outbox_archive where published_at > now() - interval '1 minute' and topic = $1)",
            )
            .bind(topic)
            .fetch_one(&self.pool)
            .await?;
            if any {
                return Ok(now);
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn until_empty(&self) -> Result<()> {
        while sqlx::query_scalar::<_, bool>("select exists (select from outbox)").fetch_one(&self.pool).await? {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    async fn fill_outbox(&self, topic: &str, rows: usize) -> Result<()> {
        let keys: Vec<String> = (0..KEYS).map(|n| n.to_string()).collect();
        let lanes: Vec<i16> = keys.iter().map(|key| lane_of(key)).collect();
        sqlx::query(
            "with k as (select * from unnest($1::text[], $2::smallint[]) as k(key, lane)),
                  numbered as (
                      insert into outbox_keys as o (key, last_seq) select key, $3 from k
                      on conflict (key) do update set last_seq = o.last_seq + $3 returning key, last_seq - $3 as base)
             insert into outbox (lane, key, seq, message_id, topic, payload, headers)
             select k.lane, k.key, n.base + round, gen_random_uuid(), $4, convert_to(repeat('x', $5), 'UTF8'),
                    jsonb_build_object('ce_id', 'x', 'correlationId', 'c', 'sender', 'bench', 'saga-id', 's')
               from generate_series(1, $3) as round, k join numbered n on n.key = k.key
              order by round, k.key",
        )
        .bind(&keys)
        .bind(&lanes)
        .bind((rows / KEYS) as i64)
        .bind(topic)
        .bind(PAYLOAD as i32)
        .execute(&self.pool)
        .await?;
        self.pool.execute("analyze outbox").await?;
        Ok(())
    }

    async fn fill_archive(&self, rows: usize) -> Result<()> {
        sqlx::query(
            "insert into outbox_archive (id, lane, key, seq, message_id, topic, payload, headers, created_at,
                                         published_at, partition, \"offset\", relay_id, term)
             select -n, 0, 'old' || n, 1, gen_random_uuid(), 't', convert_to(repeat('x', 200), 'UTF8'), '{}',
                    now() - interval '1 day', now() - interval '1 hour', 0, n, gen_random_uuid(), 1
               from generate_series(1, $1::bigint) n",
        )
        .bind(rows as i64)
        .execute(&self.pool)
        .await?;
        self.pool.execute("checkpoint").await?;
        Ok(())
    }
}

struct RunningRelay {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<std::result::Result<(), outbox_relay::PublisherError>>,
}

impl RunningRelay {
    async fn stop(self) -> Result<()> {
        self.stop.cancel();
        Ok(self.task.await??)
    }
}

fn message(topic: &str, key: &str, payload: Vec<u8>) -> NewMessage {
    NewMessage {
        id: Uuid::now_v7(),
        topic: topic.to_owned(),
        key: key.to_owned(),
        source: "bench".into(),
        payload,
        content_type: "text/plain",
        headers: BTreeMap::new(),
        saga_id: None,
    }
}

/// Milliseconds from the return of each COMMIT to the message's arrival.
fn read_latencies(brokers: &str, topic: &str, began: Instant, committed: &[AtomicU64]) -> Result<Vec<f64>> {
    let total = committed.len();
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", brokers)
        .set("group.id", "bench")
        .set("enable.auto.commit", "false")
        .set("fetch.wait.max.ms", "5")
        .create()?;
    let mut all = TopicPartitionList::new();
    for partition in 0..4 {
        all.add_partition_offset(topic, partition, Offset::Beginning)?;
    }
    consumer.assign(&all)?;
    let mut latencies = Vec::with_capacity(total);
    while latencies.len() < total {
        let Some(message) = consumer.poll(Duration::from_secs(10)) else {
            return Err(format!("only {} of {total} messages came", latencies.len()).into());
        };
        let now = began.elapsed().as_micros() as u64;
        let n: usize = std::str::from_utf8(message?.payload().unwrap_or_default())?.trim().parse()?;
        // A message can arrive before its writer has heard of its own commit.
        let committed = match committed[n].load(Ordering::Relaxed) {
            0 => now,
            at => at,
        };
        latencies.push(now.saturating_sub(committed) as f64 / 1000.0);
    }
    Ok(latencies)
}

fn number(variable: &str, default: usize) -> usize {
    env::var(variable).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn resident_mib() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("0");
    line.trim().trim_end_matches(" kB").parse().unwrap_or(0.0) / 1024.0
}

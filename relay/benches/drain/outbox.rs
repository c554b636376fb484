//! The outbox that is filled and emptied.

use std::{
    env,
    time::{Duration, Instant},
};

use outbox_relay::{
    Database, KafkaSettings, PoolSettings, PublisherError, Relay, RelaySettings, Wake, admin, archive, lane_of, session,
};
use sqlx::{
    AssertSqlSafe, Connection, Executor, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use tokio_util::sync::CancellationToken;

use crate::{KEYS, PAYLOAD, ROUNDS, Result, cpu::Clock, number, producer};

const LEASE: Duration = Duration::from_secs(10);

/// A database of its own, and the broker.
#[derive(Clone)]
pub struct Outbox {
    pub brokers: String,
    server: PgConnectOptions,
    database: String,
    pool: PgPool,
    fencing: bool,
}

impl Outbox {
    pub async fn make() -> Result<Self> {
        let server: PgConnectOptions = env::var("DATABASE_URL").map_err(|_| "set DATABASE_URL")?.parse()?;
        let brokers = env::var("KAFKA_BROKERS").map_err(|_| "set KAFKA_BROKERS")?;
        let database = format!("relay_bench_{}", std::process::id());
        let mut conn = PgConnection::connect_with(&server).await?;
        conn.execute(AssertSqlSafe(format!("create database {database}"))).await?;
        let options = server.clone().database(&database).options(session::RELAY);
        let pool = PgPoolOptions::new().max_connections(16).connect_with(options).await?;
        sqlx::migrate!("../migrations").run(&pool).await?;
        archive::keep_up(&mut *pool.acquire().await?, chrono::Utc::now().date_naive(), None).await?;
        Ok(Self { brokers, server, database, pool, fencing: false })
    }

    /// The same, with relays that fence each other off.
    pub fn fenced(&self) -> Self {
        Self { fencing: true, ..self.clone() }
    }

    pub async fn drop_database(self) -> Result<()> {
        self.pool.close().await;
        let mut conn = PgConnection::connect_with(&self.server).await?;
        conn.execute(AssertSqlSafe(format!("drop database {} with (force)", self.database))).await?;
        Ok(())
    }

    /// A pool for those who append: the relay's is its own, as in production.
    pub async fn writers(&self) -> Result<PgPool> {
        let options = self.server.clone().database(&self.database);
        Ok(PgPoolOptions::new().max_connections(10).connect_with(options).await?)
    }

    pub fn relay(&self, wake: Wake) -> RunningRelay {
        let settings = RelaySettings {
            name: "bench".into(),
            kafka: KafkaSettings { brokers: self.brokers.clone(), client: vec![] },
            lease: LEASE,
            batch: number("BENCH_BATCH", 2000),
            workers: number("BENCH_WORKERS", 2),
            poll: Duration::from_millis(500),
            fencing: self.fencing,
        };
        let stop = CancellationToken::new();
        let pool = PoolSettings {
            connections: 16,
            acquire_timeout: Duration::from_secs(30),
            work_timeout: Duration::from_secs(30),
            session: &session::RELAY,
        };
        let relay = Relay::new(Database::new(self.pool.connect_options().as_ref().clone(), pool), settings, wake);
        let task = tokio::spawn(relay.run(stop.clone()));
        RunningRelay { stop, task }
    }

    /// Fills the outbox as `append` would have, and times how long the relay takes to empty it: events a
    /// second.
    pub async fn drain(&self, rows: usize, clock: &mut Clock) -> Result<f64> {
        let topic = producer::topic(&self.brokers).await?;
        let before = self.fill(&topic, rows).await?;
        let relay = self.relay(Wake::default());
        // The first lanes are taken before the clock starts: what is measured is the draining.
        self.until_written(&topic, 1).await?;
        let since = Instant::now();
        clock
            .during(async {
                self.until_written(&topic, rows).await?;
                self.until_archived(before, rows).await
            })
            .await?;
        let took = since.elapsed();
        relay.stop().await?;
        Ok(rows as f64 / took.as_secs_f64())
    }

    /// Drains again and again with one relay, without and then with a transaction elsewhere that holds its
    /// snapshot: the rates of both.
    pub async fn drain_under_held_snapshot(&self, rows: usize, held_for: Duration) -> Result<(Vec<f64>, Vec<f64>)> {
        let relay = self.relay(Wake::default());
        let mut without = vec![];
        for _ in 0..ROUNDS {
            without.push(self.fill_and_drain(rows).await?);
        }
        let mut holder = self.pool.begin().await?;
        sqlx::query("set transaction isolation level repeatable read").execute(&mut *holder).await?;
        // It is somebody else's, whose sessions are not ended for that.
        sqlx::query("set local idle_in_transaction_session_timeout = 0").execute(&mut *holder).await?;
        sqlx::query("select count(*) from outbox_keys").execute(&mut *holder).await?;
        let since = Instant::now();
        let mut held = vec![];
        while held.is_empty() || since.elapsed() < held_for {
            held.push(self.fill_and_drain(rows).await?);
        }
        holder.rollback().await?;
        relay.stop().await?;
        println!("  round by round: {without:.0?}, under the held snapshot {held:.0?}");
        Ok((without, held))
    }

    /// The relay that runs is paused while the outbox is filled.
    async fn fill_and_drain(&self, rows: usize) -> Result<f64> {
        let topic = producer::topic(&self.brokers).await?;
        admin::set_paused(&mut *self.pool.acquire().await?, Some("bench")).await?;
        // It is noticed with the next renewal of the lease, a quarter of the lease later.
        tokio::time::sleep(LEASE / 3).await;
        let before = self.fill(&topic, rows).await?;
        admin::set_paused(&mut *self.pool.acquire().await?, None).await?;
        self.until_written(&topic, 1).await?;
        let since = Instant::now();
        self.until_written(&topic, rows).await?;
        self.until_archived(before, rows).await?;
        Ok(rows as f64 / since.elapsed().as_secs_f64())
    }

    pub async fn until_owned(&self) -> Result<()> {
        while sqlx::query_scalar::<_, bool>("select exists (select from outbox_lanes where owner is null)")
            .fetch_one(&self.pool)
            .await?
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(())
    }

    async fn until_written(&self, topic: &str, messages: usize) -> Result<()> {
        while producer::offsets(&self.brokers, topic).await? < messages as i64 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    }

    /// Asks the archive and not the outbox, where the question itself would walk over every dead row.
    async fn until_archived(&self, after: i64, rows: usize) -> Result<()> {
        let archived = "select count(*) from outbox_archive where id > $1";
        while sqlx::query_scalar::<_, i64>(archived).bind(after).fetch_one(&self.pool).await? < rows as i64 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Answers with the id below the first row's.
    async fn fill(&self, topic: &str, rows: usize) -> Result<i64> {
        let keys: Vec<String> = (0..KEYS).map(|n| n.to_string()).collect();
        let lanes: Vec<i16> = keys.iter().map(|key| lane_of(key)).collect();
        let newest = sqlx::query_scalar("select last_value - case when is_called then 0 else 1 end from outbox_id_seq")
            .fetch_one(&self.pool)
            .await?;
        sqlx::query(
            "with k as (select * from unnest($1::text[], $2::smallint[]) as k(key, lane)),
                  numbered as (
                      insert into outbox_keys as o (key, last_seq) select key, $3 from k
                      on conflict (key) do update set last_seq = o.last_seq + $3 returning key, last_seq - $3 as base)
             insert into outbox (lane, key, seq, message_id, topic, payload, headers)
             select k.lane, k.key, n.base + round, gen_random_uuid(), $4, convert_to(repeat('x', $5), 'UTF8'),
                    jsonb_build_object('ce_specversion', '1.0', 'ce_id', gen_random_uuid(), 'ce_source', 'auth-service',
                                       'ce_type', $4, 'ce_subject', k.key, 'content-type', 'application/json',
                                       'correlationId', gen_random_uuid(), 'sender', 'auth-service',
                                       'saga-id', gen_random_uuid(), 'causation-id', gen_random_uuid())
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
        Ok(newest)
    }

    pub async fn fill_archive(&self, rows: usize) -> Result<()> {
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

pub struct RunningRelay {
    stop: CancellationToken,
    task: tokio::task::JoinHandle<std::result::Result<(), PublisherError>>,
}

impl RunningRelay {
    pub async fn stop(self) -> Result<()> {
        self.stop.cancel();
        Ok(self.task.await??)
    }
}

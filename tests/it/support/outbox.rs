//! An outbox with relays of its own: rows in, messages out.

use std::{collections::BTreeMap, time::Duration};

use outbox_relay::{
    Database, KafkaSettings, NewMessage, PoolSettings, Relay, RelaySettings, Wake, append, lane_of, session,
};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use super::{eventually, kafka, parts::PARTS};

/// Small: an eighth of an eighth of it is one row.
pub const BATCH: usize = 64;

/// Who waits for somebody else's transaction.
pub const WAITING: &str =
    "select count(*) from pg_stat_activity where datname = current_database() and wait_event_type = 'Lock'";

pub struct Outbox {
    pub pool: PgPool,
    pub topic: String,
}

pub struct RunningRelay {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Outbox {
    pub async fn new() -> Self {
        let outbox = Self::without_topic().await;
        PARTS.create_topics(std::slice::from_ref(&outbox.topic)).await;
        outbox
    }

    pub async fn without_topic() -> Self {
        let database = PARTS.database().await;
        let pool = PgPoolOptions::new().max_connections(20).connect_lazy_with(PARTS.connect_options(&database));
        Self { pool, topic: format!("relay.{}", Uuid::new_v4().simple()) }
    }

    pub fn message(&self, key: &str, text: &str) -> NewMessage {
        NewMessage {
            id: Uuid::now_v7(),
            topic: self.topic.clone(),
            key: key.to_owned(),
            source: "test".to_owned(),
            payload: serde_json::json!({ "text": text }).to_string().into_bytes(),
            content_type: "application/json",
            headers: BTreeMap::new(),
            saga_id: None,
        }
    }

    pub async fn append(&self, key: &str, text: &str) -> i64 {
        let mut tx = self.pool.begin().await.unwrap();
        let appended = append(&mut tx, &self.message(key, text)).await.unwrap();
        tx.commit().await.unwrap();
        appended.row_id
    }

    pub fn relay(&self, name: &str) -> RunningRelay {
        self.relay_with(name, |_| {})
    }

    /// A relay that will never hear of its messages: there is no broker at that address.
    pub fn relay_without_broker(&self, name: &str) -> RunningRelay {
        self.relay_with(name, |settings| settings.kafka.brokers = "127.0.0.1:1".to_owned())
    }

    /// A relay whose settings are changed.
    pub fn relay_with(&self, name: &str, change: impl FnOnce(&mut RelaySettings)) -> RunningRelay {
        let options = (*self.pool.connect_options()).clone();
        let pool = PoolSettings {
            connections: 12,
            acquire_timeout: Duration::from_secs(30),
            work_timeout: Duration::from_secs(30),
            session: &session::RELAY,
        };
        let mut settings = RelaySettings {
            name: name.to_owned(),
            kafka: KafkaSettings { brokers: PARTS.brokers(), client: vec![] },
            lease: Duration::from_secs(2),
            batch: BATCH,
            workers: 2,
            poll: Duration::from_millis(100),
            fencing: false,
        };
        change(&mut settings);
        let stop = CancellationToken::new();
        let relay = Relay::new(Database::new(options, pool), settings, Wake::default());
        let stopping = stop.clone();
        let task = tokio::spawn(async move { relay.run(stopping).await.unwrap() });
        RunningRelay { stop, task }
    }

    /// Time passes: whoever has not renewed since is taken for dead.
    pub async fn expire_leases(&self) {
        sqlx::query("delete from outbox_relays").execute(&self.pool).await.unwrap();
    }

    pub async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.pool).await.unwrap()
    }

    pub async fn until(&self, query: &'static str, expected: i64) {
        eventually(&format!("{query} = {expected}"), || async { (self.count(query).await == expected).then_some(()) })
            .await;
    }

    pub async fn texts_by_key(&self) -> BTreeMap<String, Vec<String>> {
        let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for seen in kafka::read_all(&PARTS.brokers(), std::slice::from_ref(&self.topic)).await {
            texts.entry(seen.key.clone()).or_default().push(seen.value["text"].as_str().unwrap_or("?").to_owned());
        }
        texts
    }
}

impl RunningRelay {
    pub async fn stop(self) {
        self.stop.cancel();
        self.task.await.unwrap();
    }

    /// As if the process had been killed: nothing is given back.
    pub async fn kill(self) {
        self.task.abort();
        let _ = self.task.await;
    }
}

/// The producer takes no message of 20,000 bytes.
pub fn small_messages(settings: &mut RelaySettings) {
    settings.kafka.client = vec![("message.max.bytes".to_owned(), "20000".to_owned())];
}

pub fn numbers(up_to: usize) -> Vec<String> {
    (0..up_to).map(|n| n.to_string()).collect()
}

/// Two keys of one lane.
pub fn same_lane() -> (String, String) {
    let lane = lane_of("0");
    let other = (1..).map(|n: u32| n.to_string()).find(|key| lane_of(key) == lane).unwrap();
    ("0".to_owned(), other)
}

//! The built binary, twice, on one PostgreSQL and one Kafka.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::atomic::{AtomicUsize, Ordering},
};

use outbox_relay::{NewMessage, append};
use reqwest::{Client, Response};
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use crate::support::{
    eventually, join_all,
    kafka::{self, Seen},
    parts::PARTS,
    process::{Replica, production_vars},
    service::registration,
};

const USERS: usize = 48;
const KEYS: usize = 6;
const EVENTS_PER_KEY: usize = 150;
/// So many that they never fall into one relay's lanes alone.
const WARM_KEYS: usize = 24;

struct Fleet {
    db: PgPool,
    prefix: String,
    client: Client,
    vars: Vec<(String, String)>,
}

impl Fleet {
    async fn new() -> Self {
        let database = PARTS.database().await;
        let prefix = format!("{}.", Uuid::new_v4().simple());
        let topics = [
            "user.create",
            "user.create.close",
            "user.create.done",
            "user.delete",
            "user.delete.done",
            "user.delete.close",
            "saga-reply",
            "load",
        ];
        PARTS.create_topics(&topics.map(|topic| format!("{prefix}{topic}"))).await;
        Self {
            db: PgPool::connect_lazy_with(PARTS.connect_options(&database)),
            vars: production_vars(
                &database,
                &prefix,
                &[("SHUTDOWN_DRAIN", "2s"), ("HASH_QUEUE", "1000"), ("HASH_MAX_WAIT", "60s")],
            ),
            client: Client::new(),
            prefix,
        }
    }

    async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.db).await.expect("a count")
    }

    async fn until_count(&self, query: &'static str, expected: i64) {
        eventually(&format!("{query} = {expected}"), || async { (self.count(query).await == expected).then_some(()) })
            .await;
    }

    async fn topic(&self, name: &str) -> Vec<Seen> {
        kafka::read_all(&PARTS.brokers(), &[format!("{}{name}", self.prefix)]).await
    }

    async fn register(&self, replica: &Replica, username: &str) -> reqwest::Result<Response> {
        let request = self.client.post(format!("{}/auth/register", replica.http)).json(&registration(username));
        request.header("idempotency-key", username).send().await
    }

    /// As a good client does: an answer that did not come, or was "come again", is asked for again,
    /// of whoever lives.
    async fn registered(&self, replicas: [&Replica; 2], username: &str) -> Value {
        let asked = AtomicUsize::new(0);
        eventually(&format!("{username} is registered"), || async {
            let replica = replicas[asked.fetch_add(1, Ordering::Relaxed) % 2];
            let response = self.register(replica, username).await.ok()?;
            let (status, body) = (response.status(), response.json::<Value>().await.ok()?);
            assert!(matches!(status.as_u16(), 201 | 503), "{username}: {body}");
            (status == 201).then(|| body["data"].clone())
        })
        .await
    }

    /// Events of one key, each committed by itself, in order.
    async fn load(&self, key: String, events: usize) {
        for n in 1..=events {
            let message = NewMessage {
                id: Uuid::now_v7(),
                topic: format!("{}load", self.prefix),
                key: key.clone(),
                source: "test".to_owned(),
                payload: json!({ "n": n }).to_string().into_bytes(),
                content_type: "application/json",
                headers: BTreeMap::new(),
                saga_id: None,
            };
            let mut tx = self.db.begin().await.unwrap();
            append(&mut tx, &message).await.unwrap();
            tx.commit().await.unwrap();
        }
    }
}

/// Copies left out: what a consumer that knows each `ce_id` once reads.
fn first_occurrences(seen: Vec<Seen>) -> BTreeMap<String, Vec<Seen>> {
    let mut known = BTreeSet::new();
    let mut by_key: BTreeMap<String, Vec<Seen>> = BTreeMap::new();
    for message in seen {
        if known.insert(message.header("ce_id").to_owned()) {
            by_key.entry(message.key.clone()).or_default().push(message);
        }
    }
    by_key
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn one_of_two_replicas_is_killed_under_load_and_nothing_is_lost_or_out_of_order() {
    let fleet = Fleet::new().await;
    let (mut first, second) = (Replica::serve(&fleet.vars).await, Replica::serve(&fleet.vars).await);
    // Both hold their share before the load begins.
    fleet.until_count("select count(*) from (select owner from outbox_lanes where owner is not null group by owner having count(*) = 32) s", 2).await;

    join_all((0..WARM_KEYS).map(|n| fleet.load(format!("warm {n}"), 1))).await;
    fleet.until_count("select (count(distinct relay_id) > 1)::int::bigint from outbox_archive", 1).await;

    let answered = AtomicUsize::new(0);
    let users = (0..USERS).map(async |n| {
        let username = format!("user{n}");
        let replicas = if n % 2 == 0 { [&first, &second] } else { [&second, &first] };
        let user = fleet.registered(replicas, &username).await;
        if answered.fetch_add(1, Ordering::Relaxed) == USERS / 4 {
            first.kill();
        }
        user
    });
    let (users, _) =
        tokio::join!(join_all(users), join_all((0..KEYS).map(|key| fleet.load(format!("key {key}"), EVENTS_PER_KEY))));
    assert_eq!(first.exit_code().await, None, "killed");

    fleet.until_count("select count(*) from outbox", 0).await;
    assert_eq!(fleet.count("select count(*) from outbox_parked").await, 0);
    // The survivor has all lanes.
    fleet
        .until_count(
            "select count(*) from outbox_lanes where owner = (select max(id::text)::uuid from outbox_relays)",
            64,
        )
        .await;
    let created = first_occurrences(fleet.topic("user.create").await);
    let ids: BTreeSet<String> = users.iter().map(|user| user["id"].to_string()).collect();
    assert_eq!(ids.len(), USERS);
    assert_eq!(
        created.keys().cloned().collect::<BTreeSet<_>>(),
        ids,
        "every answered registration, once, and no other"
    );
    assert!(created.values().all(|of_key| of_key.len() == 1));
    assert_eq!(fleet.count("select count(*) from auth_users").await, USERS as i64);
    let loaded = first_occurrences(fleet.topic("load").await);
    assert_eq!(loaded.len(), KEYS + WARM_KEYS);
    for (key, messages) in loaded {
        let numbers: Vec<_> = messages.iter().map(|message| message.value["n"].as_u64().unwrap() as usize).collect();
        let events = if key.starts_with("warm") { 1 } else { EVENTS_PER_KEY };
        assert_eq!(numbers, (1..=events).collect::<Vec<_>>(), "{key}");
    }

    // The survivor does what both did: replies too.
    let user = &users[0];
    let (id, saga_id) = (user["id"].to_string(), user["sagaId"].as_str().unwrap());
    let reply = json!({ "id": user["id"] }).to_string();
    let topic = format!("{}user.create.done", fleet.prefix);
    kafka::send(&PARTS.brokers(), &topic, &id, &[("saga-id", saga_id)], reply.as_bytes()).await;
    fleet.until_count("select count(*) from saga_state where status = 'completed'", 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_asked_to_stop_drains_gives_its_lanes_back_and_exits_0() {
    let fleet = Fleet::new().await;
    let (mut first, second) = (Replica::serve(&fleet.vars).await, Replica::serve(&fleet.vars).await);
    fleet.until_count("select count(distinct owner) from outbox_lanes", 2).await;
    let ready = async |replica: &Replica| {
        let response = fleet.client.get(format!("{}/auth/health/ready", replica.http)).send().await;
        response.map(|response| response.status().as_u16()).unwrap_or_default()
    };
    assert_eq!(ready(&first).await, 200);
    first.terminate();
    eventually("it says that it is going", || async { (ready(&first).await == 503).then_some(()) }).await;
    // Still served, while load balancers look away.
    assert_eq!(fleet.register(&first, "ada").await.unwrap().status(), 201);
    assert_eq!(first.exit_code().await, Some(0), "{:?}", first.logged(""));
    assert!(first.logged("panicked").is_empty());

    fleet.until_count("select count(distinct owner) from outbox_lanes", 1).await;
    assert_eq!(
        fleet.count("select count(*) from outbox_lanes where attempt_limit is not null").await,
        0,
        "given back, not taken"
    );
    assert_eq!(fleet.count("select count(*) from outbox_relays").await, 1);
    assert_eq!(ready(&second).await, 200);
    assert_eq!(fleet.register(&second, "bob").await.unwrap().status(), 201);
    fleet.until_count("select count(*) from outbox_archive", 2).await;
    assert_eq!(fleet.topic("user.create").await.len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_started_before_its_database_serves_once_it_is_there() {
    let fleet = Fleet::new().await;
    let database = PARTS.bare_database().await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("alter database {database} with allow_connections false")))
        .execute(&fleet.db)
        .await
        .unwrap();
    let vars = production_vars(&database, &fleet.prefix, &[("DB_ACQUIRE_TIMEOUT", "1s"), ("SHUTDOWN_DRAIN", "0s")]);
    let mut replica = Replica::serve(&vars).await;
    let status = async |path: &str| {
        fleet.client.get(format!("{}{path}", replica.http)).send().await.expect("an answer").status().as_u16()
    };
    assert_eq!((status("/auth/health/live").await, status("/auth/health/ready").await), (200, 503));
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("alter database {database} with allow_connections true")))
        .execute(&fleet.db)
        .await
        .unwrap();
    let (code, ..) = crate::support::process::run(&["migrate"], &vars).await;
    assert_eq!(code, 0);
    eventually("it is ready", || async { (status("/auth/health/ready").await == 200).then_some(()) }).await;
    assert_eq!(fleet.register(&replica, "ada").await.unwrap().status(), 201);
    replica.terminate();
    assert_eq!(replica.exit_code().await, Some(0));
}

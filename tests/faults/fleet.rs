//! A database, topics, the service's processes, the other service, and clients who remember what
//! they were told.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use auth_service::dev::user_service::{UserService, UserServiceSettings};
use outbox_relay::{NewMessage, append};
use secrecy::SecretString;
use serde_json::{Value, json};
use sqlx::{PgPool, postgres::PgPoolOptions};
use tokio::time::sleep;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    keeper::{Keeper, Orders},
    node,
    stage::Stage,
    support::{join_all, parts::PARTS, process::production_vars, service::registration},
};

/// Rows a relay's worker holds: small, so that a crash is felt by many batches.
pub const BATCH: u64 = 40;

const TOPICS: [&str; 8] = [
    "user.create",
    "user.create.close",
    "user.create.done",
    "saga-reply",
    "user.delete",
    "user.delete.done",
    "user.delete.close",
    "load",
];

/// What a scenario wants different.
#[derive(Default)]
pub struct Wishes {
    /// Another Kafka than the shared one.
    pub brokers: Option<String>,
    /// Another PostgreSQL than the shared one: its database's URL.
    pub database_url: Option<String>,
    /// Settings of the service.
    pub vars: Vec<(&'static str, String)>,
    /// The other service reads and answers under this prefix instead of the fleet's.
    pub other_prefix: Option<String>,
    /// It hears no command and is not heard: it can only be asked.
    pub replies_lost: bool,
    /// There is none.
    pub no_user_service: bool,
    /// Topics that are not made.
    pub without: &'static [&'static str],
    /// Its relays fence each other off, whatever the scenario's name says.
    pub fenced: bool,
    /// Topics beside the usual ones, which the scenario makes.
    pub more_topics: usize,
}

/// Everything a scenario plays on.
pub struct Fleet {
    pub db: PgPool,
    pub brokers: String,
    pub prefix: String,
    pub told: Mutex<Told>,
    /// How many events may be in flight at each disturbance, all together: so many copies are allowed.
    pub allowed: AtomicU64,
    /// No copy may stand behind the message the archive names.
    pub fenced: bool,
    full: bool,
    more_topics: usize,
    vars: Vec<(String, String)>,
    name: String,
    client: reqwest::Client,
    other: Option<Other>,
}

struct Other {
    service: UserService,
    shutdown: CancellationToken,
}

/// What clients were told.
#[derive(Default)]
pub struct Told {
    /// User id to saga id, of every registration that was answered 201.
    pub users: BTreeMap<i64, String>,
    /// Users the other service refuses.
    pub refused: BTreeSet<i64>,
    /// Users of whom either may become.
    pub undecided: BTreeSet<i64>,
    /// Message ids of events whose COMMIT was answered, by key, in that order.
    pub events: BTreeMap<String, Vec<Uuid>>,
}

impl Fleet {
    pub async fn new(stage: &Stage, wishes: Wishes) -> Self {
        let brokers = wishes.brokers.clone().unwrap_or_else(|| PARTS.brokers());
        let topics_of = |prefix: &str| {
            let made = TOPICS.iter().filter(|name| !wishes.without.contains(name));
            made.map(|name| format!("{prefix}{name}")).collect::<Vec<_>>()
        };
        let prefix = format!("f{}.", Uuid::new_v4().simple());
        node::create_topics(&brokers, &topics_of(&prefix), &[]).await;
        if let Some(other_prefix) = &wishes.other_prefix {
            node::create_topics(&brokers, &topics_of(other_prefix), &[]).await;
        }
        Self::on(stage, wishes, brokers, prefix).await
    }

    /// On a broker where topics are made in another way.
    pub async fn with_topics(stage: &Stage, wishes: Wishes, create: impl FnOnce(&[String])) -> Self {
        let prefix = format!("f{}.", Uuid::new_v4().simple());
        create(&TOPICS.map(|name| format!("{prefix}{name}")));
        let brokers = wishes.brokers.clone().unwrap_or_else(|| PARTS.brokers());
        Self::on(stage, wishes, brokers, prefix).await
    }

    async fn on(stage: &Stage, wishes: Wishes, brokers: String, prefix: String) -> Self {
        let database_url = match wishes.database_url {
            Some(url) => url,
            None => PARTS.database_url(&PARTS.database().await),
        };
        let fenced = wishes.fenced || stage.fenced();
        let other = if wishes.no_user_service {
            None
        } else {
            let unheard = wishes.replies_lost.then(|| format!("unheard.{prefix}"));
            let other_prefix = wishes.other_prefix.or(unheard).unwrap_or_else(|| prefix.clone());
            Some(Other::start(&database_url, &brokers, &other_prefix).await)
        };
        let mut vars = production_vars(
            "unused",
            &prefix,
            &[
                ("DATABASE_URL", &database_url),
                ("KAFKA_BROKERS", &brokers),
                ("RELAY_BATCH", &BATCH.to_string()),
                ("RELAY_LEASE", "2s"),
                ("DB_ACQUIRE_TIMEOUT", "2s"),
                ("HASH_QUEUE", "1000"),
                ("HASH_MAX_WAIT", "60s"),
                ("SAGA_STEP_TIMEOUT", "4s"),
                ("SAGA_RESOLVE_BACKOFF", "500ms"),
                ("RELAY_FENCING", if fenced { "true" } else { "false" }),
            ],
        );
        if let Some(other) = &other {
            vars.push(("USER_SERVICE_GRPC_URL".to_owned(), format!("http://{}", other.service.grpc_addr())));
        }
        for (name, value) in wishes.vars {
            vars.retain(|(known, _)| known != name);
            vars.push((name.to_owned(), value));
        }
        Self {
            db: PgPoolOptions::new().max_connections(8).connect_lazy(&database_url).expect("a URL"),
            brokers,
            prefix,
            told: Mutex::default(),
            allowed: AtomicU64::new(0),
            fenced,
            full: stage.full,
            more_topics: wishes.more_topics,
            vars,
            name: format!("{}-{}", stage.name.replace([':', ' '], "_"), stage.seed),
            client: reqwest::Client::builder().timeout(Duration::from_secs(15)).build().expect("a client"),
            other,
        }
    }

    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Changes a setting of processes that are started from now on.
    pub fn set(&mut self, name: &str, value: String) {
        self.vars.retain(|(known, _)| known != name);
        self.vars.push((name.to_owned(), value));
    }

    /// A process of the service; it is not up yet.
    pub fn process(&self, roles: &'static str, fail: &str, armed_lives: u32) -> Keeper {
        self.keep(Orders { roles, fail: fail.to_owned(), armed_lives, ..Orders::default() })
    }

    /// With further variables.
    pub fn process_with(&self, roles: &'static str, vars: &[(String, String)]) -> Keeper {
        self.keep(Orders { roles, vars: vars.to_owned(), ..Orders::default() })
    }

    fn keep(&self, orders: Orders) -> Keeper {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let name = format!("{}-{}", self.name, COUNT.fetch_add(1, Ordering::Relaxed));
        let vars = self.vars.iter().chain(&orders.vars).cloned().collect();
        Keeper::start(Orders { name, vars, ..orders })
    }

    /// One process with every role, up.
    pub async fn all_roles(&self) -> Keeper {
        let keeper = self.process("", "", 0);
        keeper.until_up().await;
        keeper
    }

    /// Something that may cost one copy of everything in flight.
    pub fn disturbed(&self) {
        self.allowed.fetch_add(2 * BATCH, Ordering::Relaxed);
    }

    /// Registers `count` users, each a few times over if need be, as a good client does: what was not
    /// answered, or answered with "come again", is asked for again under the same key. Every third
    /// is one the other service refuses.
    pub async fn register(&self, keepers: &[&Keeper], count: usize) {
        join_all((0..count).map(|n| self.register_one(keepers, n, n % 3 == 2))).await;
    }

    /// Registrations and events at once, while the harm is done.
    pub async fn load(
        &self,
        keepers: &[&Keeper],
        users: usize,
        events: (usize, usize),
        harm: impl Future<Output = ()>,
    ) {
        let (keys, per_key) = events;
        tokio::join!(self.register(keepers, users), self.commit_events(keys, per_key), harm);
    }

    pub async fn register_one(&self, keepers: &[&Keeper], n: usize, refused: bool) {
        let kind = if refused { "refuse" } else { "user" };
        let username = format!("{kind}{}", &Uuid::new_v4().simple().to_string()[..20]);
        for attempt in n.. {
            let http = keepers[attempt % keepers.len()].http();
            let request = self.client.post(format!("{http}/auth/register")).header("idempotency-key", &username);
            let answer = match request.json(&registration(&username)).send().await {
                Ok(response) => (response.status().as_u16(), response.json::<Value>().await.unwrap_or_default()),
                Err(_) => (0, Value::Null),
            };
            match answer {
                (201, body) => {
                    let id = body["data"]["id"].as_i64().expect("an id");
                    let mut told = self.told.lock().unwrap();
                    told.users.insert(id, body["data"]["sagaId"].as_str().expect("a saga").to_owned());
                    if refused {
                        told.refused.insert(id);
                    }
                    return;
                }
                // Refused by the other service before the answer to an earlier attempt arrived.
                (409, _) if refused => return,
                (0 | 429 | 500.., _) => sleep(Duration::from_millis(100)).await,
                (status, body) => panic!("{username}: {status} {body}"),
            }
        }
    }

    /// Commits events of many keys, each in a transaction of its own, one after the other in a key.
    pub async fn commit_events(&self, keys: usize, per_key: usize) {
        join_all((0..keys).map(|key| self.commit_events_of(format!("key{key}"), per_key, 200))).await;
    }

    pub async fn commit_events_of(&self, key: String, count: usize, bytes: usize) {
        for _ in 0..count {
            self.commit_event(&key, self.event(&key, bytes)).await;
        }
    }

    /// Events of these keys and new users, one after the other with a `pause` between, until it is enough.
    pub async fn load_until(&self, keeper: &Keeper, keys: &[String], pause: Duration, enough: &CancellationToken) {
        let events = join_all(keys.iter().map(|key| async move {
            while !enough.is_cancelled() {
                self.commit_events_of(key.clone(), 1, 200).await;
                sleep(pause).await;
            }
        }));
        let users = async {
            for n in 0.. {
                self.register_one(&[keeper], n, n % 3 == 2).await;
                if tokio::time::timeout(Duration::from_secs(2), enough.cancelled()).await.is_ok() {
                    return;
                }
            }
        };
        tokio::join!(events, users);
    }

    /// One event of each of many keys, all of them in one transaction.
    pub async fn commit_together(&self, keys: usize, bytes: usize) {
        let messages: Vec<_> = (0..keys).map(|key| self.event(&format!("key{key}"), bytes)).collect();
        let mut tx = self.db.begin().await.expect("a transaction");
        for message in &messages {
            append(&mut tx, message).await.expect("appended");
        }
        tx.commit().await.expect("committed");
        messages.iter().for_each(|message| self.was_told(&message.key, message.id));
    }

    /// One event in each further topic, of a key of its own.
    pub async fn commit_to_more_topics(&self) {
        join_all(self.more_topics().into_iter().enumerate().map(|(n, topic)| async move {
            let key = format!("further{n}");
            self.commit_event(&key, NewMessage { topic, ..self.event(&key, 100) }).await;
        }))
        .await;
    }

    /// Every topic of its own.
    pub fn topics(&self) -> Vec<String> {
        TOPICS.iter().map(|name| self.topic(name)).chain(self.more_topics()).collect()
    }

    pub fn more_topics(&self) -> Vec<String> {
        (0..self.more_topics).map(|n| self.topic(&format!("further{n}"))).collect()
    }

    async fn commit_event(&self, key: &str, message: NewMessage) {
        let committed = async {
            let mut tx = self.db.begin().await.ok()?;
            append(&mut tx, &message).await.ok()?;
            tx.commit().await.ok()
        };
        // An unanswered COMMIT tells nothing; the checker knows what the database has.
        if committed.await.is_some() {
            self.was_told(key, message.id);
        } else {
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// A client knows that this event is committed.
    pub fn was_told(&self, key: &str, event: Uuid) {
        self.told.lock().unwrap().events.entry(key.to_owned()).or_default().push(event);
    }

    pub fn event(&self, key: &str, bytes: usize) -> NewMessage {
        NewMessage {
            id: Uuid::now_v7(),
            topic: self.topic("load"),
            key: key.to_owned(),
            source: "faults".to_owned(),
            payload: json!({ "filler": "x".repeat(bytes) }).to_string().into_bytes(),
            content_type: "application/json",
            headers: BTreeMap::new(),
            saga_id: None,
        }
    }

    pub async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.db).await.unwrap_or(-1)
    }

    /// Looks until the count is as expected; fails the scenario when it never is.
    pub async fn until_count(&self, query: &'static str, expected: i64, patience: Duration) {
        self.until(query, |count| count == expected, patience).await;
    }

    pub async fn until_at_least(&self, query: &'static str, least: i64, patience: Duration) {
        self.until(query, |count| count >= least, patience).await;
    }

    async fn until(&self, query: &'static str, good: impl Fn(i64) -> bool, patience: Duration) {
        let since = Instant::now();
        let mut last = i64::MIN;
        while since.elapsed() < patience {
            last = self.count(query).await;
            if good(last) {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
        panic!("waited {patience:?} in vain for {query}; it is {last}");
    }

    /// Waits until nothing is under way any more, or until it has taken too long, which in the full form is
    /// four times as long: then the checker counts what is not at rest.
    pub async fn settle(&self, patience: Duration) {
        let patience = patience * if self.full { 4 } else { 1 };
        let since = Instant::now();
        while since.elapsed() < patience && self.count(UNDER_WAY).await != 0 {
            sleep(Duration::from_millis(50)).await;
        }
        if self.other.is_some() {
            while since.elapsed() < patience && self.count(HALF_DONE).await != 0 {
                sleep(Duration::from_millis(50)).await;
            }
        }
    }

    /// The longest that an event waited, from its transaction's begin until it was known to be in Kafka.
    pub async fn longest_wait(&self) -> Duration {
        let longest: Option<f64> = sqlx::query_scalar(
            "select max(extract(epoch from published_at - created_at))::float8 from outbox_archive where topic = $1",
        )
        .bind(self.topic("load"))
        .fetch_one(&self.db)
        .await
        .expect("the archive");
        Duration::from_secs_f64(longest.unwrap_or(0.0))
    }

    /// Where the other service is asked.
    pub fn other_address(&self) -> String {
        self.other.as_ref().expect("there is one").service.grpc_addr().to_string()
    }

    /// What clients were told of events so far is not looked for in Kafka.
    pub async fn forget_events(&self) {
        self.told.lock().unwrap().events.clear();
        sqlx::query("delete from outbox_archive where topic = $1")
            .bind(self.topic("load"))
            .execute(&self.db)
            .await
            .expect("forgotten");
    }

    pub fn has_other(&self) -> bool {
        self.other.is_some()
    }

    pub async fn end(self) {
        if let Some(other) = self.other {
            other.shutdown.cancel();
            let _ = tokio::time::timeout(Duration::from_secs(10), other.service.stopped()).await;
        }
        self.db.close().await;
    }
}

const UNDER_WAY: &str = "select (select count(*) from outbox)
    + (select count(*) from saga_state where status in ('running', 'resolving'))";

/// Users without profile and profiles without user, of sagas that are not stuck: a stuck one says so.
pub const HALF_DONE: &str = "
    select (select count(*) from auth_users u join saga_state s on s.saga_id = u.create_saga_id
             where s.status <> 'stuck'
               and not exists (select from user_service.profiles p where p.user_id = u.id))
         + (select count(*) from user_service.profiles p
             where not exists (select from auth_users u where u.id = p.user_id)
               and not exists (select from saga_state s where s.subject = p.user_id::text and s.status = 'stuck'))";

impl Other {
    async fn start(database_url: &str, brokers: &str, prefix: &str) -> Self {
        let shutdown = CancellationToken::new();
        let settings = UserServiceSettings {
            database_url: SecretString::from(database_url.to_owned()),
            kafka_brokers: brokers.to_owned(),
            kafka_client: vec![],
            topic_prefix: prefix.to_owned(),
            group_id: format!("{prefix}user-service"),
            grpc_listen: ([127, 0, 0, 1], 0).into(),
            refused_prefixes: vec!["refuse".to_owned()],
        };
        let service = UserService::start(settings, shutdown.clone()).await.expect("the user-service starts");
        Self { service, shutdown }
    }
}

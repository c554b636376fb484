//! One instance of the service, in this process, on its own database and topics.

use std::{
    collections::BTreeSet,
    sync::{LazyLock, OnceLock},
    time::Duration,
};

use auth_service::{
    app::{self, Role, Running},
    config::{Config, Profile},
    crypto::{PemPair, generate_pair},
    telemetry,
};
use metrics_exporter_prometheus::PrometheusHandle;
use reqwest::{Client, Method, RequestBuilder, Response};
use secrecy::ExposeSecret;
use serde_json::{Value, json};
use sqlx::PgPool;
use uuid::Uuid;

use super::{
    eventually,
    kafka::{self, Seen},
    parts::PARTS,
};

/// Made once a run: a pair takes a second.
static KEYS: LazyLock<[String; 4]> = LazyLock::new(|| {
    let pair = || generate_pair(2048).expect("a key pair");
    let (access, refresh) = (pair(), pair());
    let private = |pair: &PemPair| pair.private.expose_secret().to_owned();
    [private(&access), access.public.clone(), private(&refresh), refresh.public.clone()]
});

pub const ADMIN_TOKEN: &str = "adm_test_token_with_every_scope";
pub const READ_TOKEN: &str = "adm_test_token_that_may_only_read";
pub const CALLER_TOKEN: &str = "grpc_test_caller_token";

pub struct TestService {
    pub running: Running,
    pub http: String,
    pub admin: String,
    pub grpc: String,
    pub db: PgPool,
    pub database: String,
    pub prefix: String,
    pub client: Client,
}

/// What a test wants different.
#[derive(Default)]
pub struct Wishes {
    pub roles: Option<Vec<Role>>,
    pub vars: Vec<(&'static str, String)>,
    /// Join another instance's database and topics.
    pub beside: Option<(String, String)>,
    /// Start without reply topics and command topics.
    pub no_topics: bool,
}

impl TestService {
    pub async fn start() -> Self {
        Self::with(Wishes::default()).await
    }

    pub async fn with_roles(roles: &[Role]) -> Self {
        Self::with(Wishes { roles: Some(roles.to_vec()), ..Wishes::default() }).await
    }

    pub async fn with_vars(vars: &[(&'static str, &str)]) -> Self {
        let vars = vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
        Self::with(Wishes { vars, ..Wishes::default() }).await
    }

    pub async fn with(wishes: Wishes) -> Self {
        let joining = wishes.beside.is_some();
        let (database, prefix) = match wishes.beside {
            Some(other) => other,
            None => (PARTS.database().await, format!("{}.", Uuid::new_v4().simple())),
        };
        if !joining && !wishes.no_topics {
            let topics = [
                "user.create",
                "user.create.close",
                "user.create.done",
                "user.delete",
                "user.delete.done",
                "user.delete.close",
                "saga-reply",
            ];
            PARTS.create_topics(&topics.map(|topic| format!("{prefix}{topic}"))).await;
        }
        let mut vars = base_vars(&database, &prefix);
        for (name, value) in wishes.vars {
            vars.retain(|(known, _)| known != name);
            vars.push((name.to_owned(), value));
        }
        let config = Config::from_vars(vars, Profile::Dev).unwrap_or_else(|errors| panic!("{errors}"));
        let roles: BTreeSet<Role> = wishes.roles.unwrap_or(Role::ALL.to_vec()).into_iter().collect();
        let running = app::start(config, &roles, metrics()).await.expect("the service starts");
        let url = |address: Option<std::net::SocketAddr>| address.map(|a| format!("http://{a}")).unwrap_or_default();
        Self {
            http: url(running.http),
            admin: url(running.admin),
            grpc: url(running.grpc),
            db: PgPool::connect_lazy_with(PARTS.connect_options(&database)),
            database,
            prefix,
            client: Client::builder().timeout(Duration::from_secs(30)).build().expect("a client"),
            running,
        }
    }

    pub async fn stop(self) {
        self.running.stop(Duration::ZERO, Duration::from_secs(20)).await;
    }

    pub fn request(&self, method: Method, path: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.http))
    }

    pub async fn post(&self, path: &str, body: Value) -> Response {
        self.request(Method::POST, path).json(&body).send().await.expect("an answer")
    }

    pub async fn register(&self, username: &str) -> Response {
        self.post("/auth/register", registration(username)).await
    }

    /// Registers and answers with the `data` of the 201.
    pub async fn registered(&self, username: &str) -> Value {
        let response = self.register(username).await;
        assert_eq!(response.status(), 201, "{}", response.text().await.unwrap_or_default());
        response.json::<Value>().await.expect("JSON")["data"].clone()
    }

    pub async fn admin(&self, method: Method, path: &str, token: &str) -> RequestBuilder {
        self.client.request(method, format!("{}{path}", self.admin)).bearer_auth(token)
    }

    pub fn topic(&self, name: &str) -> String {
        format!("{}{name}", self.prefix)
    }

    /// Everything in a topic once there are at least `count` messages.
    pub async fn messages(&self, topic: &str, count: usize) -> Vec<Seen> {
        let topics = [self.topic(topic)];
        eventually(&format!("{count} messages in {topic}"), || async {
            let seen = kafka::read_all(&PARTS.brokers(), &topics).await;
            (seen.len() >= count).then_some(seen)
        })
        .await
    }

    /// Answers as the user-service would.
    pub async fn reply(&self, topic: &str, key: &str, headers: &[(&str, &str)], value: Value) {
        kafka::send(&PARTS.brokers(), &self.topic(topic), key, headers, value.to_string().as_bytes()).await;
    }

    pub async fn saga_status(&self, saga_id: &str) -> String {
        let id: Uuid = saga_id.parse().expect("a saga id");
        sqlx::query_scalar("select status from saga_state where saga_id = $1")
            .bind(id)
            .fetch_one(&self.db)
            .await
            .expect("the saga")
    }

    pub async fn until_saga_is(&self, saga_id: &str, status: &str) {
        eventually(&format!("saga {saga_id} is {status}"), || async {
            (self.saga_status(saga_id).await == status).then_some(())
        })
        .await;
    }

    pub async fn count(&self, query: &'static str) -> i64 {
        sqlx::query_scalar(query).fetch_one(&self.db).await.expect("a count")
    }

    pub async fn until_count(&self, query: &'static str, expected: i64) {
        eventually(&format!("{query} = {expected}"), || async { (self.count(query).await == expected).then_some(()) })
            .await;
    }

    /// Waits until readiness says of this trouble of the role `sagas` what is wanted: its detail, or `None`.
    pub async fn until_detail(&self, trouble: &str, wanted: impl Fn(Option<&str>) -> bool) {
        eventually(&format!("readiness says what is wanted of {trouble}"), || async {
            let ready = self.request(Method::GET, "/auth/health/ready").send().await.expect("an answer");
            let ready: Value = ready.json().await.expect("JSON");
            let told = ready["details"]["sagas"].as_array().cloned().unwrap_or_default();
            let found = told.iter().find(|told| told["trouble"] == trouble);
            wanted(found.map(|told| told["detail"].as_str().expect("a detail"))).then_some(())
        })
        .await;
    }

    /// The database and topics, for a second instance beside this one.
    pub fn beside(&self) -> Option<(String, String)> {
        Some((self.database.clone(), self.prefix.clone()))
    }
}

pub fn registration(username: &str) -> Value {
    json!({ "username": username, "email": format!("{username}@example.com"), "password": "a long enough secret" })
}

/// One recorder a process.
pub fn metrics() -> PrometheusHandle {
    static HANDLE: OnceLock<PrometheusHandle> = OnceLock::new();
    HANDLE.get_or_init(|| telemetry::install_metrics().expect("a recorder")).clone()
}

pub fn base_vars(database: &str, prefix: &str) -> Vec<(String, String)> {
    use sha2_hex as hash;
    let [access_private, access_public, refresh_private, refresh_public] = &*KEYS;
    let admin_tokens = format!("root:read+operate+admin:{},viewer:read:{}", hash(ADMIN_TOKEN), hash(READ_TOKEN));
    [
        ("DATABASE_URL", PARTS.database_url(database)),
        ("KAFKA_BROKERS", PARTS.brokers()),
        ("KAFKA_TOPIC_PREFIX", prefix.to_owned()),
        ("KAFKA_GROUP_ID", format!("{prefix}auth")),
        ("ACCESS_TOKEN_PRIVATE_KEY", access_private.clone()),
        ("ACCESS_TOKEN_PUBLIC_KEY", access_public.clone()),
        ("REFRESH_TOKEN_PRIVATE_KEY", refresh_private.clone()),
        ("REFRESH_TOKEN_PUBLIC_KEY", refresh_public.clone()),
        ("SALT_ROUNDS", "4".to_owned()),
        ("HOST", "127.0.0.1".to_owned()),
        ("PORT", "0".to_owned()),
        // Connecting takes seconds where two builds run beside the tests.
        ("DB_ACQUIRE_TIMEOUT", "30s".to_owned()),
        ("GRPC_PORT", "0".to_owned()),
        ("ADMIN_PORT", "0".to_owned()),
        ("ADMIN_TOKENS", admin_tokens),
        ("GRPC_CALLER_TOKENS", format!("gateway:{}", hash(CALLER_TOKEN))),
        ("RELAY_LEASE", "2s".to_owned()),
        ("RELAY_POLL", "100ms".to_owned()),
        ("SHUTDOWN_DRAIN", "0s".to_owned()),
    ]
    .map(|(name, value)| (name.to_owned(), value))
    .to_vec()
}

pub fn sha2_hex(text: &str) -> String {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, text.as_bytes());
    digest.as_ref().iter().map(|byte| format!("{byte:02x}")).collect()
}

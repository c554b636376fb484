//! The whole service, on a private PostgreSQL and the embedded broker.

use std::{collections::BTreeMap, time::Duration};

use auth_proto::{
    legacy::auth::{CreateUserRequest as LegacyRequest, auth_user_client::AuthUserClient},
    user::v1::{CreateUserRequest, GetUserRequest, user_service_client::UserServiceClient},
};
use rdkafka::{
    ClientConfig, Message,
    consumer::{Consumer, StreamConsumer},
    message::{Header, Headers, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use serde_json::{Value, json};
use sqlx::PgPool;
use tokio::time::timeout;
use tonic::Code;
use uuid::Uuid;

use super::*;
use crate::dev::{
    broker::EmbeddedBroker,
    postgres::{PostgresOptions, PrivateCluster},
};

const TOPICS: [&str; 5] =
    ["t.user.create", "t.user.delete", "t.user.create.done", "t.user.create.close", "t.user.delete.done"];

struct World {
    service: UserService,
    shutdown: CancellationToken,
    producer: FutureProducer,
    answers: StreamConsumer,
    database: PgPool,
    broker: EmbeddedBroker,
    cluster: PrivateCluster,
    _folder: tempfile::TempDir,
}

#[derive(Debug, PartialEq)]
struct Read {
    topic: String,
    key: String,
    headers: BTreeMap<String, String>,
    value: Value,
}

impl World {
    async fn new() -> Self {
        let folder = tempfile::tempdir_in("/var/tmp").expect("a folder");
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).expect("permissions");
        let options = PostgresOptions { durable: false, ..PostgresOptions::default() };
        let cluster = PrivateCluster::start(&folder.path().join("postgres"), options).await.expect("a cluster");
        cluster.create_database("users").await.expect("a database");
        let broker = EmbeddedBroker::start(&TOPICS).await.expect("a broker");
        let settings = UserServiceSettings {
            database_url: cluster.url("users"),
            kafka_brokers: broker.bootstrap_servers().to_owned(),
            kafka_client: vec![],
            topic_prefix: "t.".to_owned(),
            group_id: "user-service".to_owned(),
            grpc_listen: ([127, 0, 0, 1], 0).into(),
            refused_prefixes: vec!["refuse".to_owned()],
        };
        let mut client = ClientConfig::new();
        client.set("bootstrap.servers", broker.bootstrap_servers());
        let producer = client.create().expect("a producer");
        let answers: StreamConsumer =
            client.set("group.id", "test").set("auto.offset.reset", "earliest").create().expect("a consumer");
        answers.subscribe(&TOPICS[2..]).expect("subscribed");
        let database = PgPool::connect(cluster.url("users").expose_secret()).await.expect("a pool");
        let shutdown = CancellationToken::new();
        let service = UserService::start(settings, shutdown.clone()).await.expect("a service");
        Self { service, shutdown, producer, answers, database, broker, cluster, _folder: folder }
    }

    async fn send(&self, topic: &str, saga_id: Uuid, ce_id: &str, value: Value) {
        let saga_id = saga_id.to_string();
        let headers = OwnedHeaders::new()
            .insert(Header { key: "saga-id", value: Some(&saga_id) })
            .insert(Header { key: "ce_id", value: Some(ce_id) });
        let (topic, value) = (format!("t.{topic}"), value.to_string());
        let key = "7";
        let record = FutureRecord::to(&topic).key(key).payload(&value).headers(headers);
        self.producer.send(record, Duration::from_secs(10)).await.expect("delivered");
    }

    async fn create(&self, saga_id: Uuid, ce_id: &str, username: &str) {
        let value = json!({ "id": 7, "username": username, "email": "a@b.cd", "sagaId": saga_id });
        self.send("user.create", saga_id, ce_id, value).await;
    }

    async fn answer(&self) -> Read {
        // An outage shows as an error between the messages.
        let read = async {
            loop {
                if let Ok(message) = self.answers.recv().await {
                    return message;
                }
            }
        };
        let message = timeout(Duration::from_secs(30), read).await.expect("in time");
        let text = |bytes: Option<&[u8]>| String::from_utf8_lossy(bytes.unwrap_or_default()).into_owned();
        let headers = message.headers().expect("headers");
        Read {
            topic: message.topic().to_owned(),
            key: text(message.key()),
            headers: headers.iter().map(|header| (header.key.to_owned(), text(header.value))).collect(),
            value: serde_json::from_slice(message.payload().expect("a value")).expect("JSON"),
        }
    }

    async fn profiles(&self) -> i64 {
        sqlx::query_scalar("select count(*) from user_service.profiles")
            .fetch_one(&self.database)
            .await
            .expect("counted")
    }

    fn grpc_url(&self) -> String {
        format!("http://{}", self.service.grpc_addr())
    }

    async fn end(self) {
        self.shutdown.cancel();
        timeout(Duration::from_secs(10), self.service.stopped()).await.expect("stopped in time");
        self.database.close().await;
        // Before the broker: a consumer whose broker is gone does not finish closing.
        drop(self.answers);
        drop(self.broker);
        self.cluster.stop().await;
    }
}

#[tokio::test]
async fn a_command_that_comes_again_gets_the_same_answer_again() {
    let world = World::new().await;
    let saga = Uuid::now_v7();
    world.create(saga, "m-1", "ann").await;
    let first = world.answer().await;
    assert_eq!((first.topic.as_str(), first.key.as_str()), ("t.user.create.done", "7"));
    assert_eq!(first.value, json!({ "id": 7, "sagaId": saga }));
    assert_eq!(first.headers["saga-id"], saga.to_string());
    assert_eq!(first.headers["causation-id"], "m-1");
    assert_eq!(first.headers["sender"], "user-service");

    world.create(saga, "m-1", "ann").await;
    assert_eq!(world.answer().await, first);
    assert_eq!(world.profiles().await, 1);
    world.end().await;
}

#[tokio::test]
async fn a_refused_username_is_answered_with_the_reason() {
    let world = World::new().await;
    world.create(Uuid::now_v7(), "m-1", "Refuse-me").await;
    let answer = world.answer().await;
    assert_eq!(answer.topic, "t.user.create.close");
    assert_eq!(answer.value["reason"], "usernames that begin with \"refuse\" are not welcome here");
    assert_eq!(world.profiles().await, 0);
    world.end().await;
}

#[tokio::test]
async fn a_create_behind_its_delete_raises_nobody() {
    let world = World::new().await;
    let saga = Uuid::now_v7();
    world.send("user.delete", saga, "m-2", json!({ "id": 7 })).await;
    assert_eq!(world.answer().await.topic, "t.user.delete.done");
    world.create(saga, "m-1", "ann").await;
    let answer = world.answer().await;
    assert_eq!(
        (answer.topic.as_str(), &answer.value["reason"]),
        ("t.user.create.close", &json!("this user has been erased"))
    );
    assert_eq!(world.profiles().await, 0);
    world.end().await;
}

#[tokio::test]
async fn a_message_that_is_no_command_holds_nothing_up_and_an_outage_loses_nothing() {
    let world = World::new().await;
    let saga = Uuid::now_v7();
    world.send("user.create", Uuid::now_v7(), "m-0", json!("nonsense")).await;
    world.create(saga, "m-1", "ann").await;
    assert_eq!(world.answer().await.topic, "t.user.create.done");
    world.broker.down().await.expect("down");
    world.broker.up().await.expect("up");
    world.send("user.delete", saga, "m-2", json!({ "id": 7 })).await;
    assert_eq!(world.answer().await.topic, "t.user.delete.done");
    world.end().await;
}

#[tokio::test]
async fn asked_by_both_ways_it_decides_once() {
    let world = World::new().await;
    let saga_id = Uuid::now_v7();
    let mut calls = UserServiceClient::connect(world.grpc_url()).await.expect("connected");
    let missing = calls.get_user(GetUserRequest { user_id: 7 }).await.expect_err("not there");
    assert_eq!(missing.code(), Code::NotFound);

    let request = |saga_id: Uuid, user_id, username: &str| CreateUserRequest {
        user_id,
        username: username.to_owned(),
        email: "a@b.cd".to_owned(),
        saga_id: saga_id.to_string(),
    };
    for _ in 0..2 {
        calls.create_user(request(saga_id, 7, "ann")).await.expect("created, and idempotent");
    }
    world.create(saga_id, "m-1", "ann").await;
    assert_eq!(world.answer().await.topic, "t.user.create.done");
    let found = calls.get_user(GetUserRequest { user_id: 7 }).await.expect("found").into_inner();
    assert_eq!((found.username.as_str(), found.saga_id), ("ann", saga_id.to_string()));

    let other_saga = calls.create_user(request(Uuid::now_v7(), 7, "ann")).await.expect_err("another saga");
    assert_eq!(other_saga.code(), Code::FailedPrecondition);
    let refused = calls.create_user(request(Uuid::now_v7(), 8, "refused")).await.expect_err("refused");
    assert_eq!(refused.code(), Code::FailedPrecondition);

    let mut legacy = AuthUserClient::connect(world.grpc_url()).await.expect("connected");
    let request = |id| LegacyRequest { id, username: "bob".to_owned(), email: "b@b.cd".to_owned() };
    assert_eq!(legacy.create_user(request(9)).await.expect("created").into_inner().code, 0);
    assert_eq!(legacy.create_user(request(9)).await.expect_err("there").code(), Code::AlreadyExists);
    world.end().await;
}

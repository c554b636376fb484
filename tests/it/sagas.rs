//! Replies, silence, and messages nobody asked for.

use auth_proto::user::v1::{
    CreateUserRequest, CreateUserResponse, GetUserRequest, User,
    user_service_server::{UserService, UserServiceServer},
};
use auth_service::app::Role;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};
use uuid::Uuid;

use crate::support::{TestService, eventually, kafka, parts::PARTS};

async fn outcome_of(service: &TestService, detail_contains: &str) -> String {
    let pattern = format!("%{detail_contains}%");
    eventually(&format!("an inbox row that says {detail_contains:?}"), || async {
        sqlx::query_scalar::<_, String>("select outcome from inbox where detail like $1")
            .bind(&pattern)
            .fetch_optional(&service.db)
            .await
            .unwrap()
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_makes_no_sense_is_kept_and_the_partition_goes_on() {
    let service = TestService::start().await;
    let close = service.topic("user.create.close");
    let brokers = PARTS.brokers();
    let data = service.registered("ada").await;
    let (id, saga_id) = (data["id"].to_string(), data["sagaId"].as_str().unwrap().to_owned());
    let key = id.as_str();
    let unknown_saga = Uuid::now_v7().to_string();
    type Bad<'a> = (&'a [(&'a str, &'a str)], &'a [u8], &'a str, &'a str);
    let bad: [Bad<'_>; 15] = [
        (&[("x-trace", "a\0b")], b"not json either", "not JSON", "rejected"),
        (&[("saga-id", "a\0b"), ("ce_id", "c\0d")], br#"{"id":2}"#, "not a saga id", "rejected"),
        (&[], b"not json", "not JSON", "rejected"),
        (&[], b"\xff\xfe\x00", "not JSON", "rejected"),
        (&[], b"", "no value", "rejected"),
        (&[], b"[1,2]", "not a JSON object", "rejected"),
        (&[], b"{}", "names no saga", "rejected"),
        (&[], br#"{"id":"seven"}"#, "whole number", "rejected"),
        (&[], br#"{"sagaId":7,"id":1}"#, "is not text", "rejected"),
        (&[("saga-id", "not-a-uuid")], br#"{"id":1}"#, "not a saga id", "rejected"),
        (&[("saga-id", &unknown_saga)], br#"{"id":1}"#, "there is no saga", "unknown"),
        (&[("correlationId", "never-heard-of")], br#"{"id":1}"#, "no saga has the correlation id", "unknown"),
        (&[], br#"{"id":999999}"#, "no open saga is about user 999999", "unknown"),
        (
            &[("saga-id", &saga_id), ("correlationId", "not of this saga")],
            br#"{"x":1}"#,
            "its saga id and its correlation id disagree",
            "unexpected",
        ),
        (&[("saga-id", &saga_id)], br#"{"id":999998}"#, "it speaks of user 999998", "unexpected"),
    ];
    for (headers, payload, ..) in &bad {
        // One key, so one partition: each stands in front of the next, and of the good one.
        kafka::send(&brokers, &close, key, headers, payload).await;
    }
    kafka::send(&brokers, &close, key, &[("saga-id", &saga_id)], format!(r#"{{"id":{id}}}"#).as_bytes()).await;
    service.until_saga_is(&saga_id, "compensated").await;
    for (_, payload, detail, expected) in &bad {
        assert_eq!(outcome_of(&service, detail).await, *expected, "{detail}");
        let kept: bool = sqlx::query_scalar(
            "select exists (select from inbox where raw_payload = $1 or ($1 = '' and detail like '%no value%'))",
        )
        .bind(payload)
        .fetch_one(&service.db)
        .await
        .unwrap();
        assert!(kept, "the bytes of {detail:?} are kept");
    }
    assert_eq!(service.count("select count(*) from inbox").await, 16);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_never_deletes_a_user_that_is_active_or_of_another_saga() {
    let service = TestService::start().await;
    let ada = service.registered("ada").await;
    let ada_saga = ada["sagaId"].as_str().unwrap();
    let ada_id = ada["id"].to_string();
    service.reply("user.create.done", &ada_id, &[("saga-id", ada_saga)], json!({ "id": ada["id"] })).await;
    service.until_saga_is(ada_saga, "completed").await;
    let bob = service.registered("bob").await;
    let bob_saga = bob["sagaId"].as_str().unwrap();

    service
        .reply("user.create.close", &ada_id, &[("saga-id", ada_saga)], json!({ "id": ada["id"], "reason": "forged" }))
        .await;
    service.reply("user.create.close", &ada_id, &[("saga-id", bob_saga)], json!({ "id": ada["id"] })).await;
    service.until_count("select count(*) from inbox where outcome in ('late', 'unexpected')", 2).await;
    assert_eq!(service.count("select count(*) from auth_users").await, 2);
    assert_eq!(service.saga_status(ada_saga).await, "completed");
    assert_eq!(service.saga_status(bob_saga).await, "running");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_reply_delivered_twice_changes_nothing() {
    let service = TestService::start().await;
    let ada = service.registered("ada").await;
    let saga_id = ada["sagaId"].as_str().unwrap();
    let id = ada["id"].to_string();
    let headers = [("saga-id", saga_id), ("ce_id", "reply-1"), ("ce_source", "user-service")];
    for _ in 0..2 {
        service.reply("user.create.close", &id, &headers, json!({ "id": ada["id"] })).await;
    }
    // The same answer under another id: known to the machine, not to the inbox.
    service
        .reply("user.create.close", &id, &[("saga-id", saga_id), ("ce_id", "reply-2")], json!({ "id": ada["id"] }))
        .await;
    service.until_count("select count(*) from inbox where outcome in ('applied', 'duplicate')", 2).await;
    let outcomes: Vec<String> =
        sqlx::query_scalar("select outcome from inbox order by received_at").fetch_all(&service.db).await.unwrap();
    assert_eq!(outcomes, ["applied", "duplicate"], "the copy was not looked at a second time");
    service.until_count("select count(*) from outbox_archive", 2).await;
    assert_eq!(service.count("select count(*) from outbox_keys where last_seq = 2").await, 1, "one create, one delete");
    assert_eq!(
        service
            .count("select count(*) from saga_log where to_status = 'compensated' and from_status = 'running'")
            .await,
        1
    );
    service.stop().await;
}

/// A user-service that knows, or makes, or refuses, or is not there.
#[derive(Clone, Copy)]
pub enum Temper {
    Has,
    Makes,
    Refuses,
    IsBusy,
}

#[tonic::async_trait]
impl UserService for Temper {
    async fn get_user(&self, request: Request<GetUserRequest>) -> Result<Response<User>, Status> {
        match self {
            Temper::Has => Ok(Response::new(User { user_id: request.into_inner().user_id, ..User::default() })),
            Temper::IsBusy => Err(Status::unavailable("restarting")),
            Temper::Makes | Temper::Refuses => Err(Status::not_found("no profile")),
        }
    }

    async fn create_user(&self, request: Request<CreateUserRequest>) -> Result<Response<CreateUserResponse>, Status> {
        let request = request.into_inner();
        match self {
            Temper::Refuses => Err(Status::failed_precondition("region is blocked")),
            _ => Ok(Response::new(CreateUserResponse {
                user: Some(User {
                    user_id: request.user_id,
                    username: request.username,
                    email: request.email,
                    saga_id: request.saga_id,
                }),
            })),
        }
    }
}

pub async fn user_service(temper: Temper) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(
        tonic::transport::Server::builder()
            .add_service(UserServiceServer::new(temper))
            .serve_with_incoming(TcpListenerStream::new(listener)),
    );
    format!("http://{address}")
}

async fn silent(temper: Temper) -> (TestService, String) {
    let url = user_service(temper).await;
    let service = TestService::with_vars(&[
        ("USER_SERVICE_GRPC_URL", &url),
        ("SAGA_STEP_TIMEOUT", "1s"),
        ("SAGA_RESOLVE_BACKOFF", "1s"),
        ("SAGA_RESOLVE_ATTEMPTS", "2"),
    ])
    .await;
    let data = service.registered("ada").await;
    (service, data["sagaId"].as_str().unwrap().to_owned())
}

async fn evidence(service: &TestService) -> Value {
    sqlx::query_scalar("select to_jsonb(s) from saga_state s").fetch_one(&service.db).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_silence_the_user_service_is_asked_and_its_answer_closes_the_saga() {
    for (temper, status, users) in
        [(Temper::Has, "completed", 1), (Temper::Makes, "completed", 1), (Temper::Refuses, "compensated", 0)]
    {
        let (service, saga_id) = silent(temper).await;
        service.until_saga_is(&saga_id, status).await;
        assert_eq!(evidence(&service).await["evidence"], "back-check");
        assert_eq!(service.count("select count(*) from auth_users").await, users);
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn when_nobody_answers_the_saga_is_stuck_and_a_late_reply_still_settles_it() {
    let (service, saga_id) = silent(Temper::IsBusy).await;
    service.until_saga_is(&saga_id, "stuck").await;
    let saga = evidence(&service).await;
    assert!(saga["stuck_reason"].as_str().unwrap().contains("restarting"), "{saga}");
    assert_eq!(service.count("select count(*) from auth_users where status = 'pending'").await, 1);
    let id = saga["subject"].as_str().unwrap().to_owned();
    service.reply("user.create.done", &id, &[("saga-id", &saga_id)], json!({ "id": id })).await;
    service.until_saga_is(&saga_id, "completed").await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_nobody_to_ask_the_policy_decides_and_says_so() {
    for (policy, status, evidence_expected) in
        [("assume-completed", "completed", json!("assumption")), ("stuck", "stuck", Value::Null)]
    {
        let service = TestService::with_vars(&[("SAGA_STEP_TIMEOUT", "1s"), ("SAGA_SILENCE_POLICY", policy)]).await;
        let data = service.registered("ada").await;
        service.until_saga_is(data["sagaId"].as_str().unwrap(), status).await;
        assert_eq!(evidence(&service).await["evidence"], evidence_expected);
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_deadline_does_not_run_while_the_command_is_not_published() {
    let roles = [Role::Http, Role::Sagas];
    let service = TestService::with(crate::support::service::Wishes {
        roles: Some(roles.to_vec()),
        vars: vec![("SAGA_STEP_TIMEOUT", "1s".into()), ("SAGA_SILENCE_POLICY", "stuck".into())],
        ..Default::default()
    })
    .await;
    let data = service.registered("ada").await;
    let saga_id = data["sagaId"].as_str().unwrap();
    // Well past the step's time-out: the sweep has looked several times.
    tokio::time::sleep(std::time::Duration::from_secs(4)).await;
    assert_eq!(service.saga_status(saga_id).await, "running");
    assert_eq!(service.count("select count(*) from saga_state where deadline_at is null").await, 1);
    service.stop().await;
}

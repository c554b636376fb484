//! The main path, from the request to the closed saga.

use auth_service::app::Role;
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};

use crate::support::{TestService, service::registration};

/// Everything but the relay: what is committed stays where it is.
const WITHOUT_RELAY: [Role; 4] = [Role::Http, Role::Grpc, Role::Admin, Role::Sagas];

#[tokio::test(flavor = "multi_thread")]
async fn one_transaction_writes_user_session_saga_and_event() {
    let service = TestService::with_roles(&WITHOUT_RELAY).await;
    let data = service.registered("ada").await;
    assert_eq!(data["username"], "ada");
    assert_eq!(data["isVerified"], false);
    let xmins: Vec<String> = sqlx::query_scalar(
        "select xmin::text from auth_users union select xmin::text from refresh_tokens
         union select xmin::text from outbox union select xmin::text from saga_log",
    )
    .fetch_all(&service.db)
    .await
    .unwrap();
    assert_eq!(xmins.len(), 1, "one transaction made all rows: {xmins:?}");
    assert_eq!(service.count("select count(*) from auth_users where status = 'pending'").await, 1);
    assert_eq!(service.count("select count(*) from saga_state where status = 'running'").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_event_reaches_kafka_as_the_contract_says() {
    let service = TestService::start().await;
    let response = service
        .request(Method::POST, "/auth/register")
        .header("x-correlation-id", "shop-checkout-7")
        .header("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")
        .json(&registration("ada"))
        .send()
        .await
        .unwrap();
    assert_eq!(response.headers()["x-correlation-id"], "shop-checkout-7");
    let data = response.json::<Value>().await.unwrap()["data"].clone();
    let message = service.messages("user.create", 1).await.remove(0);

    let id = data["id"].as_i64().expect("id is a number");
    assert_eq!(message.key, id.to_string());
    assert_eq!(message.value["id"], id);
    assert_eq!(message.value["username"], "ada");
    assert_eq!(message.value["email"], "ada@example.com");
    assert_eq!(message.value["sagaId"], data["sagaId"]);
    assert_eq!(message.value["correlationId"], "shop-checkout-7");
    assert!(message.value["occurredAt"].is_string());
    let saga_id = data["sagaId"].as_str().unwrap();
    let expected = [
        ("correlationId", "shop-checkout-7"),
        ("sender", "auth-service"),
        ("ce_specversion", "1.0"),
        ("ce_source", "auth-service"),
        ("content-type", "application/json"),
        ("saga-id", saga_id),
        ("aggregate-seq", "1"),
        ("traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"),
    ];
    for (name, value) in expected {
        assert_eq!(message.header(name), value, "{name}");
    }
    assert_eq!(message.header("ce_subject"), message.key);
    assert!(message.header("ce_type").ends_with("user.create"));
    for name in ["ce_id", "ce_time", "causation-id"] {
        assert!(!message.header(name).is_empty(), "{name}");
    }
    assert!(!message.value.to_string().contains("secret"), "no password in the event");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_close_takes_the_user_back_and_frees_its_names() {
    let service = TestService::start().await;
    let data = service.registered("ada").await;
    let (id, saga_id) = (data["id"].to_string(), data["sagaId"].as_str().unwrap().to_owned());
    service.messages("user.create", 1).await;
    service
        .reply(
            "user.create.close",
            &id,
            &[("saga-id", &saga_id)],
            json!({ "id": data["id"], "reason": "blocked region" }),
        )
        .await;
    service.until_saga_is(&saga_id, "compensated").await;
    assert_eq!(service.count("select count(*) from auth_users").await, 0);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 0);
    let deleted = service.messages("user.delete", 1).await.remove(0);
    assert_eq!((deleted.key.as_str(), deleted.header("aggregate-seq")), (id.as_str(), "2"));

    let again = service.registered("ada").await;
    assert_ne!(again["id"], data["id"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_done_completes_the_saga_and_activates_the_user() {
    let service = TestService::start().await;
    let data = service.registered("ada").await;
    let saga_id = data["sagaId"].as_str().unwrap();
    service
        .reply("user.create.done", &data["id"].to_string(), &[("saga-id", saga_id)], json!({ "id": data["id"] }))
        .await;
    service.until_saga_is(saga_id, "completed").await;
    assert_eq!(service.count("select count(*) from auth_users where status = 'active'").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_original_user_service_answers_on_saga_reply() {
    let service = TestService::start().await;
    for (username, status, expected) in [("ada", "ok", "completed"), ("bob", "error", "compensated")] {
        let data = service.registered(username).await;
        let saga_id = data["sagaId"].as_str().unwrap();
        let correlation: String = sqlx::query_scalar("select correlation_id from saga_state where saga_id = $1::uuid")
            .bind(saga_id)
            .fetch_one(&service.db)
            .await
            .unwrap();
        let headers = [("correlationId", correlation.as_str()), ("service", "user-service")];
        service.reply("saga-reply", "k", &headers, json!({ "from": "user-service", "status": status })).await;
        service.until_saga_is(saga_id, expected).await;
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn kafka_being_down_never_fails_a_registration() {
    let service = TestService::with_vars(&[("KAFKA_BROKERS", "127.0.0.1:1")]).await;
    for n in 0..5 {
        service.registered(&format!("user{n}")).await;
    }
    assert_eq!(service.count("select count(*) from outbox").await, 5);
    assert_eq!(service.request(Method::GET, "/auth/health/ready").send().await.unwrap().status(), StatusCode::OK);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_fifty_equal_registrations_at_once_one_wins_and_one_event_is_written() {
    let service = TestService::with_roles(&WITHOUT_RELAY).await;
    let all = (0..50).map(|_| service.register("ada"));
    let mut statuses: Vec<u16> = futures_join(all).await.iter().map(|response| response.status().as_u16()).collect();
    statuses.sort_unstable();
    assert_eq!(statuses[0], 201);
    assert!(statuses[1..].iter().all(|status| *status == 409), "{statuses:?}");
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    assert_eq!(service.count("select count(*) from auth_users").await, 1);
    service.stop().await;
}

async fn futures_join<F: Future>(futures: impl Iterator<Item = F>) -> Vec<F::Output> {
    futures_util::future::join_all(futures).await
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_differ_only_in_case_are_one() {
    let service = TestService::with_roles(&WITHOUT_RELAY).await;
    service.registered("ada").await;
    let taken = service
        .post(
            "/auth/register",
            json!({ "username": "Ada", "email": "other@example.com", "password": "a long enough secret" }),
        )
        .await;
    assert_eq!(taken.status(), 409);
    assert_eq!(taken.json::<Value>().await.unwrap()["errorCode"], "USERNAME_ALREADY_EXISTS");
    let taken = service
        .post(
            "/auth/register",
            json!({ "username": "other", "email": "ADA@Example.com", "password": "a long enough secret" }),
        )
        .await;
    assert_eq!(taken.json::<Value>().await.unwrap()["errorCode"], "EMAIL_ALREADY_EXISTS");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_repeated_request_with_its_idempotency_key_gets_the_first_answer() {
    let service = TestService::with_roles(&WITHOUT_RELAY).await;
    let ask = async |body: Value| {
        let request = service.request(Method::POST, "/auth/register").header("idempotency-key", "form-1");
        request.json(&body).send().await.unwrap()
    };
    let first = ask(registration("ada")).await;
    assert_eq!(first.status(), 201);
    let first: Value = first.json().await.unwrap();
    let second = ask(registration("ada")).await;
    assert_eq!(second.status(), 201);
    assert!(second.headers().get_all("set-cookie").iter().count() == 2);
    let second: Value = second.json().await.unwrap();
    assert_eq!(first["data"], second["data"]);
    let mut stranger = registration("ada");
    stranger["password"] = json!("another long secret");
    assert_eq!(ask(stranger).await.status(), 409, "the key alone opens nothing");
    assert_eq!(service.count("select count(*) from auth_users").await, 1);
    assert_eq!(service.count("select count(*) from outbox").await, 1);
    service.stop().await;
}

//! The operators' port beside a relay that runs: what it shows is true, and what it does happens.

use std::collections::BTreeMap;

use chrono::{DateTime, Utc};
use outbox_relay::{NewMessage, append};
use reqwest::Method;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{
    TestService, eventually,
    service::{ADMIN_TOKEN, READ_TOKEN},
};

async fn get(service: &TestService, path: &str) -> Value {
    let response = service.admin(Method::GET, path, READ_TOKEN).await.send().await.expect("an answer");
    assert_eq!(response.status(), 200, "{path}");
    response.json::<Value>().await.expect("JSON")["data"].clone()
}

async fn post(service: &TestService, path: &str, body: Value) -> Value {
    let response = service.admin(Method::POST, path, ADMIN_TOKEN).await.json(&body).send().await.expect("an answer");
    let (status, body) = (response.status(), response.json::<Value>().await.expect("JSON"));
    assert_eq!(status, 200, "{path}: {body}");
    body["data"].clone()
}

/// The figure with exactly this name and these labels.
async fn figure(service: &TestService, name: &str) -> f64 {
    let text = service.client.get(format!("{}/metrics", service.admin)).send().await.unwrap().text().await.unwrap();
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.unwrap_or_else(|| panic!("{name} is not in\n{text}")).parse().expect("a number")
}

async fn until_figure(service: &TestService, name: &str, expected: f64) {
    eventually(&format!("{name} is {expected}"), || async {
        ((figure(service, name).await - expected).abs() < f64::EPSILON).then_some(())
    })
    .await;
}

/// Waits until the relay has looked twice more whether it is paused: it does so when it renews its
/// lease.
async fn two_renewals(service: &TestService) {
    let lease = async || -> DateTime<Utc> {
        let status = get(service, "/admin/relay").await;
        status["relays"][0]["leaseUntil"].as_str().expect("a relay").parse().expect("a time")
    };
    for _ in 0..2 {
        let before = lease().await;
        eventually("the relay renews its lease", || async { (lease().await > before).then_some(()) }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_relay_sends_nothing_and_after_resume_everything() {
    let service = TestService::start().await;
    service.registered("ada").await;
    service.messages("user.create", 1).await;
    let status = get(&service, "/admin/relay").await;
    let owner = &status["relays"][0];
    assert_eq!((&status["pausedAt"], &owner["lanes"]), (&Value::Null, &json!(64)));
    assert!(status["lanes"].as_array().unwrap().iter().all(|lane| lane["owner"] == owner["id"]));

    post(&service, "/admin/relay/pause", json!({ "reason": "broker upgrade" })).await;
    two_renewals(&service).await;
    for name in ["bob", "eve"] {
        service.registered(name).await;
    }
    two_renewals(&service).await;
    assert_eq!(service.messages("user.create", 1).await.len(), 1, "nothing more is sent");
    until_figure(&service, "auth_outbox_pending", 2.0).await;
    until_figure(&service, "auth_sagas{name=\"create_user\",status=\"running\"}", 3.0).await;
    let status = get(&service, "/admin/relay").await;
    let pending: i64 = status["lanes"].as_array().unwrap().iter().map(|lane| lane["pending"].as_i64().unwrap()).sum();
    assert_eq!((pending, &status["figures"]["pending"], &status["pausedBy"]), (2, &json!(2), &json!("root")));
    // The age is the oldest row's, by the database's own clock.
    let age = async || -> f64 {
        sqlx::query_scalar("select extract(epoch from clock_timestamp() - min(created_at))::float8 from outbox")
            .fetch_one(&service.db)
            .await
            .unwrap()
    };
    // A scrape answers for two seconds.
    let (at_least, shown) = (age().await - 2.0, figure(&service, "auth_outbox_oldest_unsent_seconds").await);
    assert!((at_least..=age().await).contains(&shown), "{at_least} <= {shown}");

    post(&service, "/admin/relay/resume", json!({ "reason": "upgraded" })).await;
    assert_eq!(service.messages("user.create", 3).await.len(), 3);
    until_figure(&service, "auth_outbox_pending", 0.0).await;
    until_figure(&service, "auth_outbox_oldest_unsent_seconds", 0.0).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_published_row_is_sent_again_under_its_old_id() {
    let service = TestService::start().await;
    let user = service.registered("ada").await;
    let first = service.messages("user.create", 1).await.remove(0);
    let row = service.until_published(&user["id"].to_string()).await;
    let path = format!("/admin/outbox/{row}/replay");
    let dry = post(&service, &path, json!({ "reason": "a consumer lost it", "dryRun": true })).await;
    assert_eq!((&dry["dryRun"], &dry["replayOf"]), (&json!(true), &json!(row)));
    post(&service, &path, json!({ "reason": "a consumer lost it" })).await;
    let both = service.messages("user.create", 2).await;
    assert_eq!(both.len(), 2, "the dry run sent nothing");
    let again = both.into_iter().find(|seen| seen.offset != first.offset || seen.partition != first.partition).unwrap();
    assert_eq!((&again.key, &again.value, again.header("ce_id")), (&first.key, &first.value, first.header("ce_id")));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_sent_is_counted_shown_and_goes_out_when_it_is_replayed() {
    let service = TestService::start().await;
    let topic = service.topic("load");
    let message = |n: usize, size: usize| NewMessage {
        id: Uuid::now_v7(),
        topic: topic.clone(),
        key: "order 7".to_owned(),
        source: "test".to_owned(),
        payload: json!({ "n": n, "filler": "x".repeat(size) }).to_string().into_bytes(),
        content_type: "application/json",
        headers: BTreeMap::new(),
        saga_id: None,
    };
    crate::support::parts::PARTS.create_topics(std::slice::from_ref(&topic)).await;
    for (n, size) in [(1, 1), (2, 3_000_000), (3, 1)] {
        let mut tx = service.db.begin().await.unwrap();
        append(&mut tx, &message(n, size)).await.unwrap();
        tx.commit().await.unwrap();
    }
    // The third waits behind the second.
    until_figure(&service, "auth_outbox_parked", 2.0).await;
    until_figure(&service, "auth_outbox_parked_keys", 1.0).await;
    until_figure(&service, "auth_outbox_pending", 0.0).await;
    let parked = get(&service, "/admin/outbox?status=parked&key=order%207").await;
    assert_eq!(parked.as_array().unwrap().len(), 2);
    assert!(parked[1]["reason"].as_str().unwrap().to_lowercase().contains("too large"), "{}", parked[1]["reason"]);
    assert_eq!(service.messages("load", 1).await.len(), 1);

    // What made it impossible is mended.
    let small = json!({ "n": 2 }).to_string().into_bytes();
    sqlx::query("update outbox_parked set payload = $1 where length(payload) > 1000")
        .bind(small)
        .execute(&service.db)
        .await
        .unwrap();
    let done = post(&service, "/admin/outbox/replay", json!({ "reason": "cut", "filter": { "topic": topic } })).await;
    assert_eq!(done["replayed"][0]["rows"].as_array().unwrap().len(), 2, "the one behind it goes along: {done}");
    let numbers: Vec<_> = service.messages("load", 3).await.iter().map(|seen| seen.value["n"].clone()).collect();
    assert_eq!(numbers, [json!(1), json!(2), json!(3)]);
    until_figure(&service, "auth_outbox_parked", 0.0).await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_timeline_of_a_saga_tells_how_it_ended() {
    let service = TestService::start().await;
    let user = service.registered("ada").await;
    let (id, saga_id) = (user["id"].to_string(), user["sagaId"].as_str().unwrap());
    service.messages("user.create", 1).await;
    let refusal = json!({ "id": user["id"], "reason": "blocked region" });
    service.reply("user.create.close", &id, &[("saga-id", saga_id)], refusal).await;
    service.until_saga_is(saga_id, "compensated").await;
    let saga = get(&service, &format!("/admin/sagas/{saga_id}")).await;
    assert_eq!(
        (&saga["status"], &saga["evidence"], &saga["subject"]),
        (&json!("compensated"), &json!("reply"), &json!(id))
    );
    let timeline = saga["timeline"].as_array().unwrap();
    let revisions: Vec<_> = timeline.iter().map(|event| event["revision"].as_i64().unwrap()).collect();
    assert!(revisions.is_sorted() && timeline.len() >= 2, "{timeline:?}");
    assert_eq!(
        (&timeline[0]["event"], &timeline.last().unwrap()["toStatus"]),
        (&json!("started"), &json!("compensated"))
    );
    assert!(saga.to_string().contains("blocked region"), "{saga}");
    for (filter, found) in [("status=compensated", 1), ("status=running", 0), (&format!("userId={id}") as &str, 1)] {
        assert_eq!(get(&service, &format!("/admin/sagas?{filter}")).await.as_array().unwrap().len(), found, "{filter}");
    }
    until_figure(&service, "auth_sagas{name=\"create_user\",status=\"running\"}", 0.0).await;
    service.stop().await;
}

impl TestService {
    /// The row of a key's one event, once it is in the archive.
    pub async fn until_published(&self, key: &str) -> i64 {
        eventually(&format!("the event of {key} is out"), || async {
            sqlx::query_scalar("select id from outbox_archive where key = $1")
                .bind(key)
                .fetch_optional(&self.db)
                .await
                .expect("the archive")
        })
        .await
    }
}

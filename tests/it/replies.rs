//! What other services may put on a reply topic, and that all of it leaves a trace and nothing stops reading.

use std::time::Duration;

use auth_service::app::Role;
use chrono::Utc;
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer},
};
use reqwest::Method;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::{
    sagas::{Temper, user_service},
    support::{
        TestService, eventually,
        parts::PARTS,
        raw_kafka::{RawProducer, RawRecord},
        service::{Wishes, registration},
    },
};

const CLOSE: &str = "user.create.close";

/// Registers somebody, and answers with the id and the saga.
async fn registered(service: &TestService, name: &str) -> (String, String) {
    let data = service.registered(name).await;
    (data["id"].to_string(), data["sagaId"].as_str().unwrap().to_owned())
}

async fn rows(service: &TestService) -> Vec<Value> {
    sqlx::query_scalar("select to_jsonb(i) from inbox i order by received_at").fetch_all(&service.db).await.unwrap()
}

/// Everything goes to one partition: each message stands in front of the next.
async fn producer(service: &TestService) -> RawProducer {
    RawProducer::connect(&PARTS.brokers(), &service.topic(CLOSE)).await
}

fn record<'a>(headers: &[(&'a str, &'a str)], value: &'a str) -> RawRecord<'a> {
    record_of(0, headers, value)
}

/// Written so many seconds ago.
fn record_of<'a>(seconds: i64, headers: &[(&'a str, &'a str)], value: &'a str) -> RawRecord<'a> {
    let headers = headers.iter().map(|(name, value)| (name.as_bytes(), Some(value.as_bytes())));
    let timestamp = Utc::now().timestamp_millis() - seconds * 1000;
    RawRecord { value: Some(value.as_bytes()), headers: headers.collect(), timestamp, ..RawRecord::default() }
}

/// A good refusal behind everything else: once it has taken effect, everything before it was taken in.
async fn refuse_behind(service: &TestService, producer: &mut RawProducer, saga_id: &str) {
    producer.send(&record(&[("saga-id", saga_id)], "{}")).await;
    service.until_saga_is(saga_id, "compensated").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_header_name_that_is_not_utf_8_costs_that_header_alone() {
    let service = TestService::start().await;
    let mut producer = producer(&service).await;
    let (id, first) = registered(&service, "ada").await;
    let (_, second) = registered(&service, "bob").await;
    let junk = vec![(b"\xff\xfe".as_slice(), Some(b"1".as_slice())), (b"ok", Some(b"2")), (b"\xc3\x28", None)];
    producer.send(&RawRecord { value: Some(b"junk"), headers: junk.clone(), ..RawRecord::default() }).await;
    let good = format!(r#"{{"id":{id}}}"#);
    producer.send(&RawRecord { headers: junk, ..record(&[], &good) }).await;
    service.until_saga_is(&first, "compensated").await;
    refuse_behind(&service, &mut producer, &second).await;

    let rows = rows(&service).await;
    assert_eq!(rows.len(), 3, "{rows:#?}");
    let headers = json!([{ "name": "ok", "text": "2" }, { "name": null }, { "name": null }]);
    for (row, outcome, value) in [(&rows[0], "rejected", "\\x6a756e6b"), (&rows[1], "applied", "\\x7b226964")] {
        assert_eq!(row["outcome"], outcome, "{row}");
        assert!(row["detail"].as_str().unwrap().contains("names of headers that are not UTF-8: 2"), "{row}");
        assert!(row["raw_payload"].as_str().unwrap().starts_with(value), "{row}");
        assert_eq!(row["raw_headers"], headers, "{row}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_part_of_a_message_stops_the_partition_and_each_is_kept_byte_for_byte() {
    let service = TestService::start().await;
    let mut producer = producer(&service).await;
    let (_, saga_id) = registered(&service, "ada").await;
    let deep = format!("{{\"id\":{}}}", "[".repeat(900_000));
    let deep_inside = format!("{{\"id\":1001,\"x\":{}{}}}", "[".repeat(200_000), "]".repeat(200_000));
    let many: Vec<(&[u8], Option<&[u8]>)> = (0..5000).map(|_| (b"n".as_slice(), Some(b"v".as_slice()))).collect();
    let long = "x".repeat(900_000);
    let bare = |value: &'static [u8]| RawRecord { value: Some(value), ..RawRecord::default() };
    let messages = [
        ("no value", RawRecord::default()),
        ("no value", RawRecord { key: Some(b"\xff\x00"), ..RawRecord::default() }),
        ("no value", bare(b"")),
        ("not JSON", bare(b"\xff\xfe{\x00}\x00")),
        ("not JSON", bare(b"{\"id\":1e999}")),
        ("not JSON", bare(b"{\"id\":\"\\ud800\"}")),
        ("not JSON", RawRecord { value: Some(deep.as_bytes()), ..RawRecord::default() }),
        ("no open saga is about user 1001", RawRecord { value: Some(deep_inside.as_bytes()), ..RawRecord::default() }),
        ("no open saga is about user 1007", bare(b"\xef\xbb\xbf{\"id\":1007.0}")),
        ("no open saga is about user -7", bare(b"{\"id\":-7}")),
        ("whole number", bare(b"{\"id\":7.5}")),
        ("whole number", bare(b"{\"id\":99999999999999999999}")),
        ("duplicate field `id`", bare(b"{\"id\":1,\"id\":2}")),
        ("not a JSON object", bare(b"[1,2]")),
        (
            "no open saga is about user 1002",
            RawRecord { value: Some(b"{\"id\":1002}"), headers: many, ..RawRecord::default() },
        ),
        (
            "no open saga is about user 1003",
            RawRecord {
                value: Some(b"{\"id\":1003}"),
                headers: vec![(b"", Some(b"")), (b"", None), (b"null", None), (b"nul", Some(b"a\0b"))],
                ..RawRecord::default()
            },
        ),
        (
            "not text",
            RawRecord { value: Some(b"{}"), headers: vec![(b"saga-id", Some(b"\xff"))], ..RawRecord::default() },
        ),
        (
            "they disagree",
            RawRecord {
                value: Some(b"{}"),
                headers: vec![(b"correlationId", Some(b"a")), (b"correlationId", Some(b"b"))],
                ..RawRecord::default()
            },
        ),
        (
            "no saga has the correlation id",
            RawRecord {
                value: Some(b"{}"),
                headers: vec![(b"correlationId", Some(long.as_bytes()))],
                ..RawRecord::default()
            },
        ),
        (
            "no open saga is about user 1004",
            RawRecord {
                value: Some(b"{\"id\":1004}"),
                headers: vec![(b"ce_id", Some(long.as_bytes())), (b"ce_source", Some(b"\xff"))],
                ..RawRecord::default()
            },
        ),
        (
            "no open saga is about user 1005",
            RawRecord { value: Some(b"{\"id\":1005}"), timestamp: -1, ..RawRecord::default() },
        ),
        (
            "no open saga is about user 1006",
            RawRecord { value: Some(b"{\"id\":1006}"), timestamp: -5000, ..RawRecord::default() },
        ),
    ];
    let mut offsets = vec![];
    for (_, message) in &messages {
        offsets.push(producer.send(message).await);
    }
    refuse_behind(&service, &mut producer, &saga_id).await;

    for (offset, (detail, message)) in offsets.into_iter().zip(messages) {
        type Row = (String, String, Option<Vec<u8>>, Option<Vec<u8>>, Value);
        let row: Option<Row> = sqlx::query_as(
            "select outcome, detail, raw_key, raw_payload, raw_headers from inbox where \"offset\" = $1 and detail is not null",
        )
        .bind(offset)
        .fetch_optional(&service.db)
        .await
        .unwrap();
        let (outcome, said, key, value, headers) = row.unwrap_or_else(|| panic!("{detail:?} has no row"));
        assert!(["rejected", "unknown"].contains(&outcome.as_str()), "{outcome}");
        assert!(said.contains(detail), "{detail:?} is not in {said:?}");
        assert!(said.len() < 1100, "a reason is cut");
        assert_eq!((key.as_deref(), value.as_deref()), (message.key, message.value), "{detail:?}");
        assert_eq!(headers.as_array().unwrap().len(), message.headers.len(), "{detail:?}");
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_id_is_burnt_only_by_what_took_effect() {
    let service = TestService::start().await;
    let mut producer = producer(&service).await;
    let (_, ada) = registered(&service, "ada").await;
    let (_, bob) = registered(&service, "bob").await;
    let mut send = async |saga: &str, value: &str| {
        let headers = [("ce_id", "one"), ("ce_source", "user-service"), ("saga-id", saga)];
        producer.send(&record(&headers, value)).await;
    };
    send(&ada, "junk").await;
    send(&ada, "{}").await;
    service.until_saga_is(&ada, "compensated").await;
    // The same id again: another saga, and other bytes.
    send(&bob, "{}").await;
    send(&ada, r#"{"reason":"other bytes"}"#).await;
    service.until_count("select count(*) from inbox where detail like '%id reused%'", 2).await;
    assert_eq!(service.saga_status(&bob).await, "running");
    let outcomes: Vec<(String, Option<Vec<u8>>)> =
        sqlx::query_as("select outcome, raw_payload from inbox order by received_at")
            .fetch_all(&service.db)
            .await
            .unwrap();
    let told: Vec<(&str, Option<&[u8]>)> =
        outcomes.iter().map(|(outcome, bytes)| (outcome.as_str(), bytes.as_deref())).collect();
    assert_eq!(
        told,
        [
            ("rejected", Some(b"junk".as_slice())),
            ("applied", None),
            ("unexpected", Some(b"{}")),
            ("unexpected", Some(br#"{"reason":"other bytes"}"#)),
        ]
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_again_is_counted_and_makes_no_row_and_no_line() {
    let service = TestService::start().await;
    let mut producer = producer(&service).await;
    let (id, ada) = registered(&service, "ada").await;
    let (_, bob) = registered(&service, "bob").await;
    let unknown = Uuid::now_v7().to_string();
    let trace = |n: usize| format!("00-0af7651916cd43dd8448eb211c80319c-b7ad6b716920333{n}-01");
    for n in 0..3 {
        for (headers, payload) in [
            // Junk with an id and without one, an unknown saga, a copy of what takes effect, and what comes late.
            (vec![("ce_id", "junk")], "junk".to_owned()),
            (vec![], "junk".to_owned()),
            (vec![("saga-id", unknown.as_str())], "{}".to_owned()),
            (vec![("saga-id", ada.as_str()), ("ce_id", "good")], format!(r#"{{"id":{id}}}"#)),
            (vec![("saga-id", ada.as_str())], r#"{"reason":"again"}"#.to_owned()),
        ] {
            let traceparent = trace(n);
            let headers = [headers, vec![("traceparent", traceparent.as_str())]].concat();
            producer.send(&record(&headers, &payload)).await;
        }
    }
    refuse_behind(&service, &mut producer, &bob).await;
    let rows: Vec<(String, i64)> = sqlx::query_as(
        "select outcome, copies from inbox where saga_id is distinct from $1::uuid order by received_at",
    )
    .bind(&bob)
    .fetch_all(&service.db)
    .await
    .unwrap();
    let told: Vec<(&str, i64)> = rows.iter().map(|(outcome, copies)| (outcome.as_str(), *copies)).collect();
    assert_eq!(told, [("rejected", 2), ("rejected", 2), ("unknown", 2), ("applied", 2), ("duplicate", 2)]);
    let lines = "select count(*) from saga_log l join saga_state s using (saga_id) where event = 'replied' and s.subject = (select min(subject::int)::text from saga_state)";
    assert_eq!(service.count(lines).await, 2, "one for the refusal, one for the first that said it again");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_reply_topic_is_named_in_readiness_and_metrics_until_it_exists() {
    let wishes = Wishes { no_topics: true, roles: Some(Role::ALL.to_vec()), ..Wishes::default() };
    let service = TestService::with(wishes).await;
    let topics = ["user.create.close", "user.create.done", "user.delete.done", "user.delete.close"];
    PARTS.create_topics(&topics.map(|topic| service.topic(topic))).await;
    let missing = service.topic("saga-reply");
    service
        .until_detail("topic-missing", |said| said.is_some_and(|said| said.ends_with(&format!(": {missing}"))))
        .await;
    PARTS.create_topics(&[missing]).await;
    service.until_detail("topic-missing", |said| said.is_none()).await;
    service.stop().await;
}

const HOUR: i64 = 3600;

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_that_names_no_id_of_ours_must_not_be_older_than_its_saga() {
    let service = TestService::start().await;
    let mut producer = producer(&service).await;
    let by_client = service
        .request(Method::POST, "/auth/register")
        .header("x-correlation-id", "mine")
        .json(&registration("ada"))
        .send()
        .await
        .unwrap();
    assert_eq!(by_client.status(), 201);
    let ada: Value = by_client.json().await.unwrap();
    let (ada, ada_id) = (ada["data"]["sagaId"].as_str().unwrap().to_owned(), ada["data"]["id"].to_string());
    let (_, bob) = registered(&service, "bob").await;
    let (_, cyd) = registered(&service, "cyd").await;
    let made: String = sqlx::query_scalar("select correlation_id from saga_state where saga_id = $1::uuid")
        .bind(&bob)
        .fetch_one(&service.db)
        .await
        .unwrap();

    let by_id = format!(r#"{{"id":{ada_id}}}"#);
    producer.send(&record_of(2 * HOUR, &[], &by_id)).await;
    producer.send(&record_of(2 * HOUR, &[("correlationId", "mine")], "{}")).await;
    producer.send(&record_of(2 * HOUR, &[("correlationId", &made)], "{}")).await;
    producer.send(&record_of(2 * HOUR, &[("saga-id", &cyd)], "{}")).await;
    service.until_saga_is(&cyd, "compensated").await;
    assert_eq!(service.saga_status(&bob).await, "compensated", "we made that correlation id");
    assert_eq!(service.saga_status(&ada).await, "running");
    let old = "select count(*) from inbox where outcome = 'unexpected' and detail like '%older than the only saga%'
                                            and kafka_at < now() - interval '1 hour'";
    assert_eq!(service.count(old).await, 2);
    producer.send(&record(&[("correlationId", "mine")], "{}")).await;
    service.until_saga_is(&ada, "compensated").await;
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_that_may_be_older_is_asked_about_and_with_nobody_to_ask_makes_the_saga_stuck() {
    let url = user_service(Temper::Has).await;
    for (vars, status) in [(vec![("USER_SERVICE_GRPC_URL", url.as_str())], "completed"), (vec![], "stuck")] {
        let service = TestService::with_vars(&vars).await;
        let mut producer = producer(&service).await;
        let (ada_id, ada) = registered(&service, "ada").await;
        let (bob_id, bob) = registered(&service, "bob").await;
        // Within the tolerance; and without a time.
        producer.send(&record_of(30, &[], &format!(r#"{{"id":{ada_id}}}"#))).await;
        producer.send(&RawRecord { timestamp: -1, ..record(&[], &format!(r#"{{"id":{bob_id}}}"#)) }).await;
        service.until_saga_is(&ada, status).await;
        service.until_saga_is(&bob, status).await;
        assert_eq!(service.count("select count(*) from auth_users").await, 2);
        let asked = "select count(*) from inbox where detail like '%asked about%' and raw_payload is not null";
        assert_eq!(service.count(asked).await, 2);
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_group_begins_at_its_oldest_open_saga_and_without_one_at_the_end() {
    if PARTS.is_embedded() {
        // It looks nothing up by time.
        return;
    }
    for open in [true, false] {
        let service = TestService::with_roles(&[Role::Http]).await;
        let mut producer = producer(&service).await;
        for n in 0..20 {
            producer.send(&record_of(2 * HOUR, &[], &format!(r#"{{"id":{n}}}"#))).await;
        }
        let waiting = if open { Some(registered(&service, "ada").await.1) } else { None };
        if let Some(ada) = &waiting {
            producer.send(&record(&[("saga-id", ada)], "{}")).await;
        }
        let wishes = Wishes { roles: Some(vec![Role::Sagas]), beside: service.beside(), ..Wishes::default() };
        let beside = TestService::with(wishes).await;
        let group = format!("{}auth", service.prefix);
        eventually("the group has an offset", || async {
            let (group, topic) = (group.clone(), service.topic(CLOSE));
            tokio::task::spawn_blocking(move || committed(&group, &topic)).await.unwrap()
        })
        .await;
        let (_, bob) = registered(&service, "bob").await;
        refuse_behind(&service, &mut producer, &bob).await;
        if let Some(ada) = &waiting {
            assert_eq!(service.saga_status(ada).await, "compensated");
        }
        assert_eq!(service.count("select count(*) from inbox").await, 1 + i64::from(open), "nothing old was read");
        beside.stop().await;
        service.stop().await;
    }
}

/// The offset a group has committed in partition 0.
fn committed(group: &str, topic: &str) -> Option<i64> {
    let client: BaseConsumer =
        ClientConfig::new().set("bootstrap.servers", PARTS.brokers()).set("group.id", group).create().unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition(topic, 0);
    let committed = client.committed_offsets(list, Duration::from_secs(10)).ok()?;
    match committed.find_partition(topic, 0)?.offset() {
        Offset::Offset(offset) => Some(offset),
        _ => None,
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn brokers_that_are_away_are_named_in_readiness() {
    let vars = vec![("KAFKA_BROKERS", "127.0.0.1:1".to_owned())];
    let roles = Some(vec![Role::Http, Role::Sagas]);
    let service = TestService::with(Wishes { vars, roles, no_topics: true, ..Wishes::default() }).await;
    service.until_detail("brokers-away", |said| said.is_some_and(|said| said.contains("KAFKA_BROKERS"))).await;
    let ready = service.request(Method::GET, "/auth/health/ready").send().await.unwrap();
    assert_eq!(ready.status(), 200, "requests are served without brokers");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_group_that_cant_be_joined_is_named_in_readiness_until_it_can() {
    if PARTS.is_embedded() {
        // It knows no group protocols.
        return;
    }
    let first = TestService::with_roles(&[Role::Http]).await;
    let group = format!("{}auth", first.prefix);
    // Somebody else has the group, and divides it in a way we don't know.
    let (close, stop) = (first.topic(CLOSE), CancellationToken::new());
    let (stopped, joined) = (stop.clone(), CancellationToken::new());
    let has_joined = joined.clone();
    let stranger = tokio::task::spawn_blocking(move || {
        let other: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", PARTS.brokers())
            .set("group.id", group)
            .set("partition.assignment.strategy", "range")
            .create()
            .unwrap();
        other.subscribe(&[&close]).unwrap();
        while !stopped.is_cancelled() {
            let _ = other.poll(Duration::from_millis(50));
            if other.assignment().is_ok_and(|assigned| assigned.count() > 0) {
                has_joined.cancel();
            }
        }
    });
    joined.cancelled().await;
    let wishes = Wishes { roles: Some(vec![Role::Http, Role::Sagas]), beside: first.beside(), ..Wishes::default() };
    let service = TestService::with(wishes).await;
    service.until_detail("group-not-joined", |said| said.is_some_and(|said| said.contains("KAFKA_GROUP_ID"))).await;
    stop.cancel();
    stranger.await.unwrap();
    service.until_detail("group-not-joined", |said| said.is_none()).await;
    let (_, ada) = registered(&service, "ada").await;
    refuse_behind(&service, &mut producer(&service).await, &ada).await;
    service.stop().await;
    first.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reply_waits_for_the_database_and_readiness_says_so() {
    let service = TestService::start().await;
    let mut producer = producer(&service).await;
    let (_, ada) = registered(&service, "ada").await;
    service.cut_database().await;
    producer.send(&record(&[("saga-id", &ada)], "{}")).await;
    service.until_detail("reply-waits", |said| said.is_some_and(|said| said.contains("offset 0"))).await;
    service.mend_database().await;
    service.until_saga_is(&ada, "compensated").await;
    service.until_detail("reply-waits", |said| said.is_none()).await;
    assert_eq!(service.count("select count(*) from inbox where outcome = 'applied'").await, 1);
    service.stop().await;
}

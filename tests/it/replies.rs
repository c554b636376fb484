//! What other services may put on a reply topic, and that all of it leaves a trace and nothing stops reading.

use auth_service::app::Role;
use serde_json::{Value, json};
use uuid::Uuid;

use crate::support::{
    TestService,
    parts::PARTS,
    raw_kafka::{RawProducer, RawRecord},
    service::Wishes,
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
    let headers = headers.iter().map(|(name, value)| (name.as_bytes(), Some(value.as_bytes())));
    RawRecord { value: Some(value.as_bytes()), headers: headers.collect(), ..RawRecord::default() }
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
    producer.send(&RawRecord { value: Some(good.as_bytes()), headers: junk, ..RawRecord::default() }).await;
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

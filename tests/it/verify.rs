//! `outbox verify`: what the relay did is proven, and nothing that is not so.

mod limits;
mod positions;

use std::{collections::BTreeMap, time::Duration};

use auth_service::app::Role;
use chrono::{TimeDelta, Utc};
use outbox_relay::{NewMessage, append, replay};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions},
    client::DefaultClientContext,
    message::{Header, OwnedHeaders},
    producer::{BaseProducer, BaseRecord, Producer},
};
use serde_json::{Value, json};
use sqlx::AssertSqlSafe;
use uuid::Uuid;

use crate::support::{
    TestService,
    kafka::{self, Seen, send_to},
    parts::PARTS,
    process::run,
};

/// Nine messages of three keys that went through the relay, in a topic of their own.
struct Traffic {
    service: TestService,
    topic: String,
}

/// The exit code and the report.
type Verified = (i32, Value);

impl Traffic {
    async fn new() -> Self {
        let service = TestService::with_roles(&[Role::Relay]).await;
        let topic = service.topic("load");
        PARTS.create_topics(std::slice::from_ref(&topic)).await;
        let traffic = Self { service, topic };
        for n in 1..=3 {
            for key in ["a", "b", "c"] {
                traffic.append(key, n).await;
            }
        }
        traffic.service.until_count("select count(*) from outbox_archive", 9).await;
        traffic
    }

    async fn append(&self, key: &str, n: i32) {
        let message = NewMessage {
            id: Uuid::now_v7(),
            topic: self.topic.clone(),
            key: key.to_owned(),
            source: "test".to_owned(),
            payload: json!({ "n": n, "secret": "hush" }).to_string().into_bytes(),
            content_type: "application/json",
            headers: BTreeMap::new(),
            saga_id: None,
        };
        let mut tx = self.service.db.begin().await.unwrap();
        append(&mut tx, &message).await.unwrap();
        tx.commit().await.unwrap();
    }

    /// Nothing but the database and Kafka: no keys, no tokens.
    fn vars(&self) -> Vec<(String, String)> {
        vars(&PARTS.database_url(&self.service.database), &self.service.prefix)
    }

    async fn verify(&self) -> Verified {
        let (code, said, complaint) = run(&["outbox", "verify", "--from", "1h", "--json"], &self.vars()).await;
        (code, serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}{complaint}")))
    }

    async fn sql(&self, sql: &str) -> u64 {
        sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&self.service.db).await.expect(sql).rows_affected()
    }

    async fn first_of(&self, key: &str) -> Seen {
        let all = kafka::read_all(&PARTS.brokers(), std::slice::from_ref(&self.topic)).await;
        all.into_iter().find(|seen| seen.key == key).expect("a message")
    }

    /// The same message once more, as a relay sends it that died before it could archive it.
    async fn send_again(&self, seen: &Seen) -> i64 {
        let headers: Vec<_> = seen.headers.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
        let place = (self.topic.as_str(), seen.partition);
        send_to(&PARTS.brokers(), place, &seen.key, &headers, seen.value.to_string().as_bytes()).await
    }
}

fn vars(database_url: &str, prefix: &str) -> Vec<(String, String)> {
    let database_url = database_url.to_owned();
    [("DATABASE_URL", database_url), ("KAFKA_BROKERS", PARTS.brokers()), ("KAFKA_TOPIC_PREFIX", prefix.to_owned())]
        .map(|(name, value)| (name.to_owned(), value))
        .to_vec()
}

/// Every figure that is not zero, but for those that every run has.
fn totals(report: &Value) -> BTreeMap<String, u64> {
    let all: BTreeMap<String, u64> = serde_json::from_value(report["totals"].clone()).expect("figures");
    let plain = ["rows", "messages", "outside"];
    all.into_iter().filter(|(name, count)| *count > 0 && !plain.contains(&name.as_str())).collect()
}

fn figures<const N: usize>(expected: [(&str, u64); N]) -> BTreeMap<String, u64> {
    expected.map(|(name, count)| (name.to_owned(), count)).into()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_service_published_is_proven() {
    let service = TestService::start().await;
    for name in ["ada", "bob", "eve"] {
        let user = service.registered(name).await;
        service.until_published(&user["id"].to_string()).await;
    }
    let vars = vars(&PARTS.database_url(&service.database), &service.prefix);
    let (code, said, complaint) = run(&["outbox", "verify", "--from", "1h"], &vars).await;
    assert_eq!((code, complaint.as_str()), (0, ""), "{said}");
    assert!(said.ends_with("\nproven 3 of 3: each once, at its offset, in order\n"), "{said}");
    assert!(said.contains(&service.topic("user.create")) && !said.contains("example.com"), "{said}");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reader_of_the_database_alone_gets_a_report_to_keep() {
    let traffic = Traffic::new().await;
    let auditor = format!("auditor_{}", traffic.service.database);
    traffic.sql(&format!("create role {auditor} login password 'hush-hush'")).await;
    traffic.sql(&format!("grant select on all tables in schema public to {auditor}")).await;
    let url = PARTS.database_url(&traffic.service.database);
    let (_, place) = url.rsplit_once('@').expect("a user");
    let vars = vars(&format!("postgres://{auditor}:hush-hush@{place}"), &traffic.service.prefix);

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("report.json");
    let out = path.to_str().unwrap();
    let command = ["outbox", "verify", "--from", "1h", "--topic", &traffic.topic, "--json", "--out", out];
    let (code, said, complaint) = run(&command, &vars).await;
    assert_eq!((code, complaint.as_str()), (0, ""));
    assert_eq!(said, "proven 9 of 9: each once, at its offset, in order\n");
    let kept = std::fs::read_to_string(&path).unwrap();
    assert!(!kept.contains("hush"), "{kept}");
    let report: Value = serde_json::from_str(&kept).unwrap();
    assert_eq!(report["verdict"], "proven");
    assert_eq!(totals(&report), figures([("proven", 9)]));
    let digest: String = sqlx::query_scalar(
        r#"select encode(sha256(convert_to(string_agg(
                      concat_ws(',', id, message_id, topic, partition, "offset") || chr(10), ''
                      order by topic collate "C", partition, "offset", id), 'UTF8')), 'hex')
             from outbox_archive"#,
    )
    .fetch_one(&traffic.service.db)
    .await
    .unwrap();
    assert_eq!(report["rowsSha256"], json!(digest));

    let (code, _, complaint) = run(&command, &vars).await;
    assert_eq!(code, 2);
    assert!(complaint.contains("nothing is overwritten"), "{complaint}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), kept);
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_archive_that_was_tampered_with_is_told_from_kafka() {
    let traffic = Traffic::new().await;
    let b2 = "key = 'b' and seq = 2";
    let tampered = [
        (
            format!(r#"update outbox_archive set "offset" = "offset" + 1000 where {b2}"#),
            1,
            figures([("missing", 1), ("copies", 1), ("proven", 8)]),
        ),
        (
            format!(r#"update outbox_archive set "offset" = -1001 where {b2}"#),
            1,
            figures([("noPosition", 1), ("proven", 8)]),
        ),
        (
            format!("update outbox_archive set partition = -1 where {b2}"),
            1,
            figures([("noPosition", 1), ("proven", 8)]),
        ),
        (
            format!("update outbox_archive set partition = 77 where {b2}"),
            1,
            figures([("missing", 1), ("copies", 1), ("movedKeys", 1), ("proven", 8)]),
        ),
        ("update outbox_archive set topic = topic || '.gone'".to_owned(), 3, figures([("topicGone", 9)])),
        (
            format!(r"update outbox_archive set payload = '\x00' where {b2}"),
            1,
            figures([("different", 1), ("proven", 8)]),
        ),
        (
            "update outbox_archive set seq = 3 - seq where key = 'b' and seq < 3".to_owned(),
            1,
            figures([("different", 2), ("proven", 7)]),
        ),
        (
            format!("delete from outbox_archive where {b2}"),
            1,
            figures([("sequence", 1), ("unmatched", 1), ("proven", 8)]),
        ),
        (
            format!("insert into outbox_archive select * from outbox_archive where {b2}"),
            1,
            figures([("sequence", 1), ("shared", 1), ("proven", 9)]),
        ),
        (
            "update outbox_archive a set message_id = o.message_id from outbox_archive o
              where a.key = 'b' and a.seq = 2 and o.key = 'b' and o.seq = 3"
                .to_owned(),
            1,
            figures([("missing", 1), ("unmatched", 1), ("proven", 8)]),
        ),
    ];
    // As on a database that an earlier release wrote to.
    traffic.sql("alter table outbox_archive drop constraint outbox_archive_position").await;
    traffic.sql("create table kept as table outbox_archive").await;
    for (sql, code, expected) in tampered {
        assert!(traffic.sql(&sql).await > 0, "{sql}");
        let (ended, report) = traffic.verify().await;
        assert_eq!(totals(&report), expected, "{sql}");
        assert_eq!(ended, code, "{sql}");
        traffic.sql("truncate outbox_archive; insert into outbox_archive select * from kept").await;
    }
    assert_eq!(traffic.verify().await.0, 0);
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_of_ours_that_no_row_knows_contradicts_and_a_foreign_one_does_not() {
    let traffic = Traffic::new().await;
    let seen = traffic.first_of("a").await;
    let place = (traffic.topic.as_str(), seen.partition);
    send_to(&PARTS.brokers(), place, "a", &[("ce_source", "somebody else")], b"{}").await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("otherSenders", 1), ("proven", 9)])));

    let id = Uuid::now_v7().to_string();
    let headers = [("ce_source", "test"), ("ce_id", &id), ("aggregate-seq", "4")];
    let offset = send_to(&PARTS.brokers(), place, "a", &headers, b"{}").await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("otherSenders", 1), ("unmatched", 1), ("proven", 9)])));
    let message = &report["unmatched"][0];
    assert_eq!((&message["ceId"], &message["offset"]), (&json!(id), &json!(offset)));
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_database_knows_beside_the_window_vouches_for_its_messages() {
    let traffic = Traffic::new().await;
    traffic
        .sql("update outbox_archive set published_at = now() - interval '2 hours' where key = 'a' and seq = 1")
        .await;
    traffic
        .sql(
            "with gone as (delete from outbox_archive where key = 'b' and seq = 3 returning *)
             insert into outbox_parked (id, lane, key, seq, message_id, topic, payload, headers, created_at, reason)
             select id, lane, key, seq, message_id, topic, payload, headers, created_at, 'its fate was unclear'
               from gone",
        )
        .await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("notArchived", 1), ("parked", 1), ("proven", 7)])));
    assert_eq!(report["totals"]["outside"], 1);
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_vanished_before_it_was_sent_is_told_by_its_keys_counter() {
    let traffic = Traffic::new().await;
    let mut tx = traffic.service.db.begin().await.unwrap();
    sqlx::query("update outbox_keys set last_seq = last_seq + 2 where key = 'b'").execute(&mut *tx).await.unwrap();
    sqlx::query("insert into outbox_keys (key, last_seq) values ('never seen', 1)").execute(&mut *tx).await.unwrap();
    tx.commit().await.unwrap();
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("vanished", 3), ("proven", 9)])));
    let vanished = json!([
        { "key": "b", "knownSeq": 3, "lastSeq": 5 },
        { "key": "never seen", "knownSeq": 0, "lastSeq": 1 },
    ]);
    assert_eq!(report["vanished"], vanished);
    let window = ["outbox", "verify", "--from", "1h"];
    let (code, said, _) = run(&window, &traffic.vars()).await;
    assert_eq!(code, 1);
    let told = "key \"b\": appended up to number 5, and nothing behind number 3 is in any table";
    assert!(said.contains(told) && said.contains("CONTRADICTED 3 times"), "{said}");
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn copies_and_replays_are_counted_apart_and_contradict_nothing() {
    let traffic = Traffic::new().await;
    let c1 = traffic.first_of("c").await;
    let at = traffic.send_again(&c1).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("copies", 1), ("proven", 9)])));
    let copy = &report["copies"][0];
    assert_eq!((&copy["offset"], &copy["alsoAt"]), (&json!(c1.offset), &json!(at)));

    // Had the relay died in between, the archive would name the second of the two.
    traffic.append("d", 1).await;
    traffic.service.until_count("select count(*) from outbox_archive", 10).await;
    let d1 = traffic.first_of("d").await;
    let second = traffic.send_again(&d1).await;
    traffic.sql(&format!(r#"update outbox_archive set "offset" = {second} where key = 'd'"#)).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("copies", 2), ("proven", 10)])));
    let places = [json!(d1.offset), json!(second)];
    let copies = report["copies"].as_array().unwrap();
    assert!(copies.iter().any(|copy| [copy["alsoAt"].clone(), copy["offset"].clone()] == places), "{copies:?}");

    let row: i64 = sqlx::query_scalar("select id from outbox_archive where key = 'a' and seq = 1")
        .fetch_one(&traffic.service.db)
        .await
        .unwrap();
    let mut tx = traffic.service.db.begin().await.unwrap();
    replay(&mut tx, row, true).await.unwrap();
    tx.commit().await.unwrap();
    traffic.service.until_count("select count(*) from outbox_archive", 11).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("copies", 2), ("replays", 1), ("proven", 11)])));

    // A copy that says something else is none.
    let altered = Seen { value: json!({ "n": 1, "secret": "other" }), ..c1 };
    traffic.send_again(&altered).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, &report["totals"]["different"]), (1, &json!(1)));
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_of_a_key_that_stand_in_the_wrong_order_are_found_even_at_the_windows_edge() {
    let traffic = Traffic::new().await;
    for seq in [2, 1] {
        let id = Uuid::now_v7();
        let (ce_id, number) = (id.to_string(), seq.to_string());
        let headers = [("ce_source", "test"), ("ce_id", ce_id.as_str()), ("aggregate-seq", number.as_str())];
        let offset = send_to(&PARTS.brokers(), (&traffic.topic, 0), "z", &headers, b"{}").await;
        let topic = &traffic.topic;
        traffic
            .sql(&format!(
                r#"insert into outbox_archive (id, lane, key, seq, message_id, topic, payload, headers, created_at,
                                               partition, "offset", relay_id, term)
                   values ({offset} + 5000, 0, 'z', {seq}, '{id}', '{topic}', '{{}}', '{{}}', now(), 0, {offset}, '{id}', 1)"#
            ))
            .await;
    }
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("outOfOrder", 1), ("proven", 10)])));
    assert_eq!(report["findings"][0]["seq"], 1);
    // The first of them was published before the window.
    traffic
        .sql("update outbox_archive set published_at = now() - interval '2 hours' where key = 'z' and seq = 1")
        .await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("outOfOrder", 1), ("proven", 10)])));
    assert_eq!(report["findings"][0]["seq"], 2);
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_retention_took_is_not_called_proven_and_not_called_missing() {
    let traffic = Traffic::new().await;
    if PARTS.is_embedded() {
        // Its records can't be deleted; `comparison` has the decision.
        return traffic.service.stop().await;
    }
    let seen = traffic.first_of("a").await;
    let admin: AdminClient<DefaultClientContext> =
        ClientConfig::new().set("bootstrap.servers", PARTS.brokers()).create().unwrap();
    let mut before = TopicPartitionList::new();
    before.add_partition_offset(&traffic.topic, seen.partition, Offset::Offset(seen.offset + 1)).unwrap();
    admin.delete_records(&before, &AdminOptions::new()).await.expect("the records are deleted");
    let gone = seen.offset as u64 + 1;
    let (code, said, _) = run(&["outbox", "verify", "--from", "1h"], &traffic.vars()).await;
    assert_eq!(code, 3, "{said}");
    assert!(said.contains(&format!("proven {} of 9; nothing contradicts", 9 - gone)), "{said}");
    let (_, report) = traffic.verify().await;
    assert_eq!(totals(&report), figures([("expired", gone), ("proven", 9 - gone)]));
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_message_from_before_the_archive_begins_is_no_contradiction_and_no_proof() {
    let traffic = Traffic::new().await;
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", PARTS.brokers()).create().unwrap();
    // Retention drops whole days.
    let sent = (Utc::now() - TimeDelta::hours(25)).timestamp_millis();
    let source = OwnedHeaders::new().insert(Header { key: "ce_source", value: Some("test") });
    let partition = traffic.first_of("a").await.partition;
    let record = BaseRecord::to(&traffic.topic).partition(partition).key("a").payload("{}").timestamp(sent);
    producer.send(record.headers(source)).unwrap();
    tokio::task::block_in_place(|| producer.flush(Duration::from_secs(10)).unwrap());
    let (code, said, _) = run(&["outbox", "verify", "--from", "2d"], &traffic.vars()).await;
    assert_eq!(code, 3, "{said}");
    assert!(said.contains("proven 9 of 9; nothing contradicts") && said.contains("archive begins"), "{said}");
    // An older row shows that the archive goes back further: it would know.
    traffic.sql("update outbox_archive set published_at = now() - interval '3 days' where key = 'c' and seq = 1").await;
    let (code, said, _) = run(&["outbox", "verify", "--from", "2d"], &traffic.vars()).await;
    assert_eq!(code, 1, "{said}");
    assert!(said.contains("\nunmatched        1\n"), "{said}");
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn transactions_of_others_neither_hang_the_reader_nor_make_rows_missing() {
    let traffic = Traffic::new().await;
    if PARTS.is_embedded() {
        // It has no transactions.
        return traffic.service.stop().await;
    }
    let (topic, partition) = (traffic.topic.clone(), traffic.first_of("a").await.partition);
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", PARTS.brokers()).set("transactional.id", &topic).create().unwrap();
    let patience = Duration::from_secs(10);
    let begin = || {
        producer.begin_transaction().unwrap();
        producer.send(BaseRecord::<str, str>::to(&topic).partition(partition).payload("theirs")).unwrap();
        producer.flush(patience).unwrap();
    };
    tokio::task::block_in_place(|| {
        producer.init_transactions(patience).unwrap();
        begin();
    });
    traffic.append("a", 4).await;
    traffic.service.until_count("select count(*) from outbox_archive", 10).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (3, figures([("openTransaction", 1), ("proven", 9)])));

    tokio::task::block_in_place(|| producer.abort_transaction(patience).unwrap());
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("proven", 10)])));

    // The end of the log is a marker now, and the messages before it are none.
    tokio::task::block_in_place(|| {
        begin();
        producer.abort_transaction(patience).unwrap();
    });
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (0, figures([("proven", 10)])));
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_can_not_be_carried_out_is_told_from_what_contradicts() {
    let database = PARTS.database().await;
    let url = PARTS.database_url(&database);
    let verify = async |arguments: &[&str], vars: &[(String, String)]| -> (i32, String) {
        let (code, said, complaint) = run(&[&["outbox", "verify"], arguments].concat(), vars).await;
        assert_eq!(said, "");
        (code, complaint)
    };
    let (code, complaint) = verify(&["--from", "1h"], &[]).await;
    assert_eq!(code, 2);
    assert!(complaint.contains("DATABASE_URL") && complaint.contains("KAFKA_BROKERS"), "{complaint}");
    for (arguments, said) in [
        (vec!["--from", "noon"], "2026-03-09T14:00:00Z"),
        (vec!["--from", "1h", "--to", "2h"], "the window is empty"),
        (vec!["--from", "1h", "--to", "2999-01-01"], "the database's clock"),
    ] {
        let (code, complaint) = verify(&arguments, &vars(&url, "")).await;
        assert_eq!(code, 2, "{complaint}");
        assert!(complaint.contains(said), "{complaint}");
    }

    let mut no_broker = vars(&url, "");
    no_broker[1].1 = "127.0.0.1:1".to_owned();
    let (code, complaint) = verify(&["--from", "1h"], &no_broker).await;
    assert_eq!(code, 4);
    assert!(complaint.contains("Kafka at 127.0.0.1:1"), "{complaint}");
    let nobody = vars("postgres://ada:hush-hush-word@127.0.0.1:1/auth", "");
    let (code, complaint) = verify(&["--from", "1h"], &nobody).await;
    assert_eq!(code, 4);
    assert!(complaint.contains("the database at 127.0.0.1:1") && !complaint.contains("hush"), "{complaint}");
}

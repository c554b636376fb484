//! Where a promise ends: what `outbox verify` says of topics that are compacted, of partitions that were added, and of
//! a database that went back in time.

use std::collections::BTreeSet;

use rdkafka::admin::{AlterConfig, NewPartitions, ResourceSpecifier};

use super::*;
use crate::support::outbox::Outbox;

fn admin() -> AdminClient<DefaultClientContext> {
    ClientConfig::new().set("bootstrap.servers", PARTS.brokers()).create().unwrap()
}

/// An offset at which no message stands: the marker that ends a transaction.
async fn offset_without_a_message(topic: &str, partition: i32) -> i64 {
    let producer: BaseProducer =
        ClientConfig::new().set("bootstrap.servers", PARTS.brokers()).set("transactional.id", topic).create().unwrap();
    tokio::task::block_in_place(|| {
        let wait = Duration::from_secs(20);
        producer.init_transactions(wait).unwrap();
        producer.begin_transaction().unwrap();
        producer.send(BaseRecord::<str, str>::to(topic).partition(partition).key("x").payload("theirs")).unwrap();
        producer.commit_transaction(wait).unwrap();
    });
    send_to(&PARTS.brokers(), (topic, partition), "x", &[], b"theirs").await - 1
}

#[tokio::test(flavor = "multi_thread")]
async fn what_compaction_may_have_taken_is_not_called_missing() {
    let traffic = Traffic::new().await;
    if PARTS.is_embedded() {
        // Its topics can't be compacted; `comparison` has the decision.
        return traffic.service.stop().await;
    }
    let empty = offset_without_a_message(&traffic.topic, traffic.first_of("b").await.partition).await;
    traffic.sql(&format!(r#"update outbox_archive set "offset" = {empty} where key = 'b' and seq = 2"#)).await;
    let (code, report) = traffic.verify().await;
    let figures_of = |name| figures([(name, 1), ("copies", 1), ("otherSenders", 2), ("proven", 8)]);
    assert_eq!((code, totals(&report)), (1, figures_of("missing")));

    for policy in ["compact", "delete,compact"] {
        let compacted = AlterConfig::new(ResourceSpecifier::Topic(&traffic.topic)).set("cleanup.policy", policy);
        admin().alter_configs([&compacted], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        let (code, report) = traffic.verify().await;
        assert_eq!((code, totals(&report)), (3, figures_of("compacted")), "{policy}");
    }
    let (_, said, _) = run(&["outbox", "verify", "--from", "1h"], &traffic.vars()).await;
    assert!(said.contains("1 rows of compacted topics, which can't be proven"), "{said}");
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_moved_to_an_added_partition_has_no_proven_order_and_contradicts_nothing() {
    if PARTS.is_embedded() {
        return;
    }
    let outbox = Outbox::new().await;
    let keys: Vec<String> = (0..30).map(|n| format!("key {n}")).collect();
    for number in 0..2 {
        for key in &keys {
            outbox.append(key, &number.to_string()).await;
        }
        let relay = outbox.relay("one");
        outbox.until("select count(*) from outbox", 0).await;
        relay.stop().await;
        let more = NewPartitions::new(&outbox.topic, 9);
        if number == 0 {
            admin().create_partitions([&more], &AdminOptions::new()).await.unwrap()[0].as_ref().unwrap();
        }
    }
    let database = outbox.pool.connect_options().get_database().unwrap().to_owned();
    let vars = vars(&PARTS.database_url(&database), &format!("{}.", outbox.topic));
    let (code, said, complaint) = run(&["outbox", "verify", "--from", "1h", "--json"], &vars).await;
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}{complaint}"));
    let moved = report["movedKeys"].as_array().unwrap();
    assert!(!moved.is_empty() && moved.len() < 30, "{moved:?}");
    assert_eq!((code, totals(&report)), (3, figures([("movedKeys", moved.len() as u64), ("proven", 60)])));
    assert_eq!(moved[0]["partitions"].as_array().unwrap().len(), 2);
    let (_, said, _) = run(&["outbox", "verify", "--from", "1h"], &vars).await;
    assert!(said.contains("partitions were added: order across partitions is not proven:"), "{said}");
}

/// The tables as they were before somebody registered: the backup that is restored later.
const BACKUP: &str = "
    create schema backup;
    create table backup.outbox_keys as table outbox_keys;
    create table backup.outbox_progress as table outbox_progress;
    create table backup.outbox_archive as table outbox_archive;";
const RESTORE: &str = "
    truncate outbox_keys, outbox_progress, outbox_archive;
    insert into outbox_keys select * from backup.outbox_keys;
    insert into outbox_progress select * from backup.outbox_progress;
    insert into outbox_archive select * from backup.outbox_archive;";

#[tokio::test(flavor = "multi_thread")]
async fn what_a_restored_database_forgot_is_listed_also_where_its_number_was_given_out_again() {
    let traffic = Traffic::new().await;
    traffic.sql(BACKUP).await;
    for n in 4..=5 {
        traffic.append("a", n).await;
    }
    traffic.service.until_count("select count(*) from outbox_archive", 11).await;
    let forgotten: BTreeMap<i64, String> =
        sqlx::query_as("select seq, message_id::text from outbox_archive where key = 'a' and seq > 3")
            .fetch_all(&traffic.service.db)
            .await
            .unwrap()
            .into_iter()
            .collect();
    traffic.sql(RESTORE).await;
    traffic.append("a", 6).await;
    traffic.service.until_count("select count(*) from outbox_archive", 10).await;

    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("unmatched", 2), ("proven", 10)])));
    let again: i64 = sqlx::query_scalar("select id from outbox_archive where key = 'a' and seq = 4")
        .fetch_one(&traffic.service.db)
        .await
        .unwrap();
    for (message, (seq, also_of)) in report["unmatched"].as_array().unwrap().iter().zip([(4, Some(again)), (5, None)]) {
        assert_eq!(message["ceId"], json!(forgotten[&seq]));
        assert_eq!(message["topic"], json!(traffic.topic));
        assert_eq!((&message["key"], &message["aggregateSeq"]), (&json!("a"), &json!(seq)));
        assert!(message["partition"].is_i64() && message["offset"].is_i64(), "{message}");
        assert_eq!(message["numberAlsoOf"], json!(also_of));
    }
    let (_, said, _) = run(&["outbox", "verify", "--from", "1h"], &traffic.vars()).await;
    assert!(said.contains("unmatched: in Kafka, and not in the database:"), "{said}");
    assert!(said.contains(&format!("row {again} has the same number")), "{said}");
    traffic.service.stop().await;
}

/// The archive names no topic then: the topics that the service writes to are read all the same.
#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_forgot_everything_is_told_what_kafka_knows() {
    let service = TestService::start().await;
    let mut ids = BTreeSet::new();
    for name in ["ada", "bob"] {
        let user = service.registered(name).await;
        service.until_published(&user["id"].to_string()).await;
        ids.insert(user["id"].to_string());
    }
    sqlx::raw_sql("truncate outbox_keys, outbox_progress, outbox_archive").execute(&service.db).await.unwrap();
    let vars = vars(&PARTS.database_url(&service.database), &service.prefix);
    let (code, said, _) = run(&["outbox", "verify", "--from", "1h", "--json"], &vars).await;
    let report: Value = serde_json::from_str(&said).expect("a report");
    assert_eq!((code, totals(&report)), (1, figures([("unmatched", 2)])));
    let keys: BTreeSet<String> = report["unmatched"]
        .as_array()
        .unwrap()
        .iter()
        .map(|message| message["key"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(keys, ids);
    service.stop().await;
}

/// The SQL of the page on restoring, as it stands there.
fn repair(report: &str) -> String {
    let page = include_str!("../../../src/RESTORING.md");
    let (_, sql) = page.split_once("```sql\n").expect("SQL");
    let (sql, _) = sql.split_once("```").expect("its end");
    let (set, sql) = sql.split_once('\n').expect("lines");
    assert_eq!(set, r"\set report `cat forgotten.json`");
    sql.replace(":'report'", &format!("'{}'", report.replace('\'', "''")))
}

#[tokio::test(flavor = "multi_thread")]
async fn after_a_restore_the_counters_go_on_behind_what_kafka_has_seen() {
    let traffic = Traffic::new().await;
    traffic.sql(BACKUP).await;
    for (key, n) in [("a", 4), ("a", 5), ("4711", 1)] {
        traffic.append(key, n).await;
    }
    traffic.service.until_count("select count(*) from outbox_archive", 12).await;
    traffic.sql(RESTORE).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("unmatched", 3), ("proven", 9)])));

    for _ in 0..2 {
        traffic.sql(&repair(&report.to_string())).await;
    }
    let restarted = Utc::now().to_rfc3339();
    for (key, n) in [("a", 6), ("b", 4), ("4711", 2)] {
        traffic.append(key, n).await;
    }
    traffic.service.until_count("select count(*) from outbox_archive", 12).await;
    let numbers: Vec<(String, i64)> = sqlx::query_as("select key, seq from outbox_archive order by id desc limit 3")
        .fetch_all(&traffic.service.db)
        .await
        .unwrap();
    assert_eq!(numbers, [("4711".to_owned(), 2), ("b".to_owned(), 4), ("a".to_owned(), 6)]);
    let next_user: i64 = sqlx::query_scalar("select nextval(pg_get_serial_sequence('auth_users', 'id'))")
        .fetch_one(&traffic.service.db)
        .await
        .unwrap();
    assert_eq!(next_user, 4712);
    let window = ["outbox", "verify", "--from", &restarted, "--json"];
    let (code, said, complaint) = run(&window, &traffic.vars()).await;
    let report: Value = serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}{complaint}"));
    assert_eq!((code, totals(&report)), (0, figures([("proven", 3)])));
    traffic.service.stop().await;
}

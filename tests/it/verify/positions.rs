//! Rows that name no position in Kafka: earlier releases wrote them when librdkafka reported success without an offset.

use super::*;

/// What an earlier release left behind: an event that never reached Kafka, archived as published.
const LOST: &str = r#"
    alter table outbox_archive drop constraint outbox_archive_position;
    insert into outbox_archive (id, lane, key, seq, message_id, topic, payload, headers, created_at, partition, "offset",
                                relay_id, term)
    select nextval('outbox_id_seq'), lane, 'lost', 1, lost.id, topic, payload,
           jsonb_set(headers, '{ce_id}', to_jsonb(lost.id)), created_at, partition, -1001, relay_id, term
      from outbox_archive, (select gen_random_uuid() as id) lost where key = 'b' and seq = 2;
    delete from _sqlx_migrations where version = 8;"#;

async fn lost_row(traffic: &Traffic) -> i64 {
    traffic.sql(LOST).await;
    let row = sqlx::query_scalar("select id from outbox_archive where key = 'lost'");
    row.fetch_one(&traffic.service.db).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_database_refuses_a_published_row_without_a_position() {
    let traffic = Traffic::new().await;
    for bad in [r#""offset" = -1001"#, r#""offset" = -1"#, "partition = -1"] {
        let refused = sqlx::raw_sql(AssertSqlSafe(format!("update outbox_archive set {bad}")));
        let error = refused.execute(&traffic.service.db).await.expect_err(bad);
        let constraint = error.as_database_error().and_then(|error| error.constraint()).unwrap_or_default().to_owned();
        assert_eq!(constraint, "outbox_archive_position", "{bad}: {error}");
    }
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_without_a_position_contradicts_until_it_is_sent_again() {
    let traffic = Traffic::new().await;
    let row = lost_row(&traffic).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("noPosition", 1), ("proven", 9)])));
    let finding = &report["findings"][0];
    assert_eq!((&finding["kind"], &finding["rowId"]), (&json!("noPosition"), &json!(row)));
    let what = finding["what"].as_str().unwrap();
    assert!(what.contains("was not found") && what.contains("replay"), "{what}");

    let mut tx = traffic.service.db.begin().await.unwrap();
    replay(&mut tx, row, false).await.unwrap();
    tx.commit().await.unwrap();
    traffic.service.until_count("select count(*) from outbox_archive where key = 'lost'", 2).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (3, figures([("sentAgain", 1), ("replays", 1), ("proven", 10)])));
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn where_the_message_of_such_a_row_stands_is_said() {
    let traffic = Traffic::new().await;
    let b = traffic.first_of("b").await;
    traffic.sql("alter table outbox_archive drop constraint outbox_archive_position").await;
    traffic.sql(r#"update outbox_archive set "offset" = -1001 where key = 'b' and seq = 1"#).await;
    let (code, report) = traffic.verify().await;
    assert_eq!((code, totals(&report)), (1, figures([("noPosition", 1), ("proven", 8)])));
    let what = report["findings"][0]["what"].as_str().unwrap();
    assert!(what.ends_with(&format!("stands in partition {} at offset {}", b.partition, b.offset)), "{what}");
    traffic.service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_says_how_many_events_may_be_missing_and_what_to_do() {
    let traffic = Traffic::new().await;
    let row = lost_row(&traffic).await;
    let (code, said, advice) = run(&["migrate"], &traffic.vars()).await;
    assert_eq!(code, 0, "{advice}");
    assert!(said.starts_with("applied 1 migration(s)"), "{said}");
    for part in [
        format!("1 event(s) are archived as published without a position in Kafka (\"offset\" below 0): rows {row}\n"),
        "auth-service outbox verify --from 20".to_owned(),
        "POST /admin/outbox/ID/replay".to_owned(),
    ] {
        assert!(advice.contains(&part), "{part}: {advice}");
    }
    // The advice is to be followed as it is written.
    let window: Vec<&str> =
        advice.lines().find_map(|line| line.split_once("auth-service ")).unwrap().1.split(' ').collect();
    assert_eq!(run(&window, &traffic.vars()).await.0, 1);

    let refused = sqlx::raw_sql(r#"update outbox_archive set "offset" = -1 where key = 'a'"#);
    assert!(refused.execute(&traffic.service.db).await.is_err(), "new rows are checked, whatever the old ones are");
    let mut tx = traffic.service.db.begin().await.unwrap();
    replay(&mut tx, row, false).await.unwrap();
    tx.commit().await.unwrap();
    traffic.service.until_count("select count(*) from outbox_archive where key = 'lost'", 2).await;
    assert_eq!(run(&["migrate"], &traffic.vars()).await.2, "");
    let relied_on = "select count(*) from pg_constraint where conname = 'outbox_archive_position' and convalidated
                        and conrelid = 'outbox_archive'::regclass";
    traffic.service.until_count(relied_on, 0).await;

    traffic.sql("delete from outbox_archive where key = 'lost' and replay_of is null").await;
    assert_eq!(run(&["migrate"], &traffic.vars()).await.2, "");
    traffic.service.until_count(relied_on, 1).await;
    traffic.service.stop().await;
}

//! Retention does what its variables say, and nothing else.

use auth_service::{
    app::Role,
    housekeeping::{Job, once},
};
use sqlx::{AssertSqlSafe, PgPool};

use crate::support::{TestService, join_all};

async fn service(vars: &[(&'static str, &str)]) -> TestService {
    use crate::support::service::Wishes;
    let vars = vars.iter().map(|(name, value)| (*name, (*value).to_owned())).collect();
    TestService::with(Wishes { roles: Some(vec![Role::Http]), no_topics: true, vars, ..Wishes::default() }).await
}

async fn execute(db: &PgPool, sql: String) {
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(db).await.unwrap();
}

/// An archived row of a key, published so long ago.
fn archived(id: i64, age: &str) -> String {
    format!(
        "insert into outbox_archive (id, lane, key, seq, message_id, topic, payload, headers, created_at, published_at,
                                     partition, \"offset\", relay_id, term)
         values ({id}, 0, 'k{id}', 1, gen_random_uuid(), 't', '', '{{}}', now(), now() - interval '{age}', 0, {id},
                 gen_random_uuid(), 1);"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn archived_rows_go_when_they_are_due_wherever_they_lie() {
    let service = service(&[("ARCHIVE_RETENTION", "2d")]).await;
    let db = &service.db;
    // Days without a partition, as after a week without housekeeping; and one that has it.
    execute(db, archived(1, "10 days") + &archived(2, "49 hours") + &archived(3, "40 hours") + &archived(4, "0")).await;
    execute(
        db,
        "do $$ begin execute format('create table outbox_archive_%s partition of outbox_archive for values from (%L) to (%L)',
            to_char(now() - interval '20 days', 'YYYYMMDD'), (now() - interval '20 days')::date, (now() - interval '19 days')::date);
         end $$"
            .to_owned(),
    )
    .await;
    execute(db, archived(5, "20 days")).await;
    assert_eq!(service.count("select count(*) from outbox_archive_default").await, 3);
    once(&service.running.app, Job::Archive).await;
    let left: Vec<i64> = sqlx::query_scalar("select id from outbox_archive order by id").fetch_all(db).await.unwrap();
    assert_eq!(left, [3, 4]);
    assert_eq!(
        service.count("select count(*) from pg_inherits where inhparent = 'outbox_archive'::regclass").await,
        9,
        "the default one, today and the next seven days"
    );
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_day_whose_rows_came_before_its_partition_does_not_keep_the_others_from_being_made() {
    let service = service(&[]).await;
    let today = chrono::Utc::now().format("outbox_archive_%Y%m%d").to_string();
    let tomorrow = (chrono::Utc::now() + chrono::Duration::days(1)).format("outbox_archive_%Y%m%d").to_string();
    execute(&service.db, format!("drop table {today}, {tomorrow}")).await;
    execute(&service.db, archived(1, "0")).await;
    once(&service.running.app, Job::Archive).await;
    let made: Vec<String> = sqlx::query_scalar(
        "select inhrelid::regclass::text from pg_inherits where inhparent = 'outbox_archive'::regclass",
    )
    .fetch_all(&service.db)
    .await
    .unwrap();
    assert!(made.contains(&tomorrow) && !made.contains(&today), "{made:?}");
    assert_eq!(service.count("select count(*) from outbox_archive").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_partition_that_somebody_reads_is_left_for_the_next_run() {
    let service = service(&[("ARCHIVE_RETENTION", "2d")]).await;
    let old = (chrono::Utc::now() - chrono::Duration::days(9)).date_naive();
    let (name, next) = (old.format("outbox_archive_%Y%m%d").to_string(), old.succ_opt().unwrap());
    execute(
        &service.db,
        format!("create table {name} partition of outbox_archive for values from ('{old}') to ('{next}')"),
    )
    .await;
    let mut reader = service.db.begin().await.unwrap();
    sqlx::raw_sql("select count(*) from outbox_archive").execute(&mut *reader).await.unwrap();
    once(&service.running.app, Job::Archive).await;
    assert_eq!(service.count("select count(*) from pg_class where relkind = 'r' and relispartition").await, 10, "left");
    reader.rollback().await.unwrap();
    once(&service.running.app, Job::Archive).await;
    assert_eq!(service.count("select count(*) from pg_class where relkind = 'r' and relispartition").await, 9);
    service.stop().await;
}

fn inbox(key: &str, outcome: &str, age: &str) -> String {
    format!(
        "insert into inbox (consumer, message_key, last_at, topic, partition, \"offset\", outcome, raw_payload)
         values ('sagas', '{key}', now() - interval '{age}', 't', 0, 1, '{outcome}', 'ada@example.com');"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn messages_go_after_the_inbox_retention_unless_they_wait() {
    let service = service(&[("INBOX_RETENTION", "3d")]).await;
    let mut rows = String::new();
    for outcome in ["applied", "duplicate", "late", "unknown", "unexpected", "rejected", "deferred"] {
        rows += &inbox(&format!("old {outcome}"), outcome, "73 hours");
        rows += &inbox(&format!("new {outcome}"), outcome, "71 hours");
    }
    execute(&service.db, rows).await;
    once(&service.running.app, Job::Inbox).await;
    let left: Vec<String> =
        sqlx::query_scalar("select message_key from inbox where message_key like 'old%' order by 1")
            .fetch_all(&service.db)
            .await
            .unwrap();
    assert_eq!(left, ["old deferred"]);
    assert_eq!(service.count("select count(*) from inbox where message_key like 'new%'").await, 7);
    service.stop().await;
}

/// `(saga, status, age)`, its subject being its number.
fn saga(n: u8, status: &str, age: &str) -> String {
    let id = format!("00000000-0000-0000-0000-0000000000{n:02}");
    let (evidence, finished) = match status {
        "completed" | "compensated" => ("'reply'".to_owned(), format!("now() - interval '{age}'")),
        _ => ("null".to_owned(), "null".to_owned()),
    };
    let why = if status == "stuck" { "'why'" } else { "null" };
    format!(
        "insert into saga_state (saga_id, name, definition_version, status, step, subject, data, correlation_id,
                                 evidence, stuck_reason, created_at, updated_at, finished_at)
         values ('{id}', 'create_user', 1, '{status}', 'create', '{n}', '{{\"email\": \"ada@example.com\"}}', 'c{n}',
                 {evidence}, {why}, now() - interval '{age}', now() - interval '{age}', {finished});
         insert into saga_log (saga_id, revision, event, to_status, actor) values ('{id}', 0, 'started', 'running', 'service');"
    )
}

const LEFT: &str = "select array_agg(subject order by subject) from saga_state";

#[tokio::test(flavor = "multi_thread")]
async fn closed_sagas_go_after_their_retention_and_the_addresses_in_them_too() {
    let service = service(&[("SAGA_RETENTION", "5d")]).await;
    execute(
        &service.db,
        [
            saga(1, "completed", "6 days"),
            saga(2, "compensated", "6 days"),
            saga(3, "completed", "4 days"),
            saga(4, "stuck", "6 days"),
            saga(5, "running", "6 days"),
            // Its user.delete has not been published; and one of which something is parked.
            saga(6, "compensated", "6 days"),
            saga(7, "compensated", "6 days"),
            "insert into outbox (lane, key, seq, message_id, topic, payload, headers)
             values (0, '6', 2, gen_random_uuid(), 'user.delete', '', '{}');
             insert into outbox_parked (id, lane, key, seq, message_id, topic, payload, headers, created_at, reason)
             values (99, 0, '7', 2, gen_random_uuid(), 'user.delete', '', '{}', now(), 'too large');"
                .to_owned(),
        ]
        .concat(),
    )
    .await;
    // Wherever they run: the second finds the first at it, or nothing to do.
    join_all((0..3).map(|_| once(&service.running.app, Job::Sagas))).await;
    let left: Vec<String> = sqlx::query_scalar(LEFT).fetch_one(&service.db).await.unwrap();
    assert_eq!(left, ["3", "4", "5", "6", "7"]);
    assert_eq!(service.count("select count(*) from saga_log").await, 5);
    assert_eq!(service.count("select count(*) from outbox_parked").await, 1);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn sagas_are_kept_where_nobody_has_said_how_long() {
    let service = service(&[]).await;
    execute(&service.db, saga(1, "completed", "6 years")).await;
    once(&service.running.app, Job::Sagas).await;
    let left: Vec<String> = sqlx::query_scalar(LEFT).fetch_one(&service.db).await.unwrap();
    assert_eq!(left, ["1"]);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_closed_sagas_than_a_slice_go_in_one_run_and_those_that_wait_hold_up_nobody() {
    let service = service(&[("SAGA_RETENTION", "1d")]).await;
    execute(
        &service.db,
        "insert into saga_state (saga_id, name, definition_version, status, step, subject, data, correlation_id, evidence,
                                 created_at, finished_at)
         select gen_random_uuid(), 'create_user', 1, 'completed', 'create', n::text, '{}', n::text, 'reply',
                now() - interval '9 days' + n * interval '1 second', now() - interval '8 days'
           from generate_series(1, 2500) n;
         insert into outbox (lane, key, seq, message_id, topic, payload, headers)
         select 0, n::text, 1, gen_random_uuid(), 't', '', '{}' from generate_series(1, 1200) n"
            .to_owned(),
    )
    .await;
    once(&service.running.app, Job::Sagas).await;
    assert_eq!(service.count("select count(*) from saga_state").await, 1200);
    service.stop().await;
}

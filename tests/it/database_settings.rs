//! What a database, a role or a pooler has as its default is not what the service relies on.

use auth_service::{app::Role, migrations};
use reqwest::Method;
use sqlx::{AssertSqlSafe, Connection, PgConnection};

use crate::support::{
    TestService,
    parts::PARTS,
    pgbouncer::PgBouncer,
    process::{production_vars, run},
    service::Wishes,
};

/// The settings of a session of the service's own pools.
async fn setting(service: &TestService, name: &str) -> String {
    let name = name.to_owned();
    let asked = service.running.app.db.run(move |conn| {
        Box::pin(async move { sqlx::query_scalar("select current_setting($1)").bind(name).fetch_one(conn).await })
    });
    let setting: Result<String, sqlx::Error> = asked.await;
    setting.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn defaults_of_a_database_made_for_other_programs_change_nothing() {
    let database = PARTS.database().await;
    let mut settings = String::new();
    for default in [
        "default_transaction_isolation = 'serializable'",
        "default_transaction_deferrable = on",
        "synchronous_commit = off",
        "statement_timeout = '1min'",
        "lock_timeout = '1min'",
        "idle_in_transaction_session_timeout = 0",
        "idle_session_timeout = '1min'",
        "standard_conforming_strings = off",
        "IntervalStyle = 'sql_standard'",
        "DateStyle = 'German, DMY'",
        "TimeZone = 'Asia/Kolkata'",
        "client_encoding = 'LATIN1'",
        "quote_all_identifiers = on",
        "row_security = on",
        "bytea_output = 'escape'",
        "array_nulls = off",
        "enable_indexscan = off",
        "work_mem = '64kB'",
    ] {
        settings.push_str(&format!("alter database {database} set {default};"));
    }
    let mut other = PgConnection::connect_with(&PARTS.connect_options("postgres")).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(settings)).execute(&mut other).await.unwrap();

    assert_eq!(migrations::run(&PARTS.connect_options(&database)).await.unwrap().put_back, Vec::<String>::new());
    let wishes = Wishes { roles: Some(vec![Role::Http]), beside: Some((database, String::new())), ..Wishes::default() };
    let service = TestService::with(wishes).await;
    for (name, value) in [
        ("default_transaction_isolation", "read committed"),
        ("synchronous_commit", "on"),
        ("statement_timeout", "15s"),
        ("lock_timeout", "5s"),
        ("idle_in_transaction_session_timeout", "30s"),
        ("idle_session_timeout", "0"),
        ("standard_conforming_strings", "on"),
        ("row_security", "off"),
        ("TimeZone", "UTC"),
    ] {
        assert_eq!(setting(&service, name).await, value, "{name}");
    }
    assert_eq!(service.request(Method::GET, "/auth/health/ready").send().await.unwrap().status(), 200);
    let ada = service.registered("ada").await;
    assert!(ada["id"].is_i64());
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_for_more_than_a_commit_on_disk_keeps_it() {
    let database = PARTS.database().await;
    let mut other = PgConnection::connect_with(&PARTS.connect_options("postgres")).await.unwrap();
    let sql = format!("alter database {database} set synchronous_commit = remote_apply");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut other).await.unwrap();
    let wishes = Wishes { roles: Some(vec![Role::Http]), beside: Some((database, String::new())), ..Wishes::default() };
    let service = TestService::with(wishes).await;
    assert_eq!(setting(&service, "synchronous_commit").await, "remote_apply");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_pools_by_session_serves_everything() {
    let Some(binary) = PgBouncer::binary() else { return };
    let pooler = PgBouncer::start(&binary, "session").await;
    let database = PARTS.bare_database().await;
    let url = pooler.url(&database);
    let (code, said, complaint) = run(&["migrate"], &[("DATABASE_URL".to_owned(), url.clone())]).await;
    assert_eq!((code, complaint.as_str()), (0, ""), "{said}");
    let prefix = format!("{}.", uuid::Uuid::new_v4().simple());
    PARTS
        .create_topics(
            &[
                "user.create",
                "user.create.close",
                "user.create.done",
                "user.delete",
                "user.delete.done",
                "user.delete.close",
                "saga-reply",
            ]
            .map(|topic| format!("{prefix}{topic}")),
        )
        .await;
    let wishes = Wishes { beside: Some((database, prefix)), vars: vec![("DATABASE_URL", url)], ..Wishes::default() };
    let service = TestService::with(wishes).await;
    assert_eq!(setting(&service, "statement_timeout").await, "15s");
    let ada = service.registered("ada").await;
    let message = &service.messages("user.create", 1).await[0];
    assert_eq!(message.value["sagaId"], ada["sagaId"]);
    assert_eq!(service.request(Method::GET, "/auth/health/ready").send().await.unwrap().status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_pools_by_transaction_is_refused_with_the_way_out() {
    let Some(binary) = PgBouncer::binary() else { return };
    let pooler = PgBouncer::start(&binary, "transaction").await;
    let database = PARTS.database().await;
    let url = pooler.url(&database);
    for command in ["migrate", "serve"] {
        let vars = production_vars(&database, "", &[("DATABASE_URL", &url)]);
        let (code, _, complaint) = run(&[command], &vars).await;
        assert_eq!(code, 1, "{command}: {complaint}");
        assert!(complaint.contains("pool_mode = session"), "{command}: {complaint}");
    }
}

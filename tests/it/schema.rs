//! The schema of a live database: held to the migrations, looked at by readiness, put back by `migrate`.

use auth_service::{
    app::Role,
    migrations::{
        self,
        inspection::inspect,
        schema::{EXPECTED, Schema},
    },
};
use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection, PgConnection, PgPool};

use crate::support::{
    TestService, eventually,
    original::{BCRYPTJS_2, Original},
    parts::PARTS,
    process::run,
    service::Wishes,
};

async fn connect(database: &str) -> PgConnection {
    PgConnection::connect_with(&PARTS.connect_options(database)).await.expect("a connection")
}

async fn execute(database: &str, sql: &str) {
    sqlx::raw_sql(AssertSqlSafe(sql.to_owned())).execute(&mut connect(database).await).await.expect("the statements");
}

async fn problems(database: &str) -> Vec<String> {
    inspect(&mut connect(database).await).await.expect("a look").problems()
}

/// What `auth-service migrate` does: what it put back, or why it failed.
async fn migrate(database: &str) -> Result<Vec<String>, String> {
    let migrated = migrations::run(&PARTS.connect_options(database)).await;
    migrated.map(|migrated| migrated.put_back).map_err(|error| error.to_string())
}

/// All that the migrations have made, but for the archive's days.
async fn made(conn: &mut PgConnection) -> Schema {
    let tables: Vec<String> = sqlx::query_scalar(
        "select relname::text from pg_class
          where relnamespace = current_schema()::regnamespace and relkind in ('r', 'p', 'v', 'm')
            and relname !~ '^(_sqlx_migrations|outbox_archive_[0-9]+)$' order by oid",
    )
    .fetch_all(&mut *conn)
    .await
    .unwrap();
    let tables: Vec<&str> = tables.iter().map(String::as_str).collect();
    let mut seeds = String::new();
    for table in &tables {
        let rows: i64 = sqlx::query_scalar(AssertSqlSafe(format!("select count(*) from {table}")))
            .fetch_one(&mut *conn)
            .await
            .unwrap();
        if rows > 0 {
            let key: String = sqlx::query_scalar(
                "select quote_ident(attname) from pg_attribute a join pg_index i on i.indrelid = a.attrelid
                  where i.indisprimary and a.attnum = i.indkey[0] and i.indrelid = $1::regclass",
            )
            .bind(*table)
            .fetch_one(&mut *conn)
            .await
            .unwrap();
            seeds.push_str(&format!("create table {table} (\n);\ninsert into {table} ({key}) values ('');\n"));
        }
    }
    Schema::read(conn, &tables, &Schema::parse(&seeds)).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rendered_schema_is_what_the_migrations_make() {
    let mut conn = connect(&PARTS.database().await).await;
    let rendered = made(&mut conn).await.render();
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/migrations/schema.sql");
    if std::env::var_os("RENDER_SCHEMA").is_some() {
        std::fs::write(path, &rendered).unwrap();
    }
    let kept = std::fs::read_to_string(path).unwrap();
    assert!(
        kept == rendered,
        "the migrations make another schema: RENDER_SCHEMA=1 cargo test --test it rendered_schema"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rendered_schema_makes_the_same_database() {
    let mut conn = connect(&PARTS.bare_database().await).await;
    sqlx::raw_sql(AssertSqlSafe(EXPECTED.render())).execute(&mut conn).await.unwrap();
    assert_eq!(made(&mut conn).await.render(), EXPECTED.render());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_whole_schema_has_no_problems_and_migrate_has_nothing_to_do() {
    let database = PARTS.database().await;
    assert_eq!(problems(&database).await, Vec::<String>::new());
    assert_eq!(migrate(&database).await, Ok(vec![]));
    let original = Original::new().await;
    let ada = original.user("Ada", "ada@example.com", BCRYPTJS_2).await;
    original.session(ada, 60).await;
    original.migrate().await.unwrap();
    assert_eq!(problems(&original.database).await, Vec::<String>::new(), "adopted tables are as good");
}

/// Each is done to a database, named by readiness, and put back by `migrate`.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_lost_is_named_and_put_back() {
    for (loss, named) in [
        ("alter table auth_users drop column username_canonical cascade, drop column email_canonical cascade, drop column status,
          drop column create_saga_id", "the column auth_users.status is missing"),
        ("alter table refresh_tokens drop column session_id", "the column refresh_tokens.session_id is missing"),
        ("alter table saga_state drop column undone", "the column saga_state.undone is missing"),
        ("alter table auth_users alter column username type varchar(255)", "auth_users.username is character varying(255) not null"),
        ("alter table auth_users alter column status drop default", "has to be text not null default 'active'::text"),
        ("alter table auth_users alter column email_canonical drop not null", "the column auth_users.email_canonical is text,"),
        ("alter table auth_users drop constraint auth_users_email_unique", "the constraint auth_users_email_unique of auth_users is missing: UNIQUE (email_canonical)"),
        ("alter table saga_state drop constraint saga_state_status_known", "the constraint saga_state_status_known"),
        ("alter table saga_state drop constraint saga_state_stuck_says_why;
          alter table saga_state add constraint saga_state_stuck_says_why check (true)", "is CHECK (true), and has to be CHECK"),
        ("alter table refresh_tokens drop constraint refresh_tokens_user_id_fkey", "of refresh_tokens is missing: FOREIGN KEY (user_id)"),
        ("alter table refresh_tokens disable trigger all", "its triggers are disabled"),
        ("drop index refresh_tokens_legacy", "the index refresh_tokens_legacy of refresh_tokens is missing"),
        ("update pg_index set indisvalid = false where indexrelid = 'auth_users_create_saga'::regclass", "the index auth_users_create_saga is CREATE UNIQUE INDEX auth_users_create_saga ON auth_users USING btree (create_saga_id) WHERE (create_saga_id IS NOT NULL) /* invalid */"),
        ("alter table inbox set unlogged", "inbox is unlogged"),
        ("delete from outbox_lanes where lane = 17", "the row lane = 17 of outbox_lanes is missing"),
        ("delete from outbox_control", "the row only_row = true of outbox_control is missing"),
        ("drop table outbox_archive_default", "the table outbox_archive_default is missing"),
        ("alter table auth_users add column phone text not null", "the column auth_users.phone isn't ours"),
        ("insert into auth_users (id, username, email, password_hash, username_canonical, email_canonical)
          values (3, 'ada', 'ada@example.com', 'x', 'ada', 'ada@example.com')", "the next id of auth_users would be 1, and 3 is in use"),
        ("insert into admin_audit (id, actor, action, target, outcome) overriding system value values (7, 'a', 'b', 'c', 'd');
          alter sequence admin_audit_id_seq restart with 7", "the next id of admin_audit would be 7, and 7 is in use"),
    ] {
        let database = PARTS.database().await;
        execute(&database, loss).await;
        let found = problems(&database).await;
        assert!(found.iter().any(|problem| problem.contains(named)), "{loss}: {found:#?}");
        let put_back = migrate(&database).await.unwrap_or_else(|error| panic!("{loss}: {error}"));
        assert!(put_back.iter().any(|problem| problem.contains(named)), "{loss}: {put_back:#?}");
        assert_eq!(problems(&database).await, Vec::<String>::new(), "{loss}");
        assert_eq!(migrate(&database).await, Ok(vec![]), "{loss}");
    }
}

/// Each is named by readiness, and `migrate` says why it leaves it.
#[tokio::test(flavor = "multi_thread")]
async fn what_would_have_to_be_guessed_is_named_and_left() {
    let saga = "insert into saga_state (saga_id, name, definition_version, status, step, subject, data, correlation_id)
                values (gen_random_uuid(), 'create_user', 1, 'running', 'create', '1', '{}', 'c')";
    for (loss, named, why) in [
        (format!("{saga}; alter table saga_state drop column undone"), "the column saga_state.undone is missing", "backup"),
        ("drop table outbox".to_owned(), "the table outbox is missing", "backup"),
        ("alter table auth_users alter column id type bigint".to_owned(), "auth_users.id is bigint", "integer"),
        ("alter table inbox rename to inbox_; create view inbox as select * from inbox_".to_owned(), "inbox is a view", "backup"),
        ("alter table auth_users drop constraint auth_users_username_unique;
          insert into auth_users (username, email, password_hash, username_canonical, email_canonical) values
            ('ada', 'a@example.com', 'x', 'ada', 'a@example.com'), ('ADA', 'b@example.com', 'x', 'ada', 'b@example.com')".to_owned(),
         "the constraint auth_users_username_unique of auth_users is missing", "could not create unique index"),
    ] {
        let database = PARTS.database().await;
        execute(&database, &loss).await;
        let found = problems(&database).await;
        assert!(found.iter().any(|problem| problem.contains(named)), "{loss}: {found:#?}");
        let error = migrate(&database).await.expect_err(&loss);
        assert!(error.contains(named) && error.contains(why), "{loss}: {error}");
        assert_eq!(problems(&database).await, found, "{loss}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_whose_columns_are_dropped_is_not_ready_until_migrate_has_put_them_back() {
    let service =
        TestService::with(Wishes { roles: Some(vec![Role::Http, Role::Admin]), no_topics: true, ..Wishes::default() })
            .await;
    let ada = service.registered("ada").await;
    let ready = async || {
        let response = service.request(reqwest::Method::GET, "/auth/health/ready").send().await.unwrap();
        (
            response.status().as_u16(),
            response.json::<Value>().await.unwrap()["message"].as_str().unwrap_or("").to_owned(),
        )
    };
    assert_eq!(ready().await.0, 200);
    // As Sequelize's sync({ alter: true }) does it, up to the column that it can't add to a table with rows.
    execute(
        &service.database,
        r#"alter table auth_users drop column status; alter table auth_users drop column username_canonical cascade;
           alter table auth_users drop column email_canonical cascade; alter table auth_users drop column create_saga_id;
           alter table auth_users alter column username type varchar(255), alter column email type varchar(255),
               alter column password_hash type varchar(255), alter column "createdAt" drop default,
               alter column "updatedAt" drop default, add unique (username), add unique (email)"#,
    )
    .await;
    let message = eventually("it is not ready", || async {
        let (status, message) = ready().await;
        (status == 503).then_some(message)
    })
    .await;
    for column in ["status", "username_canonical", "email_canonical", "create_saga_id"] {
        assert!(message.contains(&format!("auth_users.{column} is missing")), "{message}");
    }
    let vars = [("DATABASE_URL".to_owned(), PARTS.database_url(&service.database))];
    let (code, said, complaint) = run(&["migrate"], &vars).await;
    assert_eq!((code, complaint.as_str()), (0, ""), "{said}");
    assert!(said.contains("put back: the column auth_users.status is missing"), "{said}");
    eventually("it is ready", || async { (ready().await.0 == 200).then_some(()) }).await;
    let (status, saga): (String, uuid::Uuid) =
        sqlx::query_as("select status, create_saga_id from auth_users").fetch_one(&service.db).await.unwrap();
    assert_eq!((status.as_str(), saga.to_string()), ("pending", ada["sagaId"].as_str().unwrap().to_owned()));
    let taken = service.register("ADA").await;
    assert_eq!(taken.status(), 409, "what Sequelize made unique no longer answers for it");
    let login = serde_json::json!({ "identifier": "ada", "password": "a long enough secret" });
    assert_eq!(service.post("/auth/login", login).await.status(), 200);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_whose_state_is_gone_is_over() {
    let service =
        TestService::with(Wishes { roles: Some(vec![Role::Http]), no_topics: true, ..Wishes::default() }).await;
    service.registered("ada").await;
    execute(&service.database, "alter table refresh_tokens drop column revoked_at").await;
    migrate(&service.database).await.unwrap();
    assert_eq!(service.count("select count(*) from refresh_tokens where revoked_at is null").await, 0);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_newer_schema_keeps_no_older_program_from_serving() {
    let database = PARTS.database().await;
    execute(
        &database,
        "insert into _sqlx_migrations values (999999999, 'of a newer program', now(), true, '', 1);
         alter table saga_state drop constraint saga_state_status_known, add column priority integer not null default 0;
         alter table auth_users alter column status set default 'new'",
    )
    .await;
    assert_eq!(problems(&database).await, Vec::<String>::new());
    assert_eq!(migrate(&database).await, Ok(vec![]), "an older program changes nothing of a newer schema");
    execute(&database, "alter table auth_users drop column create_saga_id").await;
    assert_eq!(problems(&database).await, ["the column auth_users.create_saga_id is missing"]);
    let wishes = Wishes { roles: Some(vec![Role::Http]), beside: Some((database, String::new())), ..Wishes::default() };
    let service = TestService::with(wishes).await;
    let ready = service.request(reqwest::Method::GET, "/auth/health/ready").send().await.unwrap();
    assert_eq!(ready.status(), 503, "it runs, and is not ready");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_that_are_missing_and_rows_that_are_hidden_are_named() {
    let database = PARTS.database().await;
    let role = format!("reader_{database}");
    execute(
        &database,
        &format!(
            "create role {role} login password 'x'; grant select on all tables in schema public to {role};
             grant insert, update, delete on auth_users, refresh_tokens, outbox_lanes to {role};
             grant insert on admin_audit to {role};
             alter table auth_users enable row level security"
        ),
    )
    .await;
    let options = PARTS.connect_options(&database).username(&role).password("x");
    let mut conn = PgConnection::connect_with(&options).await.unwrap();
    let found = inspect(&mut conn).await.unwrap().problems();
    let needed = format!("the role {role} lacks rights: grant insert, update, delete on outbox to {role}");
    assert!(found.contains(&needed), "{found:#?}");
    assert!(found.contains(&format!("row level security hides rows of auth_users from the role {role}")), "{found:#?}");
    assert!(
        !found.iter().any(|problem| problem.contains("admin_audit") || problem.contains("outbox_lanes")),
        "{found:#?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_in_use_are_never_hidden_by_new_ones() {
    let database = PARTS.database().await;
    execute(&database, "create schema auth").await;
    let options = PARTS.connect_options(&database).options([("search_path", "auth,public")]);
    let error = migrations::run(&options).await.unwrap_err().to_string();
    assert!(error.contains("in the schema public") && error.contains("in the schema auth"), "{error}");
    let mut conn = PgConnection::connect_with(&options).await.unwrap();
    assert_eq!(inspect(&mut conn).await.unwrap().problems(), Vec::<String>::new());
    sqlx::raw_sql("create table auth.outbox (like public.outbox including all)").execute(&mut conn).await.unwrap();
    let found = inspect(&mut conn).await.unwrap().problems();
    assert!(
        found.contains(
            &"search_path leads to auth.outbox, and the migrations were applied in the schema public".to_owned()
        ),
        "{found:#?}"
    );
}

/// As a restore without sequences, `create table as` and hand-made tables leave them.
#[tokio::test(flavor = "multi_thread")]
async fn adopted_users_are_followed_by_new_ones_however_their_ids_came_to_be() {
    for (made, id) in [
        ("select 1", "a serial that was used"),
        ("alter sequence auth_users_id_seq restart", "a sequence that stands at 1"),
        ("alter table auth_users alter column id drop default; drop sequence auth_users_id_seq", "no default at all"),
        (
            "alter table auth_users alter column id drop default; drop sequence auth_users_id_seq;
          alter table auth_users alter column id add generated by default as identity",
            "an identity",
        ),
        (
            "alter table auth_users alter column id drop default; drop sequence auth_users_id_seq;
          alter table auth_users alter column id add generated always as identity",
            "an identity that is always generated",
        ),
    ] {
        let original = Original::new().await;
        for name in ["ada", "bob", "eve"] {
            original.user(name, &format!("{name}@example.com"), BCRYPTJS_2).await;
        }
        execute(&original.database, made).await;
        let service = original.adopted().await;
        assert_eq!(service.registered("new").await["id"], 4, "{id}");
        service.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_that_are_no_integers_are_refused_before_anything_is_changed() {
    for id in ["bigint", "uuid using gen_random_uuid()"] {
        let original = Original::new().await;
        execute(
            &original.database,
            &format!(
                "alter table auth_users alter column id drop default; drop table refresh_tokens;
                      alter table auth_users alter column id type {id}"
            ),
        )
        .await;
        let before = original.everything().await;
        let told = original.migrate().await.unwrap_err();
        assert!(told.contains("nothing was changed: auth_users.id is") && told.contains("integer"), "{told}");
        assert_eq!(original.everything().await, before);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_database_that_cannot_hold_every_name_is_refused() {
    let database = format!("latin_{}", PARTS.bare_database().await);
    let admin = PgPool::connect_lazy_with(PARTS.connect_options("postgres"));
    let sql = format!("create database {database} encoding 'LATIN1' locale 'C' template template0");
    sqlx::raw_sql(AssertSqlSafe(sql)).execute(&admin).await.unwrap();
    let told = migrate(&database).await.unwrap_err();
    assert!(told.contains("encoding is LATIN1") && told.contains("UTF8"), "{told}");
}

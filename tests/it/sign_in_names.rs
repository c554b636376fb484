//! Usernames and addresses are one namespace for signing in.

use auth_service::{app::Role, migrations};
use serde_json::{Value, json};
use sqlx::{Connection, Executor, PgConnection};

use crate::support::{
    TestService,
    browser::code,
    join_all,
    original::{BCRYPTJS_2, Original},
    parts::PARTS,
    process,
    service::base_vars,
};

async fn register(service: &TestService, username: &str, email: &str) -> Result<(), String> {
    let body = json!({ "username": username, "email": email, "password": "a long enough secret" });
    let response = service.post("/auth/register", body).await;
    match response.status().as_u16() {
        201 => Ok(()),
        409 => Err(code(&response.json().await.unwrap()).to_owned()),
        status => panic!("{status}: {}", response.text().await.unwrap()),
    }
}

/// As an import or an operator would write it.
fn insert(username: &str, email: &str) -> sqlx::AssertSqlSafe<String> {
    sqlx::AssertSqlSafe(format!(
        "insert into auth_users (username, email, username_canonical, email_canonical, password_hash)
         values ('{username}', '{email}', lower('{username}'), lower('{email}'), '{BCRYPTJS_2}')"
    ))
}

#[tokio::test(flavor = "multi_thread")]
async fn an_address_that_is_somebodys_username_is_taken() {
    let original = Original::new().await;
    original.user("Ada@Corp.org", "ada@elsewhere.example", BCRYPTJS_2).await;
    // Who is named by their own address has that name alone.
    original.user("bob@corp.org", "bob@corp.org", BCRYPTJS_2).await;
    original.user("carl", "Carl", BCRYPTJS_2).await;
    original.user("eve", "local-part", BCRYPTJS_2).await;
    let service = original.adopted().await;
    for email in ["ada@corp.org", "ADA@CORP.ORG", "ada@CORP.org", " ada@corp.org "] {
        assert_eq!(register(&service, "stranger", email).await, Err("EMAIL_ALREADY_EXISTS".to_owned()), "{email}");
    }
    assert_eq!(register(&service, "stranger", "bob@corp.org").await, Err("EMAIL_ALREADY_EXISTS".to_owned()));
    assert_eq!(
        register(&service, "Local-Part", "x@corp.org").await,
        Err("USERNAME_ALREADY_EXISTS".to_owned()),
        "and the other way round"
    );
    register(&service, "stranger", "stranger@corp.org").await.unwrap();
    for identifier in ["ada@corp.org", "ada@elsewhere.example"] {
        let login = json!({ "identifier": identifier, "password": "a long enough secret" });
        let response = service.post("/auth/login", login).await;
        assert_eq!(response.json::<Value>().await.unwrap()["data"]["username"], "Ada@Corp.org", "{identifier}");
    }
    // What is there may change in everything else.
    sqlx::query("update auth_users set username = 'Ada@corp.ORG', username_canonical = 'ada@corp.org' where id = 1")
        .execute(&service.db)
        .await
        .unwrap();
    let renamed = sqlx::query("update auth_users set username_canonical = 'stranger@corp.org' where id = 1")
        .execute(&service.db)
        .await
        .unwrap_err();
    assert_eq!(renamed.as_database_error().unwrap().constraint(), Some("auth_users_username_no_email"));
    sqlx::query("delete from auth_users where username_canonical = 'ada@corp.org'").execute(&service.db).await.unwrap();
    register(&service, "another", "ada@corp.org").await.expect("free again");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_a_name_and_an_address_that_come_at_once_one_is_written() {
    let service = TestService::with_roles(&[Role::Http]).await;
    let mut conn = PgConnection::connect_with(&PARTS.connect_options(&service.database)).await.unwrap();
    for committed in [true, false] {
        let address = format!("ada{committed}@corp.org");
        // The name is written and not committed; the address has to wait for what becomes of it.
        let mut import = conn.begin().await.unwrap();
        import.execute(insert(&address, &format!("other{committed}@corp.org"))).await.unwrap();
        let username = if committed { "first" } else { "second" };
        let registering = register(&service, username, &address);
        let ending = async {
            let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted
                              and database = (select oid from pg_database where datname = current_database())";
            service.until_count(waiting, 1).await;
            match committed {
                true => import.commit().await.unwrap(),
                false => import.rollback().await.unwrap(),
            }
        };
        let (registered, ()) = tokio::join!(registering, ending);
        assert_eq!(registered, if committed { Err("EMAIL_ALREADY_EXISTS".to_owned()) } else { Ok(()) });

        // And the other way round.
        let address = format!("eve{committed}@corp.org");
        let mut registration = conn.begin().await.unwrap();
        registration.execute(insert(&format!("eve{committed}"), &address)).await.unwrap();
        let importing = async {
            let mut other = service.db.acquire().await.unwrap();
            other.execute(insert(&address, &format!("x{committed}@corp.org"))).await.map(|_| ())
        };
        let ending = async {
            let waiting = "select count(*) from pg_locks where locktype = 'advisory' and not granted
                              and database = (select oid from pg_database where datname = current_database())";
            service.until_count(waiting, 1).await;
            match committed {
                true => registration.commit().await.unwrap(),
                false => registration.rollback().await.unwrap(),
            }
        };
        let (imported, ()) = tokio::join!(importing, ending);
        let violated = imported.err().and_then(|error| error.as_database_error()?.constraint().map(str::to_owned));
        assert_eq!(violated.as_deref(), committed.then_some("auth_users_username_no_email"));
    }
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn registrations_do_not_wait_for_each_other_over_their_names() {
    let service = TestService::with_roles(&[Role::Http]).await;
    let mut conn = PgConnection::connect_with(&PARTS.connect_options(&service.database)).await.unwrap();
    let mut open = conn.begin().await.unwrap();
    open.execute(insert("slow", "slow@corp.org")).await.unwrap();
    let answers = join_all((0..8).map(|n| {
        let service = &service;
        async move { register(service, &format!("user{n}"), &format!("user{n}@corp.org")).await }
    }))
    .await;
    assert!(answers.iter().all(Result::is_ok), "{answers:?}");
    open.rollback().await.unwrap();
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pairs_that_were_there_before_are_listed_and_keep_what_they_have() {
    let original = Original::new().await;
    let named = original.user("Ada@Corp.org", "ada@elsewhere.example", BCRYPTJS_2).await;
    let addressed = original.user("ada", "ada@corp.ORG", BCRYPTJS_2).await;
    let vars = base_vars(&original.database, "");
    for round in 0..2 {
        let (status, said, warned) = process::run(&["migrate"], &vars).await;
        assert_eq!(status, 0, "{warned}");
        assert!(said.contains("up to date"), "{said}");
        let line = format!(
            "ada@corp.org is the username of user {named} and the e-mail address of user {addressed}. Both keep it"
        );
        assert!(warned.contains(&line), "round {round}: {warned}");
    }
    let kept: Vec<String> =
        sqlx::query_scalar("select username from auth_users order by id").fetch_all(&original.db).await.unwrap();
    assert_eq!(kept, ["Ada@Corp.org", "ada"]);
    sqlx::query("update auth_users set is_verified = false, password_hash = 'x'").execute(&original.db).await.unwrap();
    // The replaced service, started once more, drops our columns; they can be given anew.
    sqlx::raw_sql("alter table auth_users drop column username_canonical, drop column email_canonical")
        .execute(&original.db)
        .await
        .unwrap();
    migrations::run(&PARTS.connect_options(&original.database)).await.unwrap();
    let canonical: Vec<(String, String)> =
        sqlx::query_as("select username_canonical, email_canonical from auth_users order by id")
            .fetch_all(&original.db)
            .await
            .unwrap();
    assert_eq!((canonical[0].0.as_str(), canonical[1].1.as_str()), ("ada@corp.org", "ada@corp.org"));
}

//! The tables of the service this one replaces, as Sequelize made them, adopted in place.

use auth_proto::{
    auth::v1::{RefreshAccessTokenRequest, token_service_client::TokenServiceClient},
    legacy::token::{RefreshTokenRequest, token_client::TokenClient},
};
use reqwest::Method;
use serde_json::{Value, json};

use crate::support::{
    TestService,
    browser::{Browser, code},
    original::{BCRYPTJS, BCRYPTJS_2, Original},
};

async fn login(service: &TestService, identifier: &str) -> (u16, Value) {
    let body = json!({ "identifier": identifier, "password": "a long enough secret" });
    let response = service.post("/auth/login", body).await;
    (response.status().as_u16(), response.json().await.expect("JSON"))
}

#[tokio::test(flavor = "multi_thread")]
async fn adopted_users_keep_their_ids_and_sign_in_with_the_passwords_they_had() {
    let original = Original::new().await;
    sqlx::query("select setval('auth_users_id_seq', 41)").execute(&original.db).await.unwrap();
    let ada = original.user("Ada", "Ada@Example.com", BCRYPTJS).await;
    let bob = original.user("bob the builder", "bob@localhost", BCRYPTJS_2).await;
    sqlx::query("update auth_users set is_verified = null where id = $1")
        .bind(bob)
        .execute(&original.db)
        .await
        .unwrap();
    let service = original.adopted().await;
    assert_eq!((ada, bob), (42, 43));
    for (identifier, id, username, verified) in [
        ("ada", ada, "Ada", true),
        ("ADA@example.com", ada, "Ada", true),
        ("Bob The Builder", bob, "bob the builder", false),
        ("bob@localhost", bob, "bob the builder", false),
    ] {
        let (status, body) = login(&service, identifier).await;
        assert_eq!(status, 200, "{identifier}: {body}");
        let data = &body["data"];
        assert_eq!(
            (&data["id"], &data["username"], &data["isVerified"]),
            (&json!(id), &json!(username), &json!(verified))
        );
    }
    let hashes: Vec<String> =
        sqlx::query_scalar("select password_hash from auth_users").fetch_all(&original.db).await.unwrap();
    assert!(hashes.iter().all(|hash| hash.starts_with("v1$")), "upgraded at login: {hashes:?}");
    assert_eq!(
        service.count("select count(*) from auth_users where status = 'active' and create_saga_id is null").await,
        2
    );
    assert_eq!(
        service.count(r#"select count(*) from auth_users where "createdAt" = '2024-02-29 12:00:00+00'"#).await,
        2
    );
    let wrong = service.post("/auth/login", json!({ "identifier": "ada", "password": "another secret" })).await;
    assert_eq!(wrong.status(), 401);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_names_of_adopted_users_are_taken_and_new_ids_follow_theirs() {
    let original = Original::new().await;
    let ada = original.user("Ada", "Ada@Example.com", BCRYPTJS).await;
    // sync({ alter: true }) makes one more of these at every start.
    sqlx::raw_sql(
        "alter table auth_users add constraint auth_users_username_key1 unique (username);
         create unique index auth_users_email on auth_users (email)",
    )
    .execute(&original.db)
    .await
    .unwrap();
    let service = original.adopted().await;
    for (username, email, expected) in [
        ("Ada", "other@example.com", "USERNAME_ALREADY_EXISTS"),
        ("aDA", "other@example.com", "USERNAME_ALREADY_EXISTS"),
        ("other", "Ada@Example.com", "EMAIL_ALREADY_EXISTS"),
        ("other", "ada@example.com", "EMAIL_ALREADY_EXISTS"),
    ] {
        let body = json!({ "username": username, "email": email, "password": "a long enough secret" });
        let response = service.post("/auth/register", body).await;
        assert_eq!(response.status(), 409, "{username} {email}");
        assert_eq!(code(&response.json().await.unwrap()), expected);
    }
    assert!(service.registered("eve").await["id"].as_i64().unwrap() > i64::from(ada));
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn names_beyond_ascii_are_found_however_they_are_typed() {
    let original = Original::new().await;
    let joerg = original.user("JÖRG", "ANNA@BÜCHER.example", BCRYPTJS_2).await;
    let service = original.adopted().await;
    for identifier in ["JÖRG", "jörg", "anna@bücher.example", "anna@xn--bcher-kva.example", "ANNA@BÜCHER.EXAMPLE"] {
        let (status, body) = login(&service, identifier).await;
        assert_eq!((status, &body["data"]["id"]), (200, &json!(joerg)), "{identifier}: {body}");
    }
    let taken =
        json!({ "username": "anna", "email": "anna@xn--bcher-kva.example", "password": "a long enough secret" });
    assert_eq!(service.post("/auth/register", taken).await.status(), 409);
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stored_refresh_tokens_still_refresh_and_are_exchanged_at_first_use() {
    let original = Original::new().await;
    let ada = original.user("ada", "ada@example.com", BCRYPTJS_2).await;
    let (by_rest, by_grpc) = (original.session(ada, 3600).await, original.session(ada, 7200).await);
    let spent = original.session(ada, 8 * 86_400).await;
    let service = original.adopted().await;

    let browser = Browser::default();
    browser.set("refreshToken", &by_rest);
    let me = browser.get(&service, "/auth/me").await;
    assert_eq!(me.status(), 200, "the access token is renewed on the way");
    assert_eq!(service.count("select count(*) from refresh_tokens where generation > 0").await, 0);
    assert_eq!(browser.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
    assert_ne!(browser.cookie("refreshToken"), by_rest);
    assert_eq!(service.count("select count(*) from refresh_tokens where generation = 1").await, 1);

    let refresh_token = by_grpc.clone();
    let mut legacy = TokenClient::connect(service.grpc.clone()).await.unwrap();
    assert!(
        !legacy.refresh_token(RefreshTokenRequest { refresh_token }).await.unwrap().get_ref().access_token.is_empty()
    );
    assert_eq!(service.count("select count(*) from refresh_tokens where generation = 1").await, 1, "not exchanged");
    let mut tokens = TokenServiceClient::connect(service.grpc.clone()).await.unwrap();
    let mut refresh = async |token: &str| {
        tokens.refresh_access_token(RefreshAccessTokenRequest { refresh_token: token.to_owned() }).await
    };
    let exchanged = refresh(&by_grpc).await.unwrap().into_inner();
    assert_eq!(service.count("select count(*) from refresh_tokens where generation = 1").await, 2);
    refresh(&exchanged.refresh_token).await.unwrap();
    let over = refresh(&spent).await.unwrap_err();
    assert_eq!(over.code(), tonic::Code::Unauthenticated);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 3, "no row is lost");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_usable_token_is_left_in_any_column() {
    let original = Original::new().await;
    let ada = original.user("ada", "ada@example.com", BCRYPTJS_2).await;
    let token = original.session(ada, 60).await;
    assert!(original.everything().await.to_string().contains(&token));
    original.migrate().await.unwrap();
    let left = original.everything().await.to_string();
    let signature = token.rsplit('.').next().unwrap();
    assert!(!left.contains(signature) && !left.contains("\"token\""));
    // Nor behind the columns: what a dropped one held stays in its row.
    let size: i32 =
        sqlx::query_scalar("select pg_column_size(t.*) from refresh_tokens t").fetch_one(&original.db).await.unwrap();
    assert!(size < 300, "{size} bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_two_sign_ins_of_one_second_share_is_adopted_once() {
    let original = Original::new().await;
    let ada = original.user("ada", "ada@example.com", BCRYPTJS_2).await;
    let token = original.session(ada, 60).await;
    assert_eq!(original.session(ada, 60).await, token);
    let service = original.adopted().await;
    let browser = Browser::default();
    browser.set("refreshToken", token);
    assert_eq!(browser.send(&service, Method::POST, "/auth/refresh", None).await.status(), 200);
    assert_eq!(service.count("select count(*) from refresh_tokens").await, 2, "no row is lost");
    service.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn migrating_twice_changes_nothing_more() {
    let original = Original::new().await;
    let ada = original.user("Ada", "Ada@Example.com", BCRYPTJS).await;
    original.session(ada, 60).await;
    assert!(original.migrate().await.unwrap() > 0);
    let once = original.everything().await;
    assert_eq!(original.migrate().await, Ok(0));
    assert_eq!(original.everything().await, once);
    sqlx::query("delete from auth_users").execute(&original.db).await.unwrap();
    let sessions: i64 =
        sqlx::query_scalar("select count(*) from refresh_tokens").fetch_one(&original.db).await.unwrap();
    assert_eq!(sessions, 0, "the reference cascades, whatever it did before");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_that_differ_only_in_case_are_listed_and_nothing_is_changed() {
    let original = Original::new().await;
    for (username, email) in [
        ("ada", "ada@example.com"),
        ("Ada", "ada.two@example.com"),
        ("bob", "bob@example.com"),
        ("bobby", "BOB@example.com"),
        ("jörg", "joerg@example.com"),
        ("JÖRG", "joerg.two@example.com"),
    ] {
        let id = original.user(username, email, BCRYPTJS_2).await;
        original.session(id, 60).await;
    }
    let before = original.everything().await;
    let told = original.migrate().await.unwrap_err();
    for part in [
        "username",
        "ada: id 1, id 2",
        "jörg: id 5, id 6",
        "email",
        "bob@example.com: id 3, id 4",
        "nothing was changed",
    ] {
        assert!(told.contains(part), "{part:?} is not in: {told}");
    }
    assert_eq!(original.everything().await, before);
    assert_eq!(original.migrate().await.unwrap_err(), told, "told again, and no lock was left");

    // The operator decides.
    sqlx::query("update auth_users set username = 'ada2' where id = 2").execute(&original.db).await.unwrap();
    sqlx::query("update auth_users set email = 'bobby@example.com' where id = 4").execute(&original.db).await.unwrap();
    sqlx::query("delete from refresh_tokens where user_id = 6").execute(&original.db).await.unwrap();
    sqlx::query("delete from auth_users where id = 6").execute(&original.db).await.unwrap();
    let service = original.adopted().await;
    assert_eq!(login(&service, "ADA2").await.0, 200);
    service.stop().await;
}

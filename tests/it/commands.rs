//! The commands an operator types, as they end and what they say.

use std::collections::BTreeSet;

use auth_service::app::Role;
use tokio::net::TcpListener;

use crate::support::{
    TestService, join_all,
    parts::PARTS,
    process::{production_vars, run},
    service::Wishes,
};

#[tokio::test(flavor = "multi_thread")]
async fn four_processes_migrate_one_empty_database_at_once() {
    let database = PARTS.bare_database().await;
    let vars = [("DATABASE_URL".to_owned(), PARTS.database_url(&database))];
    let ended = join_all((0..4).map(|_| run(&["migrate"], &vars))).await;
    for (code, said, complaint) in &ended {
        assert_eq!((*code, complaint.as_str()), (0, ""), "{said}");
        assert!(said.contains("the schema is up to date"), "{said}");
    }
    let applied = ended.iter().filter(|(_, said, _)| said.contains("applied")).count();
    assert_eq!(applied, 1, "one of them did it all: {ended:?}");
    let (code, said, _) = run(&["migrate"], &vars).await;
    assert_eq!((code, said.as_str()), (0, "the schema is up to date\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn migrate_needs_the_database_alone_and_says_when_it_is_not_there() {
    let (code, _, complaint) = run(&["migrate"], &[]).await;
    assert_eq!(code, 2);
    assert!(complaint.contains("DATABASE_URL"), "{complaint}");
    let nobody = [("DATABASE_URL".to_owned(), "postgres://ada:hush-hush-word@127.0.0.1:1/auth".to_owned())];
    let (code, _, complaint) = run(&["migrate"], &nobody).await;
    assert_eq!(code, 1);
    assert!(complaint.contains("the database") && !complaint.contains("hush-hush-word"), "{complaint}");
    assert_eq!(complaint.lines().count(), 1, "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn check_config_tells_every_error_at_once_and_no_secret() {
    let secrets = ["hush-private-key", "hush-token-hash", "hush-password", "hush-short"];
    let vars = [
        ("DATABASE_URL", "postgres://ada:hush-password@db:notaport/auth"),
        ("DB_DIALECT", "mysql"),
        ("KAFKA_BROKERS", "broker:not-a-port"),
        ("ACCESS_TOKEN_PRIVATE_KEY", "-----BEGIN PRIVATE KEY-----\\nhush-private-key\\n-----END PRIVATE KEY-----"),
        ("REFRESH_TOKEN_PRIVATE_KEY_FILE", "/nowhere/refresh.pem"),
        ("ACCESS_TOKEN_EXPIRES_IN", "soon"),
        ("SALT_ROUNDS", "99"),
        ("PORT", "http"),
        ("GRPC_PORT", "70000"),
        ("ADMIN_TOKENS", "root:everything:hush-token-hash"),
        ("GRPC_CALLER_TOKENS", "gateway:hush-token-hash"),
        ("PASSWORD_PEPPER", "hush-short"),
        ("COOKIE_SECURE", "perhaps"),
        ("SOMETHING_OF_THE_ORIGINAL", "is nobody's error"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    let (code, said, complaint) = run(&["check-config"], &vars).await;
    assert_eq!(code, 2, "{complaint}");
    let told: BTreeSet<&str> = complaint.lines().filter_map(|line| line.split(' ').next()).collect();
    for (name, _) in &vars[..13] {
        assert!(told.contains(name.as_str()), "{name} is not in:\n{complaint}");
    }
    assert!(!told.contains("SOMETHING_OF_THE_ORIGINAL"));
    for secret in secrets {
        assert!(!complaint.contains(secret) && !said.contains(secret), "{secret} is in:\n{complaint}{said}");
    }
    // The same, and nothing more, keeps `serve` from starting.
    assert_eq!(run(&["serve"], &vars).await, (2, String::new(), complaint));
}

#[tokio::test(flavor = "multi_thread")]
async fn check_config_shows_what_is_in_force_and_hides_every_secret() {
    let database = PARTS.bare_database().await;
    let url = PARTS.database_url(&database);
    let pepper = "a pepper nobody may see";
    let vars = production_vars(&database, "", &[("PASSWORD_PEPPER", pepper), ("ACCESS_TOKEN_EXPIRES_IN", "900")]);
    let (code, said, complaint) = run(&["check-config"], &vars).await;
    assert_eq!((code, complaint.as_str()), (0, ""));
    assert!(said.lines().any(|line| line == "ACCESS_TOKEN_EXPIRES_IN=15m"), "{said}");
    assert!(said.lines().any(|line| line == "REFRESH_TOKEN_EXPIRES_IN=7days  # default"), "{said}");
    let password = url.split(['@', '/', ':']).nth(4).expect("a password");
    let value = |name: &str| vars.iter().find(|(known, _)| known == name).map(|(_, value)| value.as_str()).unwrap();
    let key_line = value("ACCESS_TOKEN_PRIVATE_KEY").lines().nth(3).expect("a line of the key");
    let hash = value("GRPC_CALLER_TOKENS").rsplit(':').next().unwrap();
    for secret in [password, pepper, key_line, hash] {
        assert!(secret.len() > 8 && !said.contains(secret), "{secret} is in:\n{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn healthcheck_succeeds_only_where_an_instance_is_ready() {
    let service =
        TestService::with(Wishes { roles: Some(vec![Role::Http]), no_topics: true, ..Wishes::default() }).await;
    let port = service.http.rsplit(':').next().unwrap().to_owned();
    let vars = [("PORT".to_owned(), port)];
    assert_eq!(run(&["healthcheck"], &vars).await, (0, String::new(), String::new()));
    let url = format!("{}/auth/health/live", service.http);
    assert_eq!(run(&["healthcheck", "--url", &url], &[]).await.0, 0);

    service.cut_database().await;
    let (code, _, complaint) = run(&["healthcheck"], &vars).await;
    assert_eq!(code, 1);
    assert!(complaint.contains("503") && complaint.contains("database"), "{complaint}");
    service.mend_database().await;
    service.stop().await;
    let (code, _, complaint) = run(&["healthcheck"], &vars).await;
    assert_eq!(code, 1, "nobody listens");
    assert!(!complaint.is_empty());
    let (code, ..) = run(&["healthcheck"], &[("PORT".to_owned(), "x".to_owned())]).await;
    assert_eq!(code, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn serve_on_a_database_without_the_schema_says_to_migrate() {
    let database = PARTS.bare_database().await;
    let (code, _, complaint) = run(&["serve"], &production_vars(&database, "", &[])).await;
    assert_eq!(code, 1);
    assert!(complaint.contains("run `auth-service migrate`"), "{complaint}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_port_that_is_taken_is_one_clear_sentence() {
    let database = PARTS.database().await;
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    for variable in ["PORT", "GRPC_PORT", "ADMIN_PORT"] {
        let (code, said, complaint) = run(&["serve"], &production_vars(&database, "", &[(variable, &port)])).await;
        assert_eq!((code, said.as_str()), (1, ""));
        let sentences: Vec<&str> = complaint.lines().filter(|line| line.starts_with("auth-service:")).collect();
        assert_eq!(sentences.len(), 1, "{complaint}");
        for part in [&port, variable, "free port"] {
            assert!(sentences[0].contains(part), "{part:?} is not in {complaint}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_word_that_is_no_command_or_role_is_told_with_those_that_are() {
    let (code, _, complaint) = run(&["serve", "--role", "http,everything"], &[]).await;
    assert_eq!(code, 2);
    assert!(complaint.contains("housekeeping"), "{complaint}");
    assert_eq!(run(&["serv"], &[]).await.0, 2);
}

//! A secret in whichever variable: no output shows it.

use std::{collections::BTreeSet, fs};

use crate::support::{
    parts::PARTS,
    process::{production_vars, run},
};

const CANARY: &str = "s3cret-canary-7Qx";
/// Free text: what stands there is what the operator wants to see, and means.
const FREE_TEXT: [&str; 12] = [
    "DB_DATABASE",
    "DB_USERNAME",
    "DB_HOST",
    "KAFKA_BROKERS",
    "KAFKA_GROUP_ID",
    "KAFKA_CLIENT_ID",
    "KAFKA_TOPIC_PREFIX",
    "KAFKA_EVENT_SOURCE",
    "TOKEN_ISSUER",
    "ACCESS_TOKEN_AUDIENCE",
    "SAGA_PARTICIPANT",
    // Without a scheme it is a host name.
    "USER_SERVICE_GRPC_URL",
];

/// Every variable of `.env.example`, without the `_FILE` at its end.
fn variables() -> BTreeSet<String> {
    let text = include_str!("../../.env.example");
    let names = text.lines().filter_map(|line| line.split_once('=')).map(|(name, _)| name.trim_start_matches('#'));
    let ours = names.filter(|name| !name.is_empty() && !name.contains(' '));
    ours.map(|name| name.trim_end_matches("_FILE").to_owned()).collect()
}

async fn shown(name: &str, value: &str) -> String {
    let mut vars = production_vars("none", "secrets.", &[]);
    let both = name.strip_suffix("_FILE");
    vars.retain(|(known, _)| known != name && Some(known.as_str()) != both);
    // Nothing else may keep it from being used.
    let of_database = ["DB_HOST", "DB_PORT", "DB_DATABASE", "DB_USERNAME", "DB_PASSWORD"];
    if of_database.contains(&name.trim_end_matches("_FILE")) {
        vars.retain(|(known, _)| known != "DATABASE_URL");
        vars.extend(
            of_database.iter().filter(|known| **known != name).take(1).map(|known| (known.to_string(), "x".to_owned())),
        );
    }
    vars.push((name.to_owned(), value.to_owned()));
    let (_, stdout, stderr) = run(&["check-config"], &vars).await;
    format!("{stdout}{stderr}")
}

#[tokio::test(flavor = "multi_thread")]
async fn no_variable_shows_a_secret_that_was_put_into_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let pem = format!("-----BEGIN PRIVATE KEY-----\n{CANARY}\n-----END PRIVATE KEY-----");
    let path = dir.path().join("secret");
    fs::write(&path, CANARY).expect("written");
    let mut shown_by = BTreeSet::new();
    for name in variables() {
        let mut values = vec![
            format!("http://user:{CANARY}@host:1/"),
            format!("postgres://user:{CANARY}@host:1/db"),
            format!("user:{CANARY}@host:1"),
            format!("http://user:{CANARY}/x@host:1/"),
            pem.clone(),
        ];
        if !FREE_TEXT.contains(&name.as_str()) && name != "RUST_LOG" {
            values.push(CANARY.to_owned());
        }
        for value in &values {
            if shown(&name, value).await.contains(CANARY) {
                shown_by.insert(format!("{name}={value}"));
            }
        }
        for value in [CANARY, &pem, path.to_str().expect("UTF-8")] {
            let name = format!("{name}_FILE");
            if shown(&name, value).await.contains(CANARY) {
                shown_by.insert(format!("{name}={value}"));
            }
        }
    }
    assert_eq!(shown_by, BTreeSet::new());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_that_fails_shows_no_secret() {
    let url = PARTS.database_url(&PARTS.database().await);
    let wrong_password = url.replacen("://", "://nobody:", 1).replacen(":nobody:", ":", 1);
    for (name, value) in [
        ("DATABASE_URL", format!("postgres://nobody:{CANARY}@127.0.0.1:1/none")),
        ("DATABASE_URL", format!("{wrong_password}?password={CANARY}")),
        ("GRPC_TLS_KEY", format!("-----BEGIN PRIVATE KEY-----\\n{CANARY}\\n-----END PRIVATE KEY-----")),
        ("USER_SERVICE_GRPC_URL", format!("http://user:{CANARY}@host:99999")),
        ("ADMIN_TOKENS", CANARY.to_owned()),
    ] {
        let mut vars = production_vars("none", "secrets.", &[(name, &value)]);
        // Held by nobody but taken by the port before it: the start ends by itself.
        vars.retain(|(known, _)| known != "PORT" && known != "ADMIN_PORT");
        let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
        vars.push(("ADMIN_PORT".to_owned(), taken.local_addr().expect("bound").port().to_string()));
        vars.push(("PORT".to_owned(), "0".to_owned()));
        let (code, stdout, stderr) = run(&["serve"], &vars).await;
        assert_ne!(code, 0);
        assert!(!stdout.contains(CANARY) && !stderr.contains(CANARY), "{name}\n{stdout}{stderr}");
    }
}

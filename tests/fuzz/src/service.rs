//! The service without its surroundings: real configuration, keys and routes, a database that is closed. Whatever gets
//! as far as the database is answered as unavailable.

use std::sync::LazyLock;

use auth_service::{
    app::App,
    config::{Config, Profile},
    crypto::{PemPair, generate_pair, install_provider},
    domain::{Session, User, UserId, UserStatus},
    fuzzing,
};
use chrono::{DateTime, TimeDelta, Utc};
use metrics_exporter_prometheus::PrometheusBuilder;
use secrecy::ExposeSecret;
use tokio::runtime::{Builder, Runtime};
use uuid::Uuid;

/// SHA-256 of "m-secret".
const SECRET_HASH: &str = "f1364c670dfc85c9a5b02b4b9d5068c4bad383f0cccd5d5af28120a7f5cd2624";

pub static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_all().build().expect("a runtime"));

pub struct Keys {
    pub access: PemPair,
    pub refresh: PemPair,
}

pub static KEYS: LazyLock<Keys> = LazyLock::new(|| {
    install_provider();
    let pair = || generate_pair(2048).expect("a pair of keys");
    Keys { access: pair(), refresh: pair() }
});

pub static APP: LazyLock<App> = LazyLock::new(|| {
    let config = Config::from_vars(variables(), Profile::Dev).expect("a good configuration");
    let _inside = RUNTIME.enter();
    let app = fuzzing::app(config, PrometheusBuilder::new().build_recorder().handle()).expect("the service");
    RUNTIME.block_on(app.db.close());
    app
});

/// The least a service needs, plus one admin, one caller and one foreign front end.
pub fn variables() -> Vec<(String, String)> {
    let keys = &*KEYS;
    let variables = [
        ("DATABASE_URL", "postgres://auth:c4nary-db@127.0.0.1:1/auth"),
        ("KAFKA_BROKERS", "127.0.0.1:1"),
        ("ACCESS_TOKEN_PRIVATE_KEY", keys.access.private.expose_secret()),
        ("ACCESS_TOKEN_PUBLIC_KEY", &keys.access.public),
        ("REFRESH_TOKEN_PRIVATE_KEY", keys.refresh.private.expose_secret()),
        ("REFRESH_TOKEN_PUBLIC_KEY", &keys.refresh.public),
        ("SALT_ROUNDS", "4"),
        ("COOKIE_SECURE", "false"),
        ("REST_REFRESH_ENABLED", "true"),
        ("CORS_ORIGINS", "https://app.example"),
        ("ADMIN_TOKENS", &format!("ops:admin:{SECRET_HASH}")),
        ("GRPC_CALLER_TOKENS", &format!("mail:{SECRET_HASH}")),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()));
    variables.into()
}

/// Good tokens of one session, for inputs that name them.
pub static TOKENS: LazyLock<[String; 2]> = LazyLock::new(|| {
    let signer = &APP.signer;
    let now = Utc::now();
    let session = Session {
        id: 1,
        session_id: Uuid::from_u128(1),
        user_id: UserId(7),
        generation: 3,
        jti: Uuid::from_u128(2),
        kid: signer.refresh_kid().to_owned(),
        issued_at: now,
        expires_at: now + TimeDelta::days(7),
        absolute_expires_at: now + TimeDelta::days(30),
        rotated_at: None,
        earlier_rotations: vec![],
        revoked_at: None,
        revoked_reason: None,
    };
    let user = User {
        id: UserId(7),
        username: "Anna".to_owned(),
        email: "anna@example.com".to_owned(),
        is_verified: false,
        status: UserStatus::Active,
        create_saga_id: None,
        created_at: DateTime::UNIX_EPOCH,
    };
    let tokens = [signer.sign_access(&user, &session, now), signer.sign_refresh(&session)];
    tokens.map(|token| token.expect("a token").token.expose_secret().to_owned())
});

/// What an input can't make up: `{access}` and `{refresh}` stand for good tokens.
pub fn filled_in(text: &[u8]) -> Vec<u8> {
    let mut text = text.to_vec();
    for (name, token) in [b"{access}".as_slice(), b"{refresh}"].into_iter().zip(&*TOKENS) {
        while let Some(at) = text.windows(name.len()).position(|window| window == name) {
            text.splice(at..at + name.len(), token.bytes());
        }
    }
    text
}

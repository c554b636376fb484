use chrono::TimeDelta;
use jsonwebtoken::EncodingKey;
use proptest::prelude::*;
use secrecy::ExposeSecret;
use serde_json::{Value, json};

use super::*;
use crate::crypto::test_keys::{FIRST, SECOND};
use crate::domain::{RequestTime, UserId, UserStatus};

fn signer() -> TokenSigner {
    let access = KeyRing::load("access", &FIRST.private, &FIRST.public).expect("loads");
    let refresh = KeyRing::load("refresh", &SECOND.private, &SECOND.public).expect("loads");
    TokenSigner::new(access, refresh, settings()).expect("different keys")
}

fn settings() -> TokenSettings {
    TokenSettings {
        issuer: "auth-service".into(),
        access_audience: "fleet".into(),
        refresh_audience: "auth-service/refresh".into(),
        access_ttl: Duration::from_secs(900),
        refresh_ttl: Duration::from_secs(7 * 86_400),
        session_ttl: Duration::from_secs(30 * 86_400),
        reuse_window: Duration::from_secs(30),
    }
}

fn user() -> User {
    User {
        id: UserId(7),
        username: "Anna".into(),
        email: "Anna@example.com".into(),
        is_verified: false,
        status: UserStatus::Active,
        create_saga_id: None,
        created_at: Utc::now(),
    }
}

fn session(signer: &TokenSigner) -> Session {
    let now = Utc::now();
    Session {
        id: 1,
        session_id: Uuid::now_v7(),
        user_id: UserId(7),
        generation: 3,
        jti: Uuid::now_v7(),
        kid: signer.refresh_kid().to_owned(),
        issued_at: now,
        expires_at: now + TimeDelta::days(7),
        absolute_expires_at: now + TimeDelta::days(30),
        rotated_at: None,
        earlier_rotations: vec![],
        revoked_at: None,
        revoked_reason: None,
    }
}

/// A token as a forger would make it who has got hold of the access key.
fn forged(header: Value, claims: &Value) -> String {
    let part = |json: &Value| URL_SAFE_NO_PAD.encode(json.to_string());
    let message = format!("{}.{}", part(&header), part(claims));
    let ring = KeyRing::load("access", &FIRST.private, &FIRST.public).expect("loads");
    let signature = ring.sign(ring.kid(), message.as_bytes()).expect("signs");
    format!("{message}.{signature}")
}

fn good_header(signer: &TokenSigner) -> Value {
    json!({"typ": "at+jwt", "alg": "RS256", "kid": signer.0.access.kid()})
}

fn good_claims() -> Value {
    let now = Utc::now().timestamp();
    json!({
        "id": 7, "username": "Anna", "email": "a@example.com", "sub": "7",
        "sid": Uuid::nil(), "jti": Uuid::nil(), "iss": "auth-service", "aud": "fleet",
        "iat": now, "nbf": now, "exp": now + 900,
    })
}

fn with(mut json: Value, field: &str, value: Value) -> Value {
    json[field] = value;
    json
}

fn without(mut json: Value, field: &str) -> Value {
    json.as_object_mut().expect("an object").remove(field);
    json
}

#[test]
fn an_access_token_says_who_signed_in() {
    let signer = signer();
    let session = session(&signer);
    let token = signer.sign_access(&user(), &session, Utc::now()).expect("signed");
    let claims = signer.verify_access(token.token.expose_secret()).expect("good");
    assert_eq!((claims.id, claims.sub.as_str(), claims.username.as_str()), (7, "7", "Anna"));
    assert_eq!((claims.sid, claims.aud.as_str()), (session.session_id, "fleet"));
    assert_eq!(claims.exp - claims.iat, 900);
    assert_eq!(token.expires_at.timestamp(), claims.exp);
}

#[test]
fn a_refresh_token_is_made_again_byte_for_byte() {
    let (here, there) = (signer(), signer());
    let session = session(&here);
    let first = here.sign_refresh(&session).expect("signed");
    // Another replica, and the row as the database gives it back.
    let mut row = session.clone();
    row.issued_at = DateTime::from_timestamp_micros(session.issued_at.timestamp_micros()).expect("in range");
    let second = there.sign_refresh(&row).expect("signed");
    assert_eq!(first.token.expose_secret(), second.token.expose_secret());
    let claims = here.verify_refresh(first.token.expose_secret()).expect("good");
    assert_eq!((claims.generation, claims.sid, claims.jti), (3, session.session_id, session.jti));
    let next = Session { generation: 4, ..session };
    assert_ne!(here.sign_refresh(&next).expect("signed").token.expose_secret(), first.token.expose_secret());
}

#[test]
fn an_access_token_never_outlives_its_session() {
    let signer = signer();
    let mut session = session(&signer);
    session.absolute_expires_at = Utc::now() + TimeDelta::seconds(60);
    let token = signer.sign_access(&user(), &session, Utc::now()).expect("signed");
    assert_eq!(token.expires_at.timestamp(), session.absolute_expires_at.timestamp());
}

#[test]
fn one_kind_is_never_taken_for_the_other() {
    let signer = signer();
    let session = session(&signer);
    let access = signer.sign_access(&user(), &session, Utc::now()).expect("signed").token;
    let refresh = signer.sign_refresh(&session).expect("signed").token;
    assert!(signer.verify_access(access.expose_secret()).is_ok());
    assert_eq!(signer.verify_access(refresh.expose_secret()), Err(TokenError::Invalid));
    assert_eq!(signer.verify_refresh(access.expose_secret()), Err(TokenError::Invalid));
    assert!(signer.verify_refresh(refresh.expose_secret()).is_ok());
    // Nor is a refresh-shaped payload under the access key, whatever it says of itself.
    let claims = with(with(good_claims(), "gen", json!(0)), "aud", json!("auth-service/refresh"));
    for kind in ["at+jwt", "rt+jwt", "JWT"] {
        let token = forged(with(good_header(&signer), "typ", json!(kind)), &claims);
        assert_eq!(signer.verify_refresh(&token), Err(TokenError::Invalid), "{kind}");
        assert_eq!(signer.verify_access(&token), Err(TokenError::Invalid), "{kind}");
        assert_eq!(signer.verify_legacy_refresh(&token), Err(TokenError::Invalid), "{kind}");
    }
}

#[test]
fn one_key_for_both_kinds_is_refused() {
    let ring = || KeyRing::load("access", &FIRST.private, &FIRST.public).expect("loads");
    assert_eq!(TokenSigner::new(ring(), ring(), settings()).expect_err("shared"), KeyError::Shared);
}

#[test]
fn only_rs256_is_accepted() {
    let signer = signer();
    assert!(signer.verify_access(&forged(good_header(&signer), &good_claims())).is_ok());
    for alg in ["none", "None", "HS256", "RS384", "RS512", "PS256", "ES256", "EdDSA", ""] {
        let token = forged(with(good_header(&signer), "alg", json!(alg)), &good_claims());
        assert_eq!(signer.verify_access(&token), Err(TokenError::Invalid), "{alg}");
        let (message, _) = token.rsplit_once('.').expect("three parts");
        assert_eq!(signer.verify_access(&format!("{message}.")), Err(TokenError::Invalid), "{alg}, unsigned");
    }
    let der = pem::parse(&FIRST.public).expect("PEM").into_contents();
    let jwk = serde_json::to_vec(&signer.jwks().keys[0]).expect("JSON");
    let mut header = Header::new(Algorithm::HS256);
    header.typ = Some(ACCESS_TYPE.into());
    header.kid = Some(signer.0.access.kid().into());
    for secret in [FIRST.public.as_bytes(), der.as_slice(), jwk.as_slice()] {
        let token = jsonwebtoken::encode(&header, &good_claims(), &EncodingKey::from_secret(secret)).expect("signed");
        assert_eq!(signer.verify_access(&token), Err(TokenError::Invalid));
    }
    let rsa = EncodingKey::from_rsa_pem(FIRST.private.expose_secret().as_bytes()).expect("a key");
    for algorithm in [Algorithm::RS384, Algorithm::RS512, Algorithm::PS256] {
        header.alg = algorithm;
        let token = jsonwebtoken::encode(&header, &good_claims(), &rsa).expect("signed");
        assert_eq!(signer.verify_access(&token), Err(TokenError::Invalid), "{algorithm:?}");
    }
}

#[test]
fn what_we_sign_is_what_the_library_would_sign() {
    let signer = signer();
    let mut header = Header::new(Algorithm::RS256);
    header.typ = Some(ACCESS_TYPE.into());
    header.kid = Some(signer.0.access.kid().into());
    let rsa = EncodingKey::from_rsa_pem(FIRST.private.expose_secret().as_bytes()).expect("a key");
    let theirs = jsonwebtoken::encode(&header, &good_claims(), &rsa).expect("signed");
    let ours = sign(&signer.0.access, signer.0.access.kid(), ACCESS_TYPE, &good_claims(), 0).expect("signed");
    assert_eq!(ours.token.expose_secret(), theirs);
}

#[test]
fn every_claim_must_be_there_and_of_its_type() {
    let signer = signer();
    let refused = |claims: Value, what: &str| {
        let outcome = signer.verify_access(&forged(good_header(&signer), &claims));
        assert!(outcome.is_err(), "{what} was accepted");
    };
    let fields: Vec<String> = good_claims().as_object().expect("an object").keys().cloned().collect();
    for field in fields {
        refused(without(good_claims(), &field), &format!("no {field}"));
        refused(with(good_claims(), &field, Value::Null), &format!("{field} null"));
        refused(with(good_claims(), &field, json!([])), &format!("{field} an empty list"));
    }
    let now = Utc::now().timestamp();
    for field in ["exp", "nbf", "iat"] {
        for value in [json!(now.to_string()), json!(1e30), json!(now as f64 + 0.5), json!({})] {
            refused(with(good_claims(), field, value.clone()), &format!("{field} {value}"));
        }
    }
    for (field, value) in [
        ("aud", json!("others")),
        ("aud", json!(["fleet"])),
        ("aud", json!(["fleet", "others"])),
        ("aud", json!(7)),
        ("iss", json!("others")),
        ("iss", json!(["auth-service"])),
        ("iss", json!(5)),
        ("sub", json!(7)),
        ("exp", json!(-1)),
        ("sid", json!("session")),
    ] {
        refused(with(good_claims(), field, value.clone()), &format!("{field} {value}"));
    }
}

#[test]
fn a_token_whose_time_has_passed_is_told_by_the_clock_it_is_held_against() {
    let signer = signer();
    let claims = |field: &str, seconds: i64| {
        let claims = with(good_claims(), field, json!(seconds));
        signer.verify_access(&forged(good_header(&signer), &claims)).expect("ours, at any time")
    };
    let at = |seconds: i64| {
        let at = DateTime::from_timestamp(seconds, 500_000_000).expect("in range");
        RequestTime { arrived_from: at, arrived_by: at, now: at }
    };
    for (now, over) in [(999, false), (1000, true), (1001, true)] {
        assert_eq!(claims("exp", 1000).is_over(at(now)), over, "{now}");
    }
    assert!(claims("exp", 0).is_over(at(1000)));
    let now = good_claims()["iat"].as_i64().expect("a number");
    for field in ["iat", "nbf"] {
        for (ahead, early) in [(0, false), (60, false), (61, true), (i64::MAX - now, true)] {
            assert_eq!(claims(field, now + ahead).is_early(at(now)), early, "{field} {ahead}");
        }
    }
    // Waiting here made nothing expire.
    let waited = RequestTime { now: at(5000).now, ..at(999) };
    assert!(!claims("exp", 1000).is_over(waited));
}

#[test]
fn a_gateway_whose_clock_is_behind_takes_a_new_token() {
    let signer = signer();
    let token = signer.sign_access(&user(), &session(&signer), Utc::now()).expect("signed").token;
    let claims = signer.verify_access(token.expose_secret()).expect("good");
    assert_eq!(claims.iat - claims.nbf, 60);
}

#[test]
fn the_header_chooses_among_our_keys_and_brings_none() {
    let signer = signer();
    let jwk = serde_json::to_value(&signer.jwks().keys[0]).expect("JSON");
    for (field, value) in [
        ("jku", json!("https://evil.example/keys")),
        ("x5u", json!("https://evil.example/cert")),
        ("x5c", json!(["AAAA"])),
        ("jwk", jwk),
        ("crit", json!(["exp"])),
        ("crit", json!([])),
        ("crit", json!("exp")),
        ("kid", json!("../../etc/passwd")),
        ("kid", json!("' or 1=1 --")),
        ("kid", json!("k".repeat(10_000))),
        ("kid", json!("")),
        ("kid", json!(7)),
        ("typ", json!("JWT")),
        ("typ", json!("AT+JWT ")),
    ] {
        let token = forged(with(good_header(&signer), field, value.clone()), &good_claims());
        assert_eq!(signer.verify_access(&token), Err(TokenError::Invalid), "{field} {value}");
    }
    for field in ["kid", "typ"] {
        let token = forged(without(good_header(&signer), field), &good_claims());
        assert_eq!(signer.verify_access(&token), Err(TokenError::Invalid), "no {field}");
    }
}

#[test]
fn a_changed_token_is_not_valid() {
    let signer = signer();
    let token = forged(good_header(&signer), &good_claims());
    let [header, claims, signature] = token.split('.').collect::<Vec<_>>()[..] else { panic!("three parts") };
    let other = URL_SAFE_NO_PAD.encode(with(good_claims(), "id", json!(8)).to_string());
    for changed in [
        format!("{header}.{other}.{signature}"),
        format!("{header}.{claims}."),
        format!("{header}.{claims}"),
        format!("{token}."),
        format!("{token}A"),
        format!("{header}.{claims}.{}", signature.chars().rev().collect::<String>()),
    ] {
        assert_eq!(signer.verify_access(&changed), Err(TokenError::Invalid));
    }
}

#[test]
fn a_token_over_4_kib_is_not_looked_at() {
    let signer = signer();
    let claims = with(good_claims(), "padding", json!("x".repeat(4096)));
    assert_eq!(signer.verify_access(&forged(good_header(&signer), &claims)), Err(TokenError::Invalid));
}

#[test]
fn the_longest_names_still_fit_a_cookie() {
    let signer = signer();
    let user = User { username: "u".repeat(32), email: "e".repeat(254), ..user() };
    let token = signer.sign_access(&user, &session(&signer), Utc::now()).expect("signed").token;
    // An 8192-bit key adds 1024 bytes of signature in base64.
    assert!("__Host-refreshToken".len() + token.expose_secret().len() + 1024 < 4096);
}

#[test]
fn a_refresh_token_of_the_replaced_service_is_read() {
    let signer = signer();
    let key = EncodingKey::from_rsa_pem(SECOND.private.expose_secret().as_bytes()).expect("a key");
    let made = |header: &Header, claims: Value| jsonwebtoken::encode(header, &claims, &key).expect("signed");
    let now = Utc::now().timestamp();
    let node = Header::new(Algorithm::RS256);
    for field in ["id", "userId"] {
        let claims = signer.verify_legacy_refresh(&made(&node, json!({field: 7, "iat": now, "exp": now + 60})));
        assert_eq!(claims, Ok(LegacyRefreshClaims { user_id: 7, exp: now + 60 }));
    }
    let expired = made(&node, json!({"id": 7, "iat": now - 120, "exp": now - 60}));
    assert_eq!(signer.verify_legacy_refresh(&expired), Ok(LegacyRefreshClaims { user_id: 7, exp: now - 60 }));
    for claims in [json!({"id": 7}), json!({"id": "7", "exp": now + 60}), json!({"exp": now + 60})] {
        assert_eq!(signer.verify_legacy_refresh(&made(&node, claims)), Err(TokenError::Invalid));
    }
    // Our own are not old ones.
    let ours = signer.sign_refresh(&session(&signer)).expect("signed").token;
    assert_eq!(signer.verify_legacy_refresh(ours.expose_secret()), Err(TokenError::Invalid));
}

#[test]
fn keys_rotate_without_signing_anyone_out() {
    let before = signer();
    let session = session(&before);
    let old = before.sign_refresh(&session).expect("signed").token;
    let third = crate::crypto::generate_pair(2048).expect("a pair");
    let private = format!("{}{}", third.private.expose_secret(), SECOND.private.expose_secret());
    let public = format!("{}{}", third.public, SECOND.public);
    let access = KeyRing::load("access", &FIRST.private, &FIRST.public).expect("loads");
    let refresh = KeyRing::load("refresh", &private.into(), &public).expect("loads");
    let after = TokenSigner::new(access, refresh, settings()).expect("different keys");
    assert_ne!(after.refresh_kid(), before.refresh_kid());
    assert!(after.verify_refresh(old.expose_secret()).is_ok());
    // Within the window, the row's own key makes the same bytes.
    assert_eq!(after.sign_refresh(&session).expect("signed").token.expose_secret(), old.expose_secret());
}

#[test]
fn the_published_keys_are_those_of_access_tokens_and_hold_no_secret() {
    let signer = signer();
    let jwks = serde_json::to_value(signer.jwks()).expect("JSON");
    let keys = jwks["keys"].as_array().expect("a list");
    assert_eq!(keys.len(), 1);
    let mut fields: Vec<_> = keys[0].as_object().expect("an object").keys().map(String::as_str).collect();
    fields.sort_unstable();
    assert_eq!(fields, ["alg", "e", "kid", "kty", "n", "use"]);
    assert_ne!(keys[0]["kid"], signer.refresh_kid());
}

proptest! {
    #[test]
    fn no_text_makes_it_panic(text in any::<String>(), parts in "[A-Za-z0-9_.-]{0,200}") {
        let signer = SIGNER.clone();
        for token in [&text, &parts] {
            prop_assert!(signer.verify_access(token).is_err());
            prop_assert!(signer.verify_refresh(token).is_err());
            prop_assert!(signer.verify_legacy_refresh(token).is_err());
        }
    }
}

static SIGNER: std::sync::LazyLock<TokenSigner> = std::sync::LazyLock::new(signer);

use std::os::unix::fs::PermissionsExt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::ExposeSecret;

use super::*;
use crate::crypto::test_keys::{FIRST, SECOND};

const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

/// The least a production instance needs, and then what the test is about.
fn vars(more: &[(&str, &str)]) -> Vec<(String, String)> {
    let base = [
        ("DB_DATABASE", "auth"),
        ("DB_USERNAME", "auth"),
        ("DB_PASSWORD", "canary-db"),
        ("KAFKA_BROKERS", "localhost:9092"),
        ("ACCESS_TOKEN_PRIVATE_KEY", FIRST.private.expose_secret()),
        ("ACCESS_TOKEN_PUBLIC_KEY", &FIRST.public),
        ("REFRESH_TOKEN_PRIVATE_KEY", SECOND.private.expose_secret()),
        ("REFRESH_TOKEN_PUBLIC_KEY", &SECOND.public),
    ];
    let kept = base.iter().filter(|(name, _)| more.iter().all(|(other, _)| name != other));
    kept.chain(more).map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

fn config(more: &[(&str, &str)]) -> Config {
    Config::from_vars(vars(more), Profile::Production).unwrap_or_else(|errors| panic!("{errors}"))
}

/// The variables complained about, and the whole text.
fn errors(more: &[(&str, &str)]) -> (Vec<String>, String) {
    let errors = Config::from_vars(vars(more), Profile::Production).expect_err("refused");
    (errors.0.iter().map(|error| error.variable.clone()).collect(), errors.to_string())
}

#[test]
fn the_originals_environment_is_enough() {
    let config = config(&[
        ("ACCESS_TOKEN_EXPIRES_IN", "900"),
        ("REFRESH_TOKEN_EXPIRES_IN", "604800"),
        ("SALT_ROUNDS", "10"),
        ("DB_DIALECT", "postgres"),
        ("DB_HOST", "db"),
        ("DB_PORT", "5433"),
        ("USER_SERVICE_GRPC_URL", "user-service:50052"),
        ("AUTH_SERVICE_GRPC_URL", "0.0.0.0:50055"),
        ("KAFKA_BROKERS", "kafka-1:9092, kafka-2"),
        ("PORT", "4010"),
        ("COOKIE_SECURE", "false"),
        ("NODE_ENV", "production"),
    ]);
    assert_eq!(config.tokens.access_ttl, Duration::from_secs(900));
    assert_eq!(config.tokens.refresh_ttl, Duration::from_secs(604_800));
    assert_eq!(config.passwords.hasher.cost, 10);
    assert_eq!((config.database.options.get_host(), config.database.options.get_port()), ("db", 5433));
    assert_eq!(config.sagas.user_service_url.as_deref(), Some("http://user-service:50052"));
    assert_eq!(config.kafka.brokers, "kafka-1:9092,kafka-2:9092");
    assert_eq!(config.http.listen.to_string(), "0.0.0.0:4010");
    assert_eq!(config.http.cookies, CookiePolicy { secure: false, host_prefix: false });
    // Plaintext stays on this machine until somebody says otherwise, and a line says so.
    assert_eq!(config.grpc.listen.to_string(), "127.0.0.1:50055");
    assert!(config.warnings.iter().any(|line| line.contains("GRPC_INSECURE")), "{:?}", config.warnings);
}

#[test]
fn the_defaults_are_those_of_the_contract() {
    let config = config(&[]);
    assert_eq!(config.http.listen.to_string(), "0.0.0.0:4003");
    assert_eq!(config.grpc.listen.to_string(), "127.0.0.1:50051");
    assert_eq!(config.admin.listen.to_string(), "127.0.0.1:4004");
    assert_eq!(config.tokens.access_ttl, Duration::from_secs(15 * 60));
    assert_eq!(config.tokens.refresh_ttl, Duration::from_secs(7 * 86_400));
    assert_eq!(config.passwords.hasher.cost, 12);
    assert_eq!(config.passwords.min_length, 8);
    assert_eq!(config.http.cookies, CookiePolicy { secure: true, host_prefix: true });
    assert!(config.http.cors_origins.is_empty() && config.admin.tokens.is_empty());
    assert!(config.grpc.legacy_token_rpc && config.admin.open_metrics);
    assert_eq!(config.warnings, Vec::<String>::new());
}

#[test]
fn every_error_is_reported_at_once_with_its_way_out() {
    let errors = Config::from_vars([("PORT".to_owned(), "http".to_owned())], Profile::Production).expect_err("refused");
    let named: Vec<_> = errors.0.iter().map(|error| error.variable.as_str()).collect();
    for name in [
        "PORT",
        "DB_DATABASE",
        "DB_USERNAME",
        "KAFKA_BROKERS",
        "ACCESS_TOKEN_PRIVATE_KEY",
        "ACCESS_TOKEN_PUBLIC_KEY",
        "REFRESH_TOKEN_PRIVATE_KEY",
        "REFRESH_TOKEN_PUBLIC_KEY",
    ] {
        assert_eq!(named.iter().filter(|found| **found == name).count(), 1, "{name} in {errors}");
    }
    assert_eq!(errors.to_string().lines().count(), errors.0.len());
    assert!(errors.to_string().contains(
        "PORT has a value that can't be used (4 characters). Give a port from 1 to 65535, for example PORT=4003, or 0 \
         for any free one."
    ));
    assert!(errors.0.iter().all(|error| !error.way_out.is_empty()));
}

#[test]
fn each_wrong_value_is_named() {
    for (name, value) in [
        ("PORT", "65536"),
        ("PORT", "-1"),
        ("GRPC_PORT", "x"),
        ("ADMIN_PORT", "4004.5"),
        ("HOST", "not an address"),
        ("ADMIN_HOST", "example.com"),
        ("GRPC_HOST", "0.0.0.0"),
        ("AUTH_SERVICE_GRPC_URL", "auth-service"),
        ("GRPC_INSECURE", "maybe"),
        ("GRPC_CALLER_TOKENS", "gateway"),
        ("GRPC_CALLER_TOKENS", "gateway:abc"),
        ("GRPC_TLS_CERT", "/nowhere/cert.pem"),
        ("SALT_ROUNDS", "9"),
        ("SALT_ROUNDS", "16"),
        ("SALT_ROUNDS", "twelve"),
        ("DB_DIALECT", "mysql"),
        ("DB_PORT", "0"),
        ("DATABASE_URL", "mysql://a@b/c"),
        ("DATABASE_URL", "postgres://a@b"),
        ("DATABASE_URL", "auth"),
        ("DB_POOL_SIZE", "0"),
        ("DB_ACQUIRE_TIMEOUT", "0"),
        ("ACCESS_TOKEN_EXPIRES_IN", "0"),
        ("ACCESS_TOKEN_EXPIRES_IN", "-5"),
        ("ACCESS_TOKEN_EXPIRES_IN", "15 minuten"),
        ("REFRESH_TOKEN_EXPIRES_IN", "never"),
        ("REFRESH_REUSE_WINDOW", "301"),
        ("ACCESS_TOKEN_AUDIENCE", "auth-service/refresh"),
        ("PASSWORD_MIN_LENGTH", "7"),
        ("PASSWORD_PEPPER", "short"),
        ("COOKIE_SECURE", "sometimes"),
        ("CORS_ORIGINS", "*"),
        ("CORS_ORIGINS", "app.example.com"),
        ("CORS_ORIGINS", "https://app.example.com/path"),
        ("KAFKA_BROKERS", "kafka:port"),
        ("KAFKA_BROKERS", "http://kafka:9092/"),
        ("KAFKA_TOPIC_PREFIX", "a b"),
        ("KAFKA_SECURITY_PROTOCOL", "tls"),
        ("KAFKA_SASL_USERNAME", "auth"),
        ("KAFKA_SASL_MECHANISM", "GSSAPI"),
        ("USER_SERVICE_GRPC_URL", "ftp://user-service"),
        ("USER_SERVICE_GRPC_URL", "http://"),
        ("RELAY_LEASE", "500ms"),
        ("RELAY_WORKERS", "0"),
        ("SAGA_SILENCE_POLICY", "assume"),
        ("SAGA_RESOLVE_ATTEMPTS", "0"),
        ("INBOX_RETENTION", "0"),
        ("SHUTDOWN_DRAIN", "1h"),
        ("LOG_FORMAT", "xml"),
        ("ADMIN_TOKENS", "ops"),
        ("ADMIN_TOKENS", "ops:read:abc"),
        ("ADMIN_TOKENS", &format!("ops:root:{HASH}")),
        ("ADMIN_TOKENS", &format!("o p s:read:{HASH}")),
        ("ADMIN_TOKENS", &format!("ops:read:{HASH},ops:admin:{HASH}")),
        ("ADMIN_TOKENS_FILE", "/nowhere/tokens"),
    ] {
        let (named, text) = errors(&[(name, value)]);
        assert!(named.contains(&name.to_owned()), "{name}={value}: {text}");
    }
}

#[test]
fn an_empty_variable_is_one_that_is_not_set() {
    let config = config(&[("PORT", ""), ("CORS_ORIGINS", " "), ("DATABASE_URL", "")]);
    assert_eq!(config.http.listen.port(), 4003);
}

#[test]
fn times_are_seconds_or_have_a_unit() {
    for (text, seconds) in [("900", 900), ("15m", 900), ("1h 30m", 5400), ("1d", 86_400)] {
        assert_eq!(config(&[("ACCESS_TOKEN_EXPIRES_IN", text)]).tokens.access_ttl.as_secs(), seconds, "{text}");
    }
    assert_eq!(config(&[("RELAY_POLL", "250ms")]).relay.poll, Duration::from_millis(250));
    assert_eq!(config(&[("SAGA_RETENTION", "0")]).retention.sagas, None);
}

#[test]
fn a_url_wins_over_the_parts() {
    let all = config(&[("DATABASE_URL", "postgresql://u:p%40ss@elsewhere:6000/other?sslmode=disable")]);
    let options = &all.database.options;
    assert_eq!((options.get_host(), options.get_port(), options.get_database()), ("elsewhere", 6000, Some("other")));
    let alone = database([("DATABASE_URL".to_owned(), "postgres://u@h/d".to_owned())]).expect("enough");
    assert_eq!(alone.options.get_host(), "h");
}

#[test]
fn keys_come_in_any_form_the_environment_leaves_them_in() {
    let pem = FIRST.private.expose_secret();
    let forms = [
        pem.to_owned(),
        pem.replace('\n', "\\n"),
        pem.replace('\n', "\\r\\n"),
        format!("\"{}\"", pem.replace('\n', "\\n")),
        pem.replace('\n', " "),
        STANDARD.encode(pem),
    ];
    let expected = config(&[]);
    for form in forms {
        let config = config(&[("ACCESS_TOKEN_PRIVATE_KEY", &form)]);
        assert_eq!(config.signer.jwks(), expected.signer.jwks());
    }
}

#[test]
fn keys_come_from_files_too_and_a_private_one_is_not_for_everyone() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("access_private.pem");
    std::fs::write(&path, FIRST.private.expose_secret()).expect("written");
    let set_mode = |mode| std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).expect("set");
    let path_text = path.to_str().expect("UTF-8");
    let from_file = [("ACCESS_TOKEN_PRIVATE_KEY", ""), ("ACCESS_TOKEN_PRIVATE_KEY_FILE", path_text)];
    set_mode(0o600);
    config(&from_file);
    set_mode(0o644);
    let (named, text) = errors(&from_file);
    assert_eq!(named, ["ACCESS_TOKEN_PRIVATE_KEY_FILE"], "{text}");
    assert!(text.contains("chmod"), "{text}");

    let (named, text) = errors(&[("ACCESS_TOKEN_PRIVATE_KEY_FILE", path_text)]);
    assert_eq!(named, ["ACCESS_TOKEN_PRIVATE_KEY"], "{text}");
    assert!(text.contains("both set"), "{text}");
}

#[test]
fn a_secret_in_a_file_for_everyone_is_warned_of() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = dir.path().join("password");
    std::fs::write(&path, "canary\n").expect("written");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("set");
    let path = path.to_str().expect("UTF-8");
    let warnings = config(&[("DB_PASSWORD", ""), ("DB_PASSWORD_FILE", path)]).warnings;
    assert_eq!(warnings, [format!("DB_PASSWORD_FILE names {path}, which every user of this machine may read.")]);
}

#[test]
fn brokers_are_host_and_port() {
    let brokers = |value| config(&[("KAFKA_BROKERS", value)]).kafka.brokers;
    assert_eq!(brokers("a, b:1,[::1]:9092,[::2] ,"), "a:9092,b:1,[::1]:9092,[::2]:9092");
    assert_eq!(brokers("a,a:9092"), "a:9092");
    for bad in [",", " , ", ":9092", "a:99999", "a:0", "a:b", "::1", "[::1", "[::1]9092", "[x]:1", "PLAINTEXT://a:9092"]
    {
        let (named, text) = errors(&[("KAFKA_BROKERS", bad)]);
        assert!(named.iter().all(|name| name == "KAFKA_BROKERS"), "{text}");
    }
}

#[test]
fn what_logging_can_not_use_is_named_before_anything_starts() {
    assert_eq!(errors(&[("RUST_LOG", "auth_service=loud")]).0, ["RUST_LOG"]);
    assert_eq!(errors(&[("LOG_FORMAT", "pretty")]).0, ["LOG_FORMAT"]);
}

#[test]
fn a_database_url_whose_password_is_not_encoded_is_refused_and_no_part_of_it_is_shown() {
    for password in ["12/canary", "can/ary", "canary?x", "canary#x", "can@ary/x"] {
        let url = format!("postgres://auth:{password}@db:5432/auth");
        let (named, text) = errors(&[("DATABASE_URL", &url)]);
        assert_eq!(named, ["DATABASE_URL"], "{password}: {text}");
        assert!(!text.contains("ary"), "{text}");
    }
    assert_eq!(errors(&[("DB_HOST", "postgres://auth:canary@db/auth")]).0, ["DB_HOST"]);
}

#[test]
fn an_address_is_used_and_shown_without_its_credentials() {
    let config = config(&[
        ("USER_SERVICE_GRPC_URL", "http://user:canary@users:50052/x?token=canary"),
        ("AUTH_SERVICE_GRPC_URL", "http://user:canary@auth:50055"),
    ]);
    assert_eq!(config.sagas.user_service_url.as_deref(), Some("http://users:50052"));
    assert_eq!(config.grpc.listen.port(), 50055);
    let shown = format!("{} {config:?} {:?}", config.summary(), config.warnings);
    assert!(!shown.contains("canary@") && !shown.contains("token=canary"), "{shown}");
    assert_eq!(errors(&[("USER_SERVICE_GRPC_URL", "http://user:can/ary@users:50052")]).0, ["USER_SERVICE_GRPC_URL"]);
}

#[test]
fn every_fault_of_a_key_has_its_own_line() {
    let private = FIRST.private.expose_secret();
    for (name, value, expected) in [
        ("ACCESS_TOKEN_PRIVATE_KEY", "secret", "no PEM block"),
        ("ACCESS_TOKEN_PRIVATE_KEY", FIRST.public.as_str(), "exchanged"),
        ("ACCESS_TOKEN_PUBLIC_KEY", private, "exchanged"),
        (
            "ACCESS_TOKEN_PRIVATE_KEY",
            SECOND.private.expose_secret(),
            "does not belong to any of the access public keys",
        ),
        ("REFRESH_TOKEN_PRIVATE_KEY", private, "does not belong to any of the refresh public keys"),
    ] {
        let (named, text) = errors(&[(name, value)]);
        assert_eq!(named, [name], "{text}");
        assert!(text.contains(expected), "{text}");
    }
    let shared = [("REFRESH_TOKEN_PRIVATE_KEY", private), ("REFRESH_TOKEN_PUBLIC_KEY", FIRST.public.as_str())];
    assert_eq!(errors(&shared).0, ["REFRESH_TOKEN_PUBLIC_KEY"]);
    // Both halves wrong, and another pair as well: three lines.
    let many = [("ACCESS_TOKEN_PRIVATE_KEY", "x"), ("ACCESS_TOKEN_PUBLIC_KEY", "y"), ("REFRESH_TOKEN_PUBLIC_KEY", "z")];
    assert_eq!(errors(&many).0.len(), 3);
}

#[test]
fn cheap_hashes_and_plain_cookies_are_for_developers() {
    let vars = vars(&[("SALT_ROUNDS", "4")]);
    let dev = Config::from_vars(vars.clone(), Profile::Dev).expect("accepted");
    assert_eq!(dev.passwords.hasher.cost, 4);
    assert_eq!(dev.http.cookies, CookiePolicy { secure: false, host_prefix: false });
    assert!(Config::from_vars(vars, Profile::Production).is_err());
}

#[test]
fn a_host_prefix_needs_secure_cookies() {
    assert_eq!(errors(&[("COOKIE_SECURE", "false"), ("COOKIE_HOST_PREFIX", "true")]).0, ["COOKIE_HOST_PREFIX"]);
    let plain_names = config(&[("COOKIE_HOST_PREFIX", "false")]);
    assert_eq!(plain_names.http.cookies, CookiePolicy { secure: true, host_prefix: false });
}

#[test]
fn plaintext_grpc_leaves_the_machine_only_when_told_to() {
    let open = config(&[("GRPC_INSECURE", "true")]);
    assert_eq!(open.grpc.listen.to_string(), "0.0.0.0:50051");
    assert_eq!(open.warnings.len(), 1);
    assert_eq!(errors(&[("GRPC_HOST", "10.0.0.1")]).0, ["GRPC_HOST"]);
    assert_eq!(config(&[("GRPC_HOST", "::1")]).grpc.listen.to_string(), "[::1]:50051");
}

#[test]
fn tls_for_grpc_needs_both_halves() {
    let dir = tempfile::tempdir().expect("a folder");
    let cert = dir.path().join("cert.pem");
    std::fs::write(&cert, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").expect("written");
    let cert = cert.to_str().expect("UTF-8");
    let (named, text) = errors(&[("GRPC_TLS_CERT", cert)]);
    assert_eq!(named, ["GRPC_TLS_KEY"], "{text}");
    let key = dir.path().join("key.pem");
    std::fs::write(&key, FIRST.private.expose_secret()).expect("written");
    std::fs::set_permissions(&key, PermissionsExt::from_mode(0o600)).expect("set");
    let both = config(&[("GRPC_TLS_CERT", cert), ("GRPC_TLS_KEY", key.to_str().expect("UTF-8"))]);
    assert!(both.grpc.tls.is_some());
    assert!(both.grpc.listen.ip().is_unspecified());
}

#[test]
fn listeners_may_not_share_a_port() {
    let (named, text) = errors(&[("ADMIN_PORT", "4003")]);
    assert_eq!(named, ["ADMIN_PORT"], "{text}");
    config(&[("PORT", "0"), ("GRPC_PORT", "0"), ("ADMIN_PORT", "0")]);
}

#[test]
fn admin_tokens_are_read_in_every_spelling() {
    for text in [
        format!("ops:read+operate:{HASH},root:admin:{HASH}"),
        format!("ops:read,operate:{HASH}, root:admin:{}", HASH.to_uppercase()),
        format!("ops:read|operate:{HASH}\nroot:admin:{HASH}\n"),
    ] {
        let tokens = config(&[("ADMIN_TOKENS", &text)]).admin.tokens;
        assert_eq!(tokens.len(), 2, "{text}");
        assert_eq!((tokens[0].name.as_str(), &tokens[0].scopes[..]), ("ops", &[Scope::Read, Scope::Operate][..]));
        assert_eq!((tokens[1].name.as_str(), &tokens[1].scopes[..]), ("root", &[Scope::Admin][..]));
        assert_eq!((tokens[1].sha256[0], tokens[1].sha256[31]), (0x9f, 0x08));
    }
    let callers = config(&[("GRPC_CALLER_TOKENS", &format!("gateway:{HASH},jobs:{HASH}"))]).grpc.caller_tokens;
    assert_eq!(callers.iter().map(|caller| caller.name.as_str()).collect::<Vec<_>>(), ["gateway", "jobs"]);
}

#[test]
fn origins_are_written_as_browsers_write_them() {
    let origins = config(&[("CORS_ORIGINS", "https://App.example.com/, http://localhost:3000")]).http.cors_origins;
    assert_eq!(origins, ["https://app.example.com", "http://localhost:3000"]);
}

#[cfg(not(feature = "kafka-tls"))]
#[test]
fn tls_to_kafka_needs_its_feature() {
    let (named, text) = errors(&[("KAFKA_SECURITY_PROTOCOL", "SASL_SSL")]);
    assert_eq!(named, ["KAFKA_SECURITY_PROTOCOL"]);
    assert!(text.contains("--features kafka-tls"), "{text}");
}

#[cfg(feature = "kafka-tls")]
#[test]
fn credentials_for_kafka_come_whole() {
    let (named, text) = errors(&[("KAFKA_SECURITY_PROTOCOL", "SASL_SSL"), ("KAFKA_SASL_USERNAME", "auth")]);
    assert_eq!(named, ["KAFKA_SASL_PASSWORD"], "{text}");
    let config = config(&[
        ("KAFKA_SECURITY_PROTOCOL", "sasl_ssl"),
        ("KAFKA_SASL_USERNAME", "auth"),
        ("KAFKA_SASL_PASSWORD", "canary-kafka"),
    ]);
    assert!(config.kafka.client.iter().any(|(name, _)| name == "sasl.password"));
    assert!(!format!("{config:?}{}", config.summary()).contains("canary"));
}

#[test]
fn no_secret_is_ever_shown() {
    let canaries = [
        ("DATABASE_URL", "postgres://u:canary-url@h/d"),
        ("PASSWORD_PEPPER", "canary-pepper-canary-pepper"),
        ("ADMIN_TOKENS", &format!("ops:read:{HASH}")),
        ("GRPC_CALLER_TOKENS", &format!("gateway:{HASH}")),
    ];
    let config = config(&canaries);
    let shown = format!("{config:?}\n{}", config.summary());
    assert!(!shown.contains("canary") && !shown.contains("BEGIN") && !shown.contains(HASH), "{shown}");
    assert!(config.summary().contains("PASSWORD_PEPPER=(hidden)\n"));
    assert!(config.summary().contains("PORT=4003  # default\n"));

    // Nor where they are wrong.
    for (name, value) in [
        ("DATABASE_URL", "postgres://u:canary/@h:x/d"),
        ("DATABASE_URL", "canary"),
        ("PASSWORD_PEPPER", "canary"),
        ("ADMIN_TOKENS", "ops:read:canary"),
        ("GRPC_CALLER_TOKENS", "gateway:canary"),
        ("ACCESS_TOKEN_PRIVATE_KEY", "canary"),
        ("KAFKA_SASL_PASSWORD", "canary"),
    ] {
        let (_, text) = errors(&[(name, value)]);
        assert!(!text.contains("canary"), "{text}");
    }
}

#[test]
fn the_health_check_needs_nothing_but_the_port() {
    let listen = http_listen([("PORT".to_owned(), "4010".to_owned())]).expect("enough");
    assert_eq!(listen.to_string(), "0.0.0.0:4010");
    assert!(http_listen([("PORT".to_owned(), "x".to_owned())]).is_err());
}

type Lines = Vec<(String, String)>;

/// `(name, value)` of the lines that begin with one `#`, and of those that begin with none.
fn example() -> (Lines, Lines) {
    let text = include_str!("../../.env.example");
    let assignments = text.lines().filter_map(|line| line.split_once('='));
    let named = assignments.filter(|(name, _)| !name.contains(' '));
    let owned = named.map(|(name, value)| (name.to_owned(), value.to_owned()));
    let (defaults, set): (Lines, Lines) = owned.partition(|(name, _)| name.starts_with('#'));
    (defaults.into_iter().map(|(name, value)| (name[1..].to_owned(), value)).collect(), set)
}

#[test]
fn the_example_names_every_variable_and_no_other() {
    let (defaults, set) = example();
    let mut named: Vec<_> = defaults.iter().chain(&set).map(|(name, _)| name.trim_end_matches("_FILE")).collect();
    let config = config(&[]);
    let mut read: Vec<_> = config.settings.iter().map(|setting| setting.name).collect();
    named.sort_unstable();
    read.sort_unstable();
    assert_eq!(named, read);
}

#[test]
fn the_example_shows_the_real_defaults() {
    let (defaults, _) = example();
    let defaults: Vec<_> = defaults.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
    let values =
        |config: Config| config.settings.into_iter().map(|setting| (setting.name, setting.value)).collect::<Vec<_>>();
    assert_eq!(values(config(&defaults)), values(config(&[])));
}

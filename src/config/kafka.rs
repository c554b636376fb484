use std::fmt;

use secrecy::ExposeSecret;

use super::vars::{Nature, Vars, quoted};

/// The Kafka cluster, and how to speak to it.
#[derive(Clone)]
pub struct KafkaConfig {
    /// Bootstrap servers, `host:port`, comma-separated.
    pub brokers: String,
    /// The consumer group of the saga replies.
    pub group_id: String,
    /// Stands before every topic name; empty in most fleets.
    pub topic_prefix: String,
    /// Further settings of librdkafka, for producer and consumer alike. May hold a password: not
    /// to be logged.
    pub client: Vec<(String, String)>,
}

impl KafkaConfig {
    pub(super) fn read(vars: &mut Vars) -> Option<Self> {
        let errors = vars.errors.len();
        let brokers = brokers(vars);
        let name_way_out = "Use letters, digits, '.', '_' and '-' only";
        let mut name = |variable, default: &str| {
            vars.parse(
                variable,
                default.to_owned(),
                String::clone,
                |raw| raw.chars().all(is_name).then(|| raw.to_owned()),
                name_way_out,
            )
        };
        let group_id = name("KAFKA_GROUP_ID", "auth-service");
        let topic_prefix = name("KAFKA_TOPIC_PREFIX", "");
        let client_id = name("KAFKA_CLIENT_ID", "auth-service");
        let mut client = vec![("client.id".to_owned(), client_id)];
        client.extend(security(vars));
        (vars.errors.len() == errors).then_some(Self { brokers, group_id, topic_prefix, client })
    }
}

impl fmt::Debug for KafkaConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let client: Vec<_> = self.client.iter().map(|(name, _)| name).collect();
        f.debug_struct("KafkaConfig")
            .field("brokers", &self.brokers)
            .field("group_id", &self.group_id)
            .field("topic_prefix", &self.topic_prefix)
            .field("client", &client)
            .finish()
    }
}

fn brokers(vars: &mut Vars) -> String {
    let way_out = "Give host:port, comma-separated, for example KAFKA_BROKERS=localhost:9092";
    let Some(raw) = vars.optional("KAFKA_BROKERS") else {
        vars.reject("KAFKA_BROKERS", "is not set", way_out);
        return String::new();
    };
    let mut brokers = Vec::new();
    for broker in raw.split(',').map(str::trim).filter(|broker| !broker.is_empty()) {
        let (host, port) = broker.rsplit_once(':').unwrap_or((broker, "9092"));
        let host_is_plain = host.chars().all(|c| is_name(c) || matches!(c, '[' | ']' | ':'));
        match port.parse::<u16>() {
            Ok(port) if port > 0 && !host.is_empty() && host_is_plain => brokers.push(format!("{host}:{port}")),
            _ => vars.reject("KAFKA_BROKERS", format!("names {}, which is no host:port", quoted(broker)), way_out),
        }
    }
    brokers.join(",")
}

fn security(vars: &mut Vars) -> Vec<(String, String)> {
    let protocol = vars.choice(
        "KAFKA_SECURITY_PROTOCOL",
        &[("plaintext", "plaintext"), ("ssl", "ssl"), ("sasl_plaintext", "sasl_plaintext"), ("sasl_ssl", "sasl_ssl")],
    );
    let mechanism = vars.choice(
        "KAFKA_SASL_MECHANISM",
        &[("PLAIN", "PLAIN"), ("SCRAM-SHA-256", "SCRAM-SHA-256"), ("SCRAM-SHA-512", "SCRAM-SHA-512")],
    );
    let username = vars.optional("KAFKA_SASL_USERNAME");
    let password = vars.secret("KAFKA_SASL_PASSWORD");
    let ca = vars.optional("KAFKA_SSL_CA");

    let sasl = protocol.starts_with("sasl");
    if protocol != "plaintext" && !cfg!(feature = "kafka-tls") {
        vars.reject(
            "KAFKA_SECURITY_PROTOCOL",
            format!("is {protocol}, and this binary speaks only plaintext to Kafka"),
            "Build it with --features kafka-tls",
        );
        return Vec::new();
    }
    for (name, set) in [("KAFKA_SASL_USERNAME", username.is_some()), ("KAFKA_SASL_PASSWORD", password.is_some())] {
        if sasl && !set {
            vars.reject(name, format!("is not set, and KAFKA_SECURITY_PROTOCOL is {protocol}"), "Set it");
        }
        // Credentials that are silently unused would be a connection nobody meant to open.
        if !sasl && set {
            vars.reject(
                name,
                format!("is set, but KAFKA_SECURITY_PROTOCOL={protocol} sends no credentials"),
                "Set KAFKA_SECURITY_PROTOCOL=sasl_ssl, or leave it out",
            );
        }
    }
    if let Some(path) = &ca {
        if !protocol.ends_with("ssl") {
            vars.reject(
                "KAFKA_SSL_CA",
                format!("is set, but KAFKA_SECURITY_PROTOCOL is {protocol}"),
                "Set KAFKA_SECURITY_PROTOCOL=ssl or sasl_ssl, or leave it out",
            );
        }
        vars.read_file("KAFKA_SSL_CA", path, Nature::Public);
    }

    let mut settings = vec![("security.protocol", protocol.to_owned())];
    if let (true, Some(username), Some(password)) = (sasl, username, password) {
        settings.push(("sasl.mechanism", mechanism.to_owned()));
        settings.push(("sasl.username", username));
        settings.push(("sasl.password", password.expose_secret().to_owned()));
    }
    settings.extend(ca.map(|path| ("ssl.ca.location", path)));
    settings.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')
}

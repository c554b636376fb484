use std::fmt;
use std::net::Ipv6Addr;

use secrecy::ExposeSecret;

use super::vars::{Nature, Vars};

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
    let mut brokers: Vec<String> = Vec::new();
    let entries: Vec<&str> = raw.split(',').map(str::trim).filter(|broker| !broker.is_empty()).collect();
    if entries.is_empty() {
        vars.reject("KAFKA_BROKERS", "names no broker", way_out);
    }
    for (i, entry) in entries.into_iter().enumerate() {
        match broker(entry) {
            Some(broker) if !brokers.contains(&broker) => brokers.push(broker),
            Some(_) => vars.warn(format!("KAFKA_BROKERS names a broker twice, as number {}, too.", i + 1)),
            None => {
                vars.reject("KAFKA_BROKERS", format!("has an entry that is no host:port, number {}", i + 1), way_out);
            }
        }
    }
    brokers.join(",")
}

/// `host`, `host:port`, `[v6]` or `[v6]:port`; a listener's name before it, as in the broker's own configuration,
/// is not wanted.
fn broker(entry: &str) -> Option<String> {
    let (host, port) = match entry.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((v6, rest)) => {
            v6.parse::<Ipv6Addr>().ok()?;
            (format!("[{v6}]"), if rest.is_empty() { "9092" } else { rest.strip_prefix(':')? })
        }
        None => {
            let (host, port) = entry.split_once(':').unwrap_or((entry, "9092"));
            (host.to_owned(), port)
        }
    };
    let is_host = host.starts_with('[') || (!host.is_empty() && host.chars().all(is_name));
    let port = port.parse::<u16>().ok().filter(|port| *port > 0)?;
    is_host.then(|| format!("{host}:{port}"))
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

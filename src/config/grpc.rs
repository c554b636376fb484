use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use secrecy::SecretString;

use super::admin::{entries, named_hash};
use super::listeners::{Bounds, ListenerConfig};
use super::vars::{Nature, Vars, length};

/// The gRPC listener.
#[derive(Debug, Clone)]
pub struct GrpcConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its bounds.
    pub listener: ListenerConfig,
    /// TLS, where it is configured.
    pub tls: Option<GrpcTls>,
    /// Who may call, where that is configured.
    pub caller_tokens: Vec<CallerToken>,
    /// Plaintext beyond loopback is wanted.
    pub insecure: bool,
    /// Whether `token.Token` of the original fleet is served.
    pub legacy_token_rpc: bool,
}

/// Certificates of the gRPC listener, as PEM.
#[derive(Debug, Clone)]
pub struct GrpcTls {
    /// The certificate chain.
    pub certificate: String,
    /// Its private key.
    pub key: SecretString,
    /// Whose clients are let in; nobody is asked for a certificate without it.
    pub client_ca: Option<String>,
}

/// A caller and the hash of its token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CallerToken {
    /// Its name in the log.
    pub name: String,
    /// SHA-256 of the token.
    pub sha256: [u8; 32],
}

impl GrpcConfig {
    pub(super) fn read(vars: &mut Vars) -> Option<Self> {
        let insecure = vars.flag("GRPC_INSECURE", false);
        let listener = ListenerConfig::read(
            vars,
            Bounds {
                max_connections: ("GRPC_MAX_CONNECTIONS", 256),
                idle_timeout: ("GRPC_IDLE_TIMEOUT", Duration::from_secs(600)),
            },
        );
        let tls = GrpcTls::read(vars);
        let caller_tokens = caller_tokens(vars);
        let legacy_token_rpc = vars.flag("LEGACY_TOKEN_RPC", true);
        let guarded = tls.is_some() || insecure;

        // The original's variable names the address its gateway dials: the port is ours to serve.
        let dialled = dialled(vars);
        let default_port = dialled.as_ref().map_or(50051, |(_, port)| *port);
        let default_host = if guarded { Ipv4Addr::UNSPECIFIED } else { Ipv4Addr::LOCALHOST };
        let host_chosen = vars.is_set("GRPC_HOST");
        let listen = vars.listen(("GRPC_HOST", default_host), ("GRPC_PORT", default_port))?;

        if !guarded && !listen.ip().is_loopback() {
            vars.reject(
                "GRPC_HOST",
                format!("is {}, which would send tokens in plaintext beyond this machine", listen.ip()),
                "Set GRPC_TLS_CERT and GRPC_TLS_KEY, or GRPC_INSECURE=true if the network is yours, \
                 or GRPC_HOST=127.0.0.1",
            );
        }
        let unreached = dialled.filter(|(host, _)| !guarded && !host_chosen && !is_local(host));
        if let Some((host, _)) = unreached {
            vars.warn(format!(
                "gRPC listens on 127.0.0.1 only, so a gateway elsewhere can't reach it at {host}: \
                 set GRPC_TLS_CERT and GRPC_TLS_KEY, or GRPC_INSECURE=true if the network is yours."
            ));
        }
        if insecure && tls.is_none() {
            vars.warn("GRPC_INSECURE=true: tokens cross the network between us and the gateway in plaintext.");
        }
        Some(Self { listen, listener, tls, caller_tokens, insecure, legacy_token_rpc })
    }
}

impl GrpcTls {
    fn read(vars: &mut Vars) -> Option<Self> {
        let mut pem = |name: &'static str, nature, labels: &[&str]| {
            let text = vars.pem(name, nature)?;
            let found = pem::parse_many(&text).unwrap_or_default();
            if !found.iter().any(|block| labels.contains(&block.tag())) {
                vars.reject(name, format!("has no PEM block {}", labels[0]), "Give the PEM, or the path of a PEM file");
            }
            Some(text)
        };
        let certificate = pem("GRPC_TLS_CERT", Nature::Public, &["CERTIFICATE"]);
        let key = pem("GRPC_TLS_KEY", Nature::PrivateKey, &["PRIVATE KEY", "RSA PRIVATE KEY", "EC PRIVATE KEY"]);
        let client_ca = pem("GRPC_TLS_CLIENT_CA", Nature::Public, &["CERTIFICATE"]);

        let is_set = |name| vars.is_set(name) || vars.is_set(&format!("{name}_FILE"));
        let (has_cert, has_key) = (is_set("GRPC_TLS_CERT"), is_set("GRPC_TLS_KEY"));
        let any = has_cert || has_key || is_set("GRPC_TLS_CLIENT_CA");
        for (name, set) in [("GRPC_TLS_CERT", has_cert), ("GRPC_TLS_KEY", has_key)] {
            if any && !set {
                vars.reject(
                    name,
                    "is not set, although another GRPC_TLS_* is",
                    "Set GRPC_TLS_CERT and GRPC_TLS_KEY together",
                );
            }
        }
        Some(Self { certificate: certificate?, key: key?.into(), client_ca })
    }
}

fn dialled(vars: &mut Vars) -> Option<(String, u16)> {
    let raw = vars.optional("AUTH_SERVICE_GRPC_URL")?;
    let address = raw.split_once("://").map_or(raw.as_str(), |(_, rest)| rest).trim_matches('/');
    let address = address.rsplit_once('@').map_or(address, |(_, address)| address);
    let is_host = |host: &str| !host.is_empty() && host.chars().all(|c| c.is_alphanumeric() || ".-_[]:".contains(c));
    let parsed = address
        .rsplit_once(':')
        .filter(|(host, _)| is_host(host))
        .and_then(|(host, port)| Some((host.to_owned(), port.parse().ok()?)));
    if parsed.is_none() {
        vars.reject(
            "AUTH_SERVICE_GRPC_URL",
            format!("is no host:port {}", length(&raw)),
            "Give host:port, for example AUTH_SERVICE_GRPC_URL=localhost:50051, or use GRPC_PORT instead",
        );
    }
    parsed
}

fn is_local(host: &str) -> bool {
    matches!(host, "localhost" | "127.0.0.1" | "[::1]")
}

fn caller_tokens(vars: &mut Vars) -> Vec<CallerToken> {
    let raw = vars.secret("GRPC_CALLER_TOKENS");
    let mut tokens: Vec<CallerToken> = Vec::new();
    for (i, entry) in entries(raw.as_ref(), 1).into_iter().enumerate() {
        let token = entry.split_once(':').and_then(|(name, hash)| named_hash(name, hash));
        match token {
            Some((name, sha256)) if tokens.iter().all(|token| token.name != name) => {
                tokens.push(CallerToken { name, sha256 });
            }
            _ => vars.reject(
                "GRPC_CALLER_TOKENS",
                format!("has an entry that can't be used, number {}", i + 1),
                "Write name:sha256, comma-separated, each name once: the SHA-256 of the token as 64 hex digits \
                 (printf %s TOKEN | sha256sum)",
            ),
        }
    }
    tokens
}

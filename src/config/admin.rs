use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

use super::listeners::{Bounds, ListenerConfig};
use super::vars::Vars;

/// The operators' listener.
#[derive(Debug, Clone)]
pub struct AdminConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its bounds.
    pub listener: ListenerConfig,
    /// Who may sign in.
    pub tokens: Vec<AdminToken>,
    /// Whether `/metrics` answers without a token.
    pub open_metrics: bool,
}

/// An operator and the hash of their token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AdminToken {
    /// Their name in the audit log.
    pub name: String,
    /// What they may do.
    pub scopes: Vec<Scope>,
    /// SHA-256 of the token.
    pub sha256: [u8; 32],
}

/// What an operator may do; each scope includes the ones before it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scope {
    /// Look.
    Read,
    /// Change what the system would allow by itself: replay, pause, retry.
    Operate,
    /// Force what it would refuse.
    Admin,
}

impl Scope {
    /// As `ADMIN_TOKENS` spells it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Read => "read",
            Self::Operate => "operate",
            Self::Admin => "admin",
        }
    }

    /// `None` for any other word.
    pub fn parse(word: &str) -> Option<Self> {
        [Self::Read, Self::Operate, Self::Admin].into_iter().find(|scope| scope.as_str() == word)
    }
}

impl AdminConfig {
    pub(super) fn read(vars: &mut Vars) -> Option<Self> {
        let listen = vars.listen(("ADMIN_HOST", Ipv4Addr::LOCALHOST), ("ADMIN_PORT", 4004));
        let listener = ListenerConfig::read(
            vars,
            Bounds {
                max_connections: ("ADMIN_MAX_CONNECTIONS", 64),
                idle_timeout: ("ADMIN_IDLE_TIMEOUT", Duration::from_secs(75)),
            },
        );
        let tokens = tokens(vars);
        let open_metrics = !vars.flag("METRICS_TOKEN_REQUIRED", false);
        Some(Self { listen: listen?, listener, tokens, open_metrics })
    }
}

fn tokens(vars: &mut Vars) -> Vec<AdminToken> {
    let raw = vars.secret("ADMIN_TOKENS");
    let mut tokens: Vec<AdminToken> = Vec::new();
    for (i, entry) in entries(raw.as_ref(), 2).into_iter().enumerate() {
        match AdminToken::parse(&entry) {
            Some(token) if tokens.iter().all(|other| other.name != token.name) => tokens.push(token),
            // The entry itself is not shown: somebody may have put the token where its hash belongs.
            _ => vars.reject(
                "ADMIN_TOKENS",
                format!("has an entry that can't be used, number {}", i + 1),
                "Write name:scopes:sha256, comma-separated, each name once, scopes out of read, operate, admin \
                 joined by +, for example ops:read+operate:<64 hex digits>; `auth-service admin-token new` makes one",
            ),
        }
    }
    tokens
}

impl AdminToken {
    fn parse(entry: &str) -> Option<Self> {
        let (name, rest) = entry.split_once(':')?;
        let (scopes, hash) = rest.split_once(':')?;
        let (name, sha256) = named_hash(name, hash)?;
        let scopes = scopes.split(['+', '|', ',', ' ']).map(Scope::parse).collect::<Option<_>>()?;
        Some(Self { name, scopes, sha256 })
    }
}

/// The entries of a list separated by commas or line breaks. A comma inside an entry, before it
/// has its `colons`, belongs to it: `ops:read,operate:…` is one entry.
pub(super) fn entries(list: Option<&SecretString>, colons: usize) -> Vec<String> {
    let mut entries = Vec::new();
    let mut entry = String::new();
    for line in list.map_or("", |list| list.expose_secret()).lines() {
        for piece in line.split(',').map(str::trim).filter(|piece| !piece.is_empty()) {
            if !entry.is_empty() {
                entry.push(',');
            }
            entry.push_str(piece);
            if entry.matches(':').count() >= colons {
                entries.push(std::mem::take(&mut entry));
            }
        }
        if !entry.is_empty() {
            entries.push(std::mem::take(&mut entry));
        }
    }
    entries
}

/// A name fit for a log line and a SHA-256 as 64 hex digits.
pub(super) fn named_hash(name: &str, hash: &str) -> Option<(String, [u8; 32])> {
    let (name, hash) = (name.trim(), hash.trim());
    let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !(1..=64).contains(&name.len()) || !name.chars().all(plain) {
        return None;
    }
    if hash.len() != 64 || !hash.bytes().all(|c| c.is_ascii_hexdigit()) {
        return None;
    }
    let mut sha256 = [0; 32];
    for (i, byte) in sha256.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hash.get(2 * i..2 * i + 2)?, 16).ok()?;
    }
    Some((name.to_owned(), sha256))
}

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use secrecy::ExposeSecret;
use sqlx::postgres::PgConnectOptions;

use super::vars::Vars;

/// PostgreSQL, and how many connections each part may hold.
#[derive(Clone)]
pub struct DatabaseConfig {
    /// How to connect. Its own `Debug` shows the password; ours does not.
    pub options: PgConnectOptions,
    /// Connections for requests.
    pub pool_size: u32,
    /// How long a request waits for one before it is answered 503.
    pub acquire_timeout: Duration,
}

impl DatabaseConfig {
    pub(super) fn read(vars: &mut Vars) -> Option<Self> {
        let seconds = Duration::from_secs;
        let pool_size = vars.number("DB_POOL_SIZE", 10, 1..=1000);
        let acquire_timeout = vars.duration("DB_ACQUIRE_TIMEOUT", seconds(3), Duration::from_millis(100)..=seconds(60));
        // No startup parameter that PgBouncer would refuse. What a session needs it sets itself (outbox_relay::session).
        let options = options(vars)?.application_name("auth-service").extra_float_digits(None);
        Some(Self { options, pool_size, acquire_timeout })
    }
}

impl fmt::Debug for DatabaseConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DatabaseConfig")
            .field("host", &self.options.get_host())
            .field("port", &self.options.get_port())
            .field("database", &self.options.get_database())
            .field("pool_size", &self.pool_size)
            .field("acquire_timeout", &self.acquire_timeout)
            .finish_non_exhaustive()
    }
}

fn options(vars: &mut Vars) -> Option<PgConnectOptions> {
    let errors = vars.errors.len();
    vars.parse(
        "DB_DIALECT",
        "postgres".to_owned(),
        String::clone,
        |raw| (raw == "postgres").then(|| raw.to_owned()),
        "Only postgres is supported: set DB_DIALECT=postgres or leave it out",
    );
    let url = vars.secret("DATABASE_URL");
    // Where a URL wins, the parts may be missing, but a wrong one is still worth knowing of.
    let required = |vars: &mut Vars, name, example| {
        let value = vars.optional(name);
        if value.is_none() && url.is_none() {
            vars.reject(
                name,
                "is not set",
                format!(
                    "Set it, for example {name}={example}, or \
                     DATABASE_URL=postgres://user:password@host:5432/database instead of all DB_*"
                ),
            );
        }
        value.unwrap_or_default()
    };
    let database = required(vars, "DB_DATABASE", "auth");
    let username = required(vars, "DB_USERNAME", "auth");
    let host = host(vars);
    let port = vars.number("DB_PORT", 5432, 1..=u16::MAX);
    let password = vars.secret("DB_PASSWORD");
    let options = match url {
        Some(url) => parsed(vars, url.expose_secret().trim()),
        None => {
            let options = PgConnectOptions::new_without_pgpass();
            let options = if host.starts_with('/') { options.socket(&host) } else { options.host(&host) };
            let options = options.port(port).database(&database).username(&username);
            Some(match password {
                Some(password) => options.password(password.expose_secret()),
                None => options,
            })
        }
    };
    options.filter(|_| vars.errors.len() == errors)
}

/// A name, an address or the folder of a socket. A whole URL here would have its password shown as a host.
fn host(vars: &mut Vars) -> String {
    vars.parse(
        "DB_HOST",
        "localhost".to_owned(),
        String::clone,
        |raw| {
            let is_name = raw.chars().all(|c| c.is_alphanumeric() || ".-_:[]%".contains(c));
            let is_folder = raw.starts_with('/') && !raw.contains('@');
            (is_name || is_folder).then(|| raw.to_owned())
        },
        "Give a host name, an IP address or the folder of a socket; a URL belongs in DATABASE_URL",
    )
}

fn parsed(vars: &mut Vars, url: &str) -> Option<PgConnectOptions> {
    let scheme = ["postgres://", "postgresql://"].iter().any(|scheme| url.starts_with(scheme));
    // A password with a slash in it ends the host early: its beginning would be shown as the port, and its end as the
    // database.
    let rest = url.split_once("://").map_or("", |(_, rest)| rest);
    let cut = rest.find(['/', '?', '#']).is_some_and(|end| rest[end..].contains('@'));
    match PgConnectOptions::from_str(url) {
        Ok(options) if scheme && !cut && options.get_database().is_some() => Some(options),
        // The parser's own words could repeat a part of the password.
        _ => {
            vars.reject(
                "DATABASE_URL",
                "is not a PostgreSQL URL with a database name",
                "Write postgres://user:password@host:5432/database, \
                 with @ : / ? # % in the password percent-encoded (@ is %40)",
            );
            None
        }
    }
}

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use axum::http::Uri;

use super::Profile;
use super::listeners::{Bounds, ListenerConfig};
use super::vars::Vars;

/// The largest body a request may have; every body we know is far below it.
const BODY_LIMIT: usize = 16 * 1024;

/// The REST listener.
#[derive(Debug, Clone)]
pub struct HttpConfig {
    /// Where it listens.
    pub listen: SocketAddr,
    /// Its bounds.
    pub listener: ListenerConfig,
    /// How cookies are set.
    pub cookies: CookiePolicy,
    /// Origins that are ours although they are foreign sites to a browser, as `scheme://host[:port]`.
    pub cors_origins: Vec<String>,
    /// The largest body, in bytes.
    pub body_limit: usize,
    /// Whether `POST /auth/refresh` is there.
    pub rest_refresh: bool,
}

/// How the two cookies are set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CookiePolicy {
    /// `Secure`: browsers send them over HTTPS only.
    pub secure: bool,
    /// `__Host-` before the names: no other host of the domain can set them.
    pub host_prefix: bool,
}

impl HttpConfig {
    pub(super) fn read(vars: &mut Vars) -> Option<Self> {
        let listen = listen(vars);
        let listener = ListenerConfig::read(
            vars,
            Bounds {
                max_connections: ("HTTP_MAX_CONNECTIONS", 512),
                idle_timeout: ("HTTP_IDLE_TIMEOUT", Duration::from_secs(75)),
            },
        );
        let cookies = CookiePolicy::read(vars);
        let cors_origins = origins(vars);
        let rest_refresh = vars.flag("REST_REFRESH_ENABLED", false);
        Some(Self { listen: listen?, listener, cookies, cors_origins, body_limit: BODY_LIMIT, rest_refresh })
    }
}

impl CookiePolicy {
    fn read(vars: &mut Vars) -> Self {
        let secure = vars.flag("COOKIE_SECURE", vars.profile == Profile::Production);
        let host_prefix = vars.flag("COOKIE_HOST_PREFIX", secure);
        if host_prefix && !secure {
            vars.reject(
                "COOKIE_HOST_PREFIX",
                "is true, but browsers take __Host- cookies only with Secure",
                "Leave it out, or set COOKIE_SECURE=true",
            );
        }
        if !secure && vars.profile == Profile::Production {
            vars.warn("COOKIE_SECURE=false: browsers will send the tokens over plain HTTP too.");
        }
        Self { secure, host_prefix }
    }
}

pub(super) fn listen(vars: &mut Vars) -> Option<SocketAddr> {
    vars.listen(("HOST", Ipv4Addr::UNSPECIFIED), ("PORT", 4003))
}

fn origins(vars: &mut Vars) -> Vec<String> {
    let raw = vars.optional("CORS_ORIGINS").unwrap_or_default();
    let mut origins = Vec::new();
    for (i, entry) in raw.split(',').map(str::trim).filter(|entry| !entry.is_empty()).enumerate() {
        match origin(entry) {
            Some(origin) => origins.push(origin),
            None => vars.reject(
                "CORS_ORIGINS",
                format!("has an entry that is no origin, number {}", i + 1),
                "Give scheme://host[:port], comma-separated, without path or *, \
                 for example CORS_ORIGINS=https://app.example.com",
            ),
        }
    }
    origins
}

/// As a browser writes it: no path, no slash at the end, lower case.
fn origin(entry: &str) -> Option<String> {
    let uri: Uri = entry.parse().ok()?;
    let scheme = uri.scheme_str().filter(|scheme| matches!(*scheme, "http" | "https"))?;
    let authority = uri.authority().filter(|authority| !authority.as_str().contains(['@', '*']))?;
    let bare = uri.path() == "/" && uri.query().is_none();
    bare.then(|| format!("{scheme}://{}", authority.as_str().to_ascii_lowercase()))
}

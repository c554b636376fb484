//! The two cookies.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use axum_extra::extract::cookie::{Cookie, SameSite};
use chrono::{DateTime, Utc};
use secrecy::{ExposeSecret, SecretString};

use crate::{
    config::{Config, CookiePolicy},
    crypto::SignedToken,
    sessions::TokenPair,
};

const ACCESS: &str = "accessToken";
const REFRESH: &str = "refreshToken";

/// The tokens a request carries.
#[derive(Debug, Default)]
pub struct Carried {
    /// From the access cookie.
    pub access: Option<SecretString>,
    /// From the refresh cookie.
    pub refresh: Option<SecretString>,
}

/// A cookie came twice. Which of the two the user's own site set can't be told, so neither counts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SentTwice(pub &'static str);

/// Reads both cookies.
pub fn read(headers: &HeaderMap, policy: CookiePolicy) -> Result<Carried, SentTwice> {
    Ok(Carried { access: one(headers, policy, ACCESS)?, refresh: one(headers, policy, REFRESH)? })
}

/// The complete Set-Cookie value for an access token.
pub fn access(config: &Config, token: &SignedToken, now: DateTime<Utc>) -> String {
    let life = seconds_left(token, config.tokens.access_ttl, now);
    set(config.http.cookies, ACCESS, token.token.expose_secret(), life)
}

/// The complete Set-Cookie value for a refresh token.
pub fn refresh(config: &Config, token: &SignedToken, now: DateTime<Utc>) -> String {
    let life = seconds_left(token, config.tokens.refresh_ttl, now);
    set(config.http.cookies, REFRESH, token.token.expose_secret(), life)
}

/// The Set-Cookie values of both tokens.
pub fn both(config: &Config, tokens: &TokenPair, now: DateTime<Utc>) -> [String; 2] {
    [access(config, &tokens.access, now), refresh(config, &tokens.refresh, now)]
}

/// The Set-Cookie values that take both cookies away: the same attributes, or browsers keep them.
pub fn cleared(policy: CookiePolicy) -> [String; 2] {
    [set(policy, ACCESS, "", 0), set(policy, REFRESH, "", 0)]
}

/// Adds Set-Cookie headers.
pub fn append(headers: &mut HeaderMap, cookies: impl IntoIterator<Item = String>) {
    for cookie in cookies {
        // Tokens are base64url: they always fit.
        if let Ok(mut value) = HeaderValue::try_from(cookie) {
            value.set_sensitive(true);
            headers.append(header::SET_COOKIE, value);
        }
    }
}

fn one(headers: &HeaderMap, policy: CookiePolicy, name: &'static str) -> Result<Option<SecretString>, SentTwice> {
    let wanted = full_name(policy, name);
    let mut found = headers
        .get_all(header::COOKIE)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(';'))
        .filter_map(|pair| pair.trim().split_once('='))
        .filter(|(name, value)| *name == wanted && !value.is_empty())
        .map(|(_, value)| value.trim_matches('"'));
    match (found.next(), found.next()) {
        (_, Some(_)) => Err(SentTwice(name)),
        (value, None) => Ok(value.map(SecretString::from)),
    }
}

fn set(policy: CookiePolicy, name: &str, value: &str, max_age: u64) -> String {
    let mut cookie = Cookie::build((full_name(policy, name), value))
        .http_only(true)
        .same_site(SameSite::Lax)
        .secure(policy.secure)
        .path("/");
    if let Ok(max_age) = Duration::from_secs(max_age).try_into() {
        cookie = cookie.max_age(max_age);
    }
    cookie.build().to_string()
}

/// `__Host-` makes browsers refuse the cookie from anywhere but this very host, over TLS.
fn full_name(policy: CookiePolicy, name: &str) -> String {
    let prefix = if policy.secure && policy.host_prefix { "__Host-" } else { "" };
    format!("{prefix}{name}")
}

/// A token says in whole seconds when it ends. Counted up by one, and no further than a whole life,
/// a token made a moment ago has all of it before it, on whichever side of a second it was made.
fn seconds_left(token: &SignedToken, life: Duration, now: DateTime<Utc>) -> u64 {
    let left = token.expires_at.timestamp() - now.timestamp();
    if left <= 0 {
        return 0;
    }
    u64::try_from(left + 1).unwrap_or(0).min(life.as_secs())
}

#[cfg(test)]
mod tests {
    use super::*;

    const STRICT: CookiePolicy = CookiePolicy { secure: true, host_prefix: true };
    const BARE_NAMES: CookiePolicy = CookiePolicy { secure: true, host_prefix: false };
    const PLAIN: CookiePolicy = CookiePolicy { secure: false, host_prefix: true };

    fn now() -> DateTime<Utc> {
        DateTime::from_timestamp(1_800_000_000, 300_000_000).expect("in range")
    }

    fn token(seconds: i64) -> SignedToken {
        SignedToken {
            token: "a.b.c".into(),
            expires_at: DateTime::from_timestamp(1_800_000_000 + seconds, 0).expect("in range"),
        }
    }

    fn carried(policy: CookiePolicy, cookies: &[&str]) -> Result<(Option<String>, Option<String>), SentTwice> {
        let headers =
            cookies.iter().map(|cookie| (header::COOKIE, HeaderValue::from_str(cookie).expect("a header"))).collect();
        let plain = |secret: Option<SecretString>| secret.map(|secret| secret.expose_secret().to_owned());
        read(&headers, policy).map(|carried| (plain(carried.access), plain(carried.refresh)))
    }

    #[test]
    fn set_cookie_is_byte_for_byte_what_the_contract_says() {
        assert_eq!(
            set(STRICT, ACCESS, "a.b.c", 900),
            "__Host-accessToken=a.b.c; HttpOnly; SameSite=Lax; Secure; Path=/; Max-Age=900"
        );
        assert_eq!(
            set(BARE_NAMES, REFRESH, "a.b.c", 604_800),
            "refreshToken=a.b.c; HttpOnly; SameSite=Lax; Secure; Path=/; Max-Age=604800"
        );
        assert_eq!(set(PLAIN, ACCESS, "a.b.c", 900), "accessToken=a.b.c; HttpOnly; SameSite=Lax; Path=/; Max-Age=900");
    }

    #[test]
    fn a_cookie_is_cleared_with_the_attributes_it_was_set_with() {
        assert_eq!(
            cleared(STRICT),
            [
                "__Host-accessToken=; HttpOnly; SameSite=Lax; Secure; Path=/; Max-Age=0",
                "__Host-refreshToken=; HttpOnly; SameSite=Lax; Secure; Path=/; Max-Age=0"
            ]
        );
        assert_eq!(cleared(PLAIN)[0], "accessToken=; HttpOnly; SameSite=Lax; Path=/; Max-Age=0");
    }

    #[test]
    fn a_cookie_lives_as_long_as_its_token() {
        for (left, expected) in [(900, 900), (899, 900), (10, 11), (1, 2), (0, 0), (-5, 0)] {
            assert_eq!(seconds_left(&token(left), Duration::from_secs(900), now()), expected, "{left} s left");
        }
    }

    #[test]
    fn both_cookies_are_read_wherever_they_stand() {
        let both = Ok((Some("a.b.c".to_owned()), Some("d.e.f".to_owned())));
        assert_eq!(carried(PLAIN, &["x=1; accessToken=a.b.c; refreshToken=d.e.f"]), both);
        assert_eq!(carried(PLAIN, &["refreshToken=d.e.f", "accessToken=\"a.b.c\""]), both);
        assert_eq!(carried(PLAIN, &["accessToken=; refreshToken"]), Ok((None, None)));
        assert_eq!(carried(PLAIN, &[]), Ok((None, None)));
    }

    #[test]
    fn the_prefixed_names_alone_count_where_they_are_used() {
        assert_eq!(carried(STRICT, &["accessToken=x; __Host-accessToken=y"]), Ok((Some("y".to_owned()), None)));
    }

    #[test]
    fn a_cookie_that_comes_twice_is_refused() {
        assert_eq!(carried(PLAIN, &["refreshToken=a; refreshToken=b"]), Err(SentTwice("refreshToken")));
        assert_eq!(carried(PLAIN, &["accessToken=a", "accessToken=a"]), Err(SentTwice("accessToken")));
    }
}

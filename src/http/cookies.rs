//! The two cookies.

use std::time::Duration;

use axum::http::{HeaderMap, HeaderValue, header};
use axum_extra::extract::cookie::{Cookie, SameSite};
use chrono::{DateTime, Utc};
use secrecy::ExposeSecret;

use crate::{
    config::{Config, CookiePolicy},
    crypto::SignedToken,
    sessions::{Arrived, Carried, TokenPair},
};

const ACCESS: &str = "accessToken";
const REFRESH: &str = "refreshToken";

/// Reads both cookies, each as often as it comes. The header is read as bytes, cookie by cookie:
/// browsers send what others have set as it is, and a name or value of theirs that is no text says
/// nothing about ours. Names are compared as they are (`accesstoken` is another cookie).
pub fn read(headers: &HeaderMap, policy: CookiePolicy, arrived: Arrived) -> Carried {
    let (access, refresh) = (full_name(policy, ACCESS), full_name(policy, REFRESH));
    let mut carried = Carried::new(arrived);
    for pair in headers.get_all(header::COOKIE).iter().flat_map(|line| line.as_bytes().split(|byte| *byte == b';')) {
        let Some(equals) = pair.iter().position(|byte| *byte == b'=') else { continue };
        let (name, value) = (pair[..equals].trim_ascii(), &pair[equals + 1..]);
        let Some(value) = token(value) else { continue };
        if name == access.as_bytes() {
            carried = carried.with_access(value);
        } else if name == refresh.as_bytes() {
            carried = carried.with_refresh(value);
        }
    }
    carried
}

/// A cookie's value, if it can be a token at all; quotes around it are not part of it.
fn token(value: &[u8]) -> Option<&str> {
    let value = value.trim_ascii();
    let bare = value.strip_prefix(b"\"").and_then(|value| value.strip_suffix(b"\"")).unwrap_or(value);
    let text = std::str::from_utf8(bare).ok()?;
    (!text.is_empty() && text.bytes().all(|byte| byte.is_ascii_graphic())).then_some(text)
}

/// The complete Set-Cookie value for an access token. `now` is the database's time, as in the token.
pub fn access(config: &Config, token: &SignedToken, now: DateTime<Utc>) -> String {
    let life = seconds_left(token, config.tokens.access_ttl, now);
    set(config.http.cookies, ACCESS, token.token.expose_secret(), life)
}

fn refresh(config: &Config, token: &SignedToken, now: DateTime<Utc>) -> String {
    let life = seconds_left(token, config.tokens.refresh_ttl, now);
    set(config.http.cookies, REFRESH, token.token.expose_secret(), life)
}

/// The Set-Cookie values of both tokens.
pub fn both(config: &Config, tokens: &TokenPair) -> [String; 2] {
    [access(config, &tokens.access, tokens.at), refresh(config, &tokens.refresh, tokens.at)]
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

    fn carried(policy: CookiePolicy, cookies: &[&[u8]]) -> (Vec<String>, Vec<String>) {
        let lines = cookies.iter().map(|line| (header::COOKIE, HeaderValue::from_bytes(line).expect("a header")));
        let carried = read(&lines.collect(), policy, Arrived(std::time::Instant::now()));
        let (access, refresh) = carried.exposed();
        (access.map(str::to_owned).collect(), refresh.map(str::to_owned).collect())
    }

    fn some(access: &[&str], refresh: &[&str]) -> (Vec<String>, Vec<String>) {
        let owned = |tokens: &[&str]| tokens.iter().map(|token| (*token).to_owned()).collect();
        (owned(access), owned(refresh))
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
        let both = some(&["a.b.c"], &["d.e.f"]);
        for lines in [
            &[b"x=1; accessToken=a.b.c; refreshToken=d.e.f" as &[u8]] as &[_],
            &[b"refreshToken=d.e.f" as &[u8], b"accessToken=\"a.b.c\""],
            &[b"accessToken=a.b.c;refreshToken=d.e.f;"],
            &[b" accessToken = a.b.c ;; ; =; =x;\trefreshToken=d.e.f\t"],
        ] {
            assert_eq!(carried(PLAIN, lines), both, "{lines:?}");
        }
        for nothing in
            [&[] as &[&[u8]], &[b""], &[b"accessToken=; refreshToken"], &[b"accessToken=\"\"; refreshToken= "]]
        {
            assert_eq!(carried(PLAIN, nothing), some(&[], &[]), "{nothing:?}");
        }
    }

    #[test]
    fn an_unreadable_cookie_hides_no_other() {
        for beside in [
            "theme=d\u{fc}nkel".as_bytes(),
            b"theme=d\xfcnkel",
            b"\xff\xfe=\x80",
            b"accessToken=\xff",
            b"refreshToken=a b",
            b"accessToken=\"\"",
            b"$Version=1",
            b"{\"a\":1}",
            b"AccessToken=x; ACCESSTOKEN=y; accesstoken=z",
            b"xaccessToken=x; accessToken2=x",
        ] {
            for line in [[beside, b"; accessToken=a.b.c"].concat(), [b"accessToken=a.b.c; ", beside].concat()] {
                assert_eq!(carried(PLAIN, &[&line]), some(&["a.b.c"], &[]), "{}", line.escape_ascii());
            }
            assert_eq!(carried(PLAIN, &[beside, b"accessToken=a.b.c"]), some(&["a.b.c"], &[]));
        }
    }

    #[test]
    fn a_value_may_hold_equals_signs_and_half_a_quote_is_part_of_it() {
        assert_eq!(carried(PLAIN, &[b"accessToken=a=b==; refreshToken=\"x"]), some(&["a=b=="], &["\"x"]));
    }

    #[test]
    fn the_prefixed_names_alone_count_where_they_are_used() {
        assert_eq!(carried(STRICT, &[b"accessToken=x; __Host-accessToken=y"]), some(&["y"], &[]));
        assert_eq!(carried(PLAIN, &[b"accessToken=x; __Host-accessToken=y"]), some(&["x"], &[]));
    }

    #[test]
    fn a_cookie_that_comes_more_than_once_is_read_as_often_in_order_and_within_bounds() {
        assert_eq!(carried(PLAIN, &[b"refreshToken=b; refreshToken=a", b"refreshToken=b"]), some(&[], &["b", "a"]));
        let foreign = "x=1; ".repeat(5000);
        assert_eq!(carried(PLAIN, &[format!("{foreign}accessToken=y").as_bytes()]), some(&["y"], &[]));
        let many: String = (0..5000).map(|n| format!("accessToken={n}; ")).collect();
        assert_eq!(carried(PLAIN, &[many.as_bytes()]).0.len(), 200);
    }
}

//! Requests that change something are refused when a browser sends them for a foreign site.
//!
//! By fetch metadata where the browser sends it, else by `Origin`. A client that sends neither is
//! not a browser, and nobody's cookies ride along. tower-http's layer for this calls another origin
//! of the same site foreign too; the fleet's front end is just that (another port or subdomain of
//! the gateway's site), so the rule is written here.

use axum::{
    extract::{Request, State},
    http::{HeaderMap, Method, Uri, header},
    middleware::Next,
    response::{IntoResponse, Response},
};

use super::error::ApiError;
use crate::app::App;

/// Refuses what comes from a foreign site.
pub async fn refuse_foreign(State(app): State<App>, request: Request, next: Next) -> Response {
    let changes = !matches!(*request.method(), Method::GET | Method::HEAD | Method::OPTIONS);
    if changes && is_foreign(request.headers(), request.uri(), &app.config.http.cors_origins) {
        return ApiError::ForeignOrigin.into_response();
    }
    next.run(request).await
}

/// Whether a browser says that another site is behind the request. `ours` are origins the operator
/// has named.
fn is_foreign(headers: &HeaderMap, uri: &Uri, ours: &[String]) -> bool {
    let text = |name| headers.get(name).map(|value: &header::HeaderValue| value.as_bytes());
    let origin = text(header::ORIGIN.as_str()).filter(|origin| !origin.is_empty());
    if origin.is_some_and(|origin| ours.iter().any(|own| own.as_bytes() == origin)) {
        return false;
    }
    match text("sec-fetch-site") {
        Some(b"same-origin" | b"same-site" | b"none") => return false,
        // Plain HTTP, or an old browser.
        None | Some(b"") => {}
        Some(_) => return true,
    }
    let Some(origin) = origin else { return false };
    let Some(origin_host) = Uri::try_from(origin).ok().and_then(|origin| origin.host().map(str::to_owned)) else {
        // "null" (a sandboxed page, a local file), or nothing that was ever an origin.
        return true;
    };
    // A page can't set these two without asking by CORS first. The second is what the browser
    // addressed where a gateway stands in between.
    let addressed = [text("host"), text("x-forwarded-host")];
    let is_own = |host: &[u8]| {
        let host = Uri::try_from(host).ok();
        host.and_then(|host| host.host().map(|host| host.eq_ignore_ascii_case(&origin_host))).unwrap_or(false)
    };
    let by_target = uri.host().is_some_and(|host| host.eq_ignore_ascii_case(&origin_host));
    !by_target && !addressed.into_iter().flatten().any(is_own)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn foreign(given: &[(&'static str, &'static str)]) -> bool {
        let headers = given
            .iter()
            .map(|(name, value)| (name.parse().expect("a name"), value.parse().expect("a value")))
            .collect();
        is_foreign(&headers, &Uri::from_static("/login"), &["https://app.example".to_owned()])
    }

    #[test]
    fn fetch_metadata_decides_where_there_is_any() {
        for (site, expected) in [
            ("same-origin", false),
            ("none", false),
            ("same-site", false),
            ("cross-site", true),
            ("what-is-this", true),
        ] {
            assert_eq!(foreign(&[("host", "auth.test"), ("sec-fetch-site", site)]), expected, "{site}");
        }
        // A matching host does not help a page the browser calls foreign.
        assert!(foreign(&[("host", "a.test"), ("origin", "https://a.test"), ("sec-fetch-site", "cross-site")]));
    }

    #[test]
    fn without_it_the_origin_has_to_be_the_host_that_was_addressed() {
        for (origin, host, expected) in [
            ("https://auth.test", "auth.test", false),
            ("http://auth.test:3000", "auth.test:4003", false),
            ("http://AUTH.test", "auth.test:4003", false),
            ("http://[::1]:3000", "[::1]:4003", false),
            ("https://evil.test", "auth.test", true),
            ("https://auth.test.evil.test", "auth.test", true),
            ("null", "auth.test", true),
            ("", "auth.test", false),
            ("::::", "auth.test", true),
        ] {
            assert_eq!(foreign(&[("host", host), ("origin", origin)]), expected, "{origin} to {host}");
        }
    }

    #[test]
    fn behind_a_gateway_the_forwarded_host_is_the_one_addressed() {
        let through =
            [("host", "auth-service:4003"), ("origin", "http://shop.test"), ("x-forwarded-host", "shop.test")];
        assert!(!foreign(&through));
        assert!(foreign(&through[..2]));
    }

    #[test]
    fn origins_the_operator_named_are_ours() {
        let cross = [("host", "auth.test"), ("sec-fetch-site", "cross-site")];
        assert!(!foreign(&[cross[0], cross[1], ("origin", "https://app.example")]));
        assert!(foreign(&[cross[0], cross[1], ("origin", "https://app.example.evil.test")]));
        assert!(!foreign(&[("host", "auth.test"), ("origin", "https://app.example")]));
    }

    #[test]
    fn who_is_no_browser_is_not_foreign() {
        assert!(!foreign(&[("host", "auth.test")]));
        assert!(!foreign(&[]));
    }
}

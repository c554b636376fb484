//! What is read of a request's headers: cookies, idempotency key, trace context, user agent.

use std::time::Instant;

use auth_service::{
    accounts::RequestContext,
    config::CookiePolicy,
    http::{context::Ids, cookies},
    sessions::Arrived,
};
use axum::{
    extract::FromRequestParts,
    http::{HeaderMap, HeaderValue, Request, header},
};

use super::Target;
use crate::{
    http::headers,
    service::{APP, RUNTIME},
};

/// Header lines.
pub const TARGET: Target = Target {
    name: "headers",
    seeds: &[
        b"cookie: accessToken=a.b.c; refreshToken=d.e.f",
        b"cookie: theme=d\xc3\xbcnkel; __Host-accessToken=\"a.b.c\"; x\ncookie: refreshToken=; =; refreshToken = y",
        b"idempotency-key: 0198c0de-0000-7000-8000-000000000001\nuser-agent: Mozilla/5.0 \xff\xfe",
        b"idempotency-key: a\nidempotency-key: b",
        b"traceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\ntracestate: a=b,c=d",
        b"traceparent: ff-00000000000000000000000000000000-00f067aa0ba902b7-01-x\nidempotency-key: \t",
    ],
    run,
};

fn run(input: &[u8]) {
    let headers = headers(input.split(|byte| *byte == b'\n'));
    for policy in [(true, true), (true, false), (false, false)] {
        check_cookies(headers.clone(), CookiePolicy { secure: policy.0, host_prefix: policy.1 });
    }
    check_context(headers);
}

fn check_cookies(mut headers: HeaderMap, policy: CookiePolicy) {
    let read = |headers: &HeaderMap| {
        let carried = cookies::read(headers, policy, Arrived(Instant::now()));
        let (access, refresh) = carried.exposed();
        [access.map(str::to_owned).collect::<Vec<_>>(), refresh.map(str::to_owned).collect()]
    };
    let lines: Vec<Vec<u8>> = headers.get_all(header::COOKIE).iter().map(|line| line.as_bytes().to_vec()).collect();
    let found = read(&headers);
    for token in found.iter().flatten() {
        assert!(!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic()), "{token:?}");
        assert!(!token.contains(';'), "{token:?}");
        let stands = |line: &Vec<u8>| line.windows(token.len()).any(|window| window == token.as_bytes());
        assert!(lines.iter().any(stands), "{token:?} stands in no cookie");
    }
    // Whatever came before it, a good cookie is seen.
    let prefix = if policy.secure && policy.host_prefix { "__Host-" } else { "" };
    let good = HeaderValue::try_from(format!("{prefix}refreshToken=good.good.good")).expect("a header");
    headers.append(header::COOKIE, good);
    let [access, refresh] = read(&headers);
    assert_eq!(access, found[0], "another cookie changed the access tokens");
    assert!(refresh.len() >= 200 || refresh.iter().any(|token| token == "good.good.good"), "a good cookie is hidden");
}

fn check_context(headers: HeaderMap) {
    let keys = headers.get_all("idempotency-key").iter().count();
    let mut request = Request::new(());
    *request.headers_mut() = headers;
    let ids = Ids { correlation_id: "c".to_owned(), correlation_given: false };
    request.extensions_mut().insert(ids);
    let (mut parts, ()) = request.into_parts();
    let Ok(context) = RUNTIME.block_on(RequestContext::from_request_parts(&mut parts, &APP)) else {
        assert!(keys > 0, "nothing but an idempotency key can be refused");
        return;
    };
    if let Some(key) = &context.idempotency_key {
        assert!(keys == 1 && (1..=255).contains(&key.len()), "{key:?}");
        assert!(key.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{key:?}");
    }
    if let Some(parent) = &context.traceparent {
        assert!(parent.len() == 55 && parent.starts_with("00-"), "{parent:?}");
        assert!(parent.bytes().all(|byte| byte == b'-' || byte.is_ascii_hexdigit()), "{parent:?}");
    }
    if let Some(agent) = &context.user_agent {
        assert!(agent.chars().count() <= 256 && !agent.chars().any(char::is_control), "{agent:?}");
    }
}

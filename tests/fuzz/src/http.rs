//! HTTP requests out of text, and what every answer must be.

use std::sync::LazyLock;

use auth_service::fuzzing;
use axum::{
    Router,
    body::Body,
    http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Response, StatusCode, Uri, header},
};
use http_body_util::BodyExt;
use serde_json::Value;
use tower::ServiceExt;

use crate::{
    parts::text,
    service::{APP, RUNTIME, filled_in},
};

/// Stands for a secret in seeds: it must not come back.
pub const CANARY: &str = "c4nary";

/// `METHOD target`, header lines, an empty line, the body. `None`: what hyper would not pass on either.
pub fn request(input: &[u8]) -> Option<Request<Body>> {
    let (head, body) = match input.windows(2).position(|window| window == b"\n\n") {
        Some(at) => (&input[..at], &input[at + 2..]),
        None => (input, &b""[..]),
    };
    let mut lines = head.split(|byte| *byte == b'\n');
    let first = lines.next()?;
    let space = first.iter().position(|byte| *byte == b' ')?;
    let mut request = Request::new(Body::from(body.to_vec()));
    *request.method_mut() = Method::from_bytes(&first[..space]).ok()?;
    *request.uri_mut() = Uri::try_from(&first[space + 1..]).ok()?;
    *request.headers_mut() = headers(lines);
    Some(request)
}

/// Header lines; those that are none are left out.
pub fn headers<'l>(lines: impl Iterator<Item = &'l [u8]>) -> HeaderMap {
    lines
        .filter_map(|line| {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let name = HeaderName::from_bytes(line[..colon].trim_ascii()).ok()?;
            Some((name, HeaderValue::from_bytes(&filled_in(line[colon + 1..].trim_ascii())).ok()?))
        })
        .collect()
}

pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
    pub trailers: HeaderMap,
}

pub fn answer(router: &Router, request: Request<Body>) -> Answer {
    RUNTIME.block_on(async {
        let response: Response<Body> = router.clone().oneshot(request).await.unwrap_or_else(|never| match never {});
        let (parts, body) = response.into_parts();
        let collected = body.collect().await.expect("a body that ends");
        let trailers = collected.trailers().cloned().unwrap_or_default();
        Answer { status: parts.status, headers: parts.headers, body: collected.to_bytes().to_vec(), trailers }
    })
}

/// What holds of every answer of REST and of the operators' port.
pub fn check_json(input: &[u8], router: &Router) {
    let Some(request) = request(input) else { return };
    let (method, given) = (request.method().clone(), request.headers().clone());
    let head = format!("{method} {} {given:?}", request.uri());
    let answer = answer(router, request);
    let Answer { status, headers, body, .. } = &answer;

    let known = status.is_success() || status.is_client_error() || *status == StatusCode::SERVICE_UNAVAILABLE;
    assert!(known, "{status} for {head}");
    assert!(!headers.contains_key("x-request-id") || headers["x-request-id"].len() <= 128);
    if let Some(id) = headers.get("x-correlation-id") {
        let shown = id.to_str().expect("a text");
        assert!((1..=128).contains(&shown.len()) && shown.bytes().all(|byte| byte.is_ascii_graphic()), "{shown:?}");
    }
    assert!(head.contains(CANARY) || !text(body).contains(CANARY), "a secret in the answer to {head}");
    let kind = headers.get(header::CONTENT_TYPE).and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    if body.is_empty() || kind.starts_with("text/plain") {
        // Answers to HEAD and to preflights, and the metrics.
        assert!(status.is_success() || method == Method::HEAD, "an empty {status} for {head}");
        return;
    }
    let json: Value = serde_json::from_slice(body).unwrap_or_else(|error| panic!("{error}: {} for {head}", text(body)));
    let said = if kind == "application/problem+json" { &json["status"] } else { &json["statusCode"] };
    let stands_alone = status.is_success() && said.is_null();
    assert!(stands_alone || *said == status.as_u16(), "{status} but {json} for {head}");
    if !status.is_success() && kind != "application/problem+json" {
        assert!(json["errorCode"].is_string() && json["error"]["code"] == json["errorCode"], "{json} for {head}");
        let bounded = |message: &str| message.len() <= 16 * input.len() + 1000;
        assert!(json["message"].as_str().is_some_and(bounded), "{json} for {head}");
    }
}

pub static REST: LazyLock<Router> = LazyLock::new(|| auth_service::http::router(APP.clone()));
pub static ADMIN: LazyLock<Router> = LazyLock::new(|| auth_service::admin::router(APP.clone()));
pub static GRPC: LazyLock<Router> = LazyLock::new(|| fuzzing::grpc(&APP).expect("the contracts"));

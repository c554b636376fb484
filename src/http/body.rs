//! The body's bounds, before anything else looks at it.
//!
//! A body that is too large is read to its end all the same (within bounds) before it is refused:
//! a client that is still sending when the connection closes sees a reset instead of the answer.

use axum::{
    body::{Body, Bytes},
    extract::{Request, State},
    http::{HeaderMap, HeaderValue, header},
    middleware::Next,
    response::{IntoResponse, Response},
};
use http_body_util::BodyExt;

use super::error::ApiError;
use crate::{app::App, domain::FieldError};

/// Most that is read of a body that will be refused.
const DRAIN_AT_MOST: usize = 64 * 1024 * 1024;

/// Passes a request on with its whole body in memory, at most `body_limit` bytes.
pub async fn bound(State(app): State<App>, request: Request, next: Next) -> Response {
    let limit = app.config.http.body_limit;
    let (parts, body) = request.into_parts();
    // Who asks before sending can be told no before sending.
    if expects_continue(&parts.headers) && announced(&parts.headers).is_some_and(|length| length > limit as u64) {
        return closing(ApiError::PayloadTooLarge { limit });
    }
    match tokio::time::timeout(app.config.timeouts.body, read(body, limit)).await {
        Ok(Ok(bytes)) => next.run(Request::from_parts(parts, Body::from(bytes))).await,
        Ok(Err(error)) => closing(error),
        Err(_) => closing(ApiError::RequestTimeout),
    }
}

async fn read(mut body: Body, limit: usize) -> Result<Bytes, ApiError> {
    let mut kept = Vec::new();
    let mut seen = 0;
    while let Some(frame) = body.frame().await {
        let Ok(frame) = frame else {
            return Err(ApiError::Validation(vec![FieldError::new("body", "did not arrive whole")]));
        };
        let Ok(data) = frame.into_data() else {
            continue;
        };
        seen += data.len();
        if seen > DRAIN_AT_MOST {
            break;
        }
        if seen <= limit {
            kept.extend_from_slice(&data);
        }
    }
    if seen > limit { Err(ApiError::PayloadTooLarge { limit }) } else { Ok(kept.into()) }
}

fn expects_continue(headers: &HeaderMap) -> bool {
    headers.get(header::EXPECT).is_some_and(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

fn announced(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// There may be more of the body on its way, so the connection is of no further use.
fn closing(error: ApiError) -> Response {
    let mut response = error.into_response();
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_body_of_just_the_limit_is_taken_and_one_byte_more_is_not() {
        let body = |size| Body::from(vec![b'x'; size]);
        assert_eq!(read(body(16), 16).await.map(|bytes| bytes.len()), Ok(16));
        assert_eq!(read(body(17), 16).await, Err(ApiError::PayloadTooLarge { limit: 16 }));
        assert_eq!(read(Body::empty(), 16).await.map(|bytes| bytes.len()), Ok(0));
    }
}

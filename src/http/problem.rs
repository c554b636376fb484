//! The other form of an error: RFC 9457, for clients that ask for it.

use axum::{
    Json,
    http::{HeaderMap, HeaderValue, header},
    response::{IntoResponse, Response},
};
use serde_json::{Value, json};

use super::error::ApiError;

const MEDIA_TYPE: &str = "application/problem+json";

/// Whether the client accepts problem documents.
pub fn wanted(headers: &HeaderMap) -> bool {
    headers
        .get_all(header::ACCEPT)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .any(|range| {
            let mut parts = range.split(';').map(str::trim);
            let named = parts.next().is_some_and(|media| media.eq_ignore_ascii_case(MEDIA_TYPE));
            let refused = parts.any(|parameter| {
                let (name, value) = parameter.split_once('=').unwrap_or((parameter, ""));
                name.trim().eq_ignore_ascii_case("q") && value.trim().parse::<f32>().is_ok_and(|q| q <= 0.0)
            });
            named && !refused
        })
}

/// Gives an error's answer its other form; cookies and headers stay.
pub fn rewrite(response: Response, request_id: &str) -> Response {
    let Some(error) = response.extensions().get::<ApiError>() else {
        return response;
    };
    let (replacement, body) = Json(document(error, request_id)).into_response().into_parts();
    let (mut parts, _) = response.into_parts();
    parts.headers.remove(header::CONTENT_LENGTH);
    parts.headers.extend(replacement.headers);
    parts.headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(MEDIA_TYPE));
    Response::from_parts(parts, body)
}

fn document(error: &ApiError, request_id: &str) -> Value {
    let mut document = json!({
        "type": "about:blank",
        "title": error.status().canonical_reason(),
        "status": error.status().as_u16(),
        "detail": error.message(),
        "code": error.code(),
        "requestId": request_id,
    });
    if !error.fields().is_empty() {
        document["errors"] = json!(error.fields());
    }
    document
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_who_names_it_gets_it() {
        for (accept, expected) in [
            ("application/problem+json", true),
            ("application/json, Application/Problem+JSON;q=0.5", true),
            ("application/problem+json; q=0", false),
            ("application/json", false),
            ("*/*", false),
        ] {
            let headers = HeaderMap::from_iter([(header::ACCEPT, HeaderValue::from_static(accept))]);
            assert_eq!(wanted(&headers), expected, "{accept}");
        }
        assert!(!wanted(&HeaderMap::new()));
    }

    #[test]
    fn a_problem_keeps_the_answers_headers() {
        let response = rewrite(ApiError::Unavailable.into_response(), "r-1");
        assert_eq!(response.status(), 503);
        assert_eq!(response.headers()[header::CONTENT_TYPE], MEDIA_TYPE);
        assert_eq!(response.headers()[header::RETRY_AFTER], "2");
    }

    #[test]
    fn a_problem_says_the_same_in_its_own_words() {
        let document = document(&ApiError::NotFound, "r-1");
        assert_eq!(document["status"], 404);
        assert_eq!(document["title"], "Not Found");
        assert_eq!(document["code"], "NOT_FOUND");
        assert_eq!(document["requestId"], "r-1");
    }
}

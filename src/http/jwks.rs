//! `GET /.well-known/jwks.json`: the keys that access tokens are verified with, and no others.

use aws_lc_rs::digest;
use axum::{
    extract::State,
    http::{HeaderMap, HeaderValue, StatusCode, header},
    response::{IntoResponse, Response},
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};

use super::error::ApiError;
use crate::app::App;

/// Short, so that a key that is to be used tomorrow is known everywhere today.
const CACHE: &str = "public, max-age=300";

pub async fn jwks(State(app): State<App>, headers: HeaderMap) -> Result<Response, ApiError> {
    let body = serde_json::to_vec(&app.signer.jwks()).map_err(|error| {
        tracing::error!(%error, "the public keys could not be written");
        ApiError::Internal
    })?;
    let digest = digest::digest(&digest::SHA256, &body);
    let tag = format!("\"{}\"", URL_SAFE_NO_PAD.encode(&digest.as_ref()[..18]));
    let known = headers
        .get_all(header::IF_NONE_MATCH)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|value| value.trim().trim_start_matches("W/"))
        .any(|value| value == tag || value == "*");
    let mut response = match known {
        true => StatusCode::NOT_MODIFIED.into_response(),
        false => ([(header::CONTENT_TYPE, "application/json")], body).into_response(),
    };
    response.headers_mut().insert(header::CACHE_CONTROL, HeaderValue::from_static(CACHE));
    if let Ok(tag) = HeaderValue::try_from(tag) {
        response.headers_mut().insert(header::ETAG, tag);
    }
    Ok(response)
}

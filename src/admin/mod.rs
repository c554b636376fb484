//! The operators' port: the outbox, the relays, the sagas, who did what, and `/metrics`.
//!
//! Everything but `/metrics` asks for a bearer token ([`auth`]). Whatever changes something takes a
//! reason and stands in the audit log: the change and its line commit together or not at all, and
//! what was refused has a line of its own (`change`).

mod audit;
pub mod auth;
mod change;
mod error;
mod metrics;
mod outbox;
mod params;
mod relay;
mod replay;
mod sagas;

use std::{any::Any, time::Duration};

use axum::{
    Extension, Json, Router,
    extract::DefaultBodyLimit,
    http::{HeaderValue, StatusCode, header},
    middleware::{from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use outbox_relay::logging::truncated;
use serde::Serialize;
use serde_json::{Value, json};
use tower_http::{catch_panic::CatchPanicLayer, set_header::SetResponseHeaderLayer};

use crate::{app::App, http::context};
use error::AdminError;

/// Requests under way when a stop begins have this long to finish.
pub const FINISH_DEADLINE: Duration = Duration::from_secs(10);
/// A reason and a filter.
const BODY_LIMIT: usize = 16 * 1024;

/// All routes.
pub fn router(app: App) -> Router {
    let guarded = Router::new()
        .route("/admin/outbox", get(outbox::list))
        .route("/admin/outbox/replay", post(replay::many))
        .route("/admin/outbox/{id}", get(outbox::show))
        .route("/admin/outbox/{id}/replay", post(replay::one))
        .route("/admin/sagas", get(sagas::list))
        .route("/admin/sagas/{id}", get(sagas::show))
        .route("/admin/relay", get(relay::show))
        .route("/admin/relay/pause", post(relay::pause))
        .route("/admin/relay/resume", post(relay::resume))
        .route("/admin/audit", get(audit::list))
        .fallback(async || AdminError::NoRoute)
        .method_not_allowed_fallback(async || AdminError::MethodNotAllowed)
        .layer(DefaultBodyLimit::max(BODY_LIMIT))
        .layer(from_fn_with_state(app.clone(), auth::admit))
        .layer(CatchPanicLayer::custom(caught))
        .layer(from_fn(context::context));
    let scraped = Router::new()
        .route("/metrics", get(metrics::show))
        .method_not_allowed_fallback(async || AdminError::MethodNotAllowed)
        .layer(Extension(metrics::Scrapes::default()));
    let fixed = |name, value| SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value));
    scraped
        .merge(guarded)
        .layer(fixed(header::CACHE_CONTROL, "no-store"))
        .layer(fixed(header::X_CONTENT_TYPE_OPTIONS, "nosniff"))
        .with_state(app)
}

/// A success, in the shape REST has.
struct Success<T> {
    message: &'static str,
    data: T,
    /// For lists: what to pass as `cursor` for the next page; `None` on the last one.
    next: Option<Option<String>>,
}

impl<T> Success<T> {
    fn of(message: &'static str, data: T) -> Self {
        Self { message, data, next: None }
    }
}

impl<T> Success<Vec<T>> {
    /// A page of at most `limit` rows.
    fn page(message: &'static str, data: Vec<T>, limit: i64, cursor: impl Fn(&T) -> String) -> Self {
        let full = i64::try_from(data.len()).is_ok_and(|length| length >= limit);
        let next = data.last().filter(|_| full).map(cursor);
        Self { message, data, next: Some(next) }
    }
}

impl<T: Serialize> IntoResponse for Success<T> {
    fn into_response(self) -> Response {
        let mut body: Value =
            json!({ "statusCode": StatusCode::OK.as_u16(), "message": self.message, "data": self.data });
        if let Some(next) = self.next {
            body["nextCursor"] = json!(next);
        }
        Json(body).into_response()
    }
}

fn caught(panic: Box<dyn Any + Send>) -> Response {
    let said = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("nothing");
    tracing::error!(said = %truncated(said), "an admin handler panicked");
    AdminError::Internal.into_response()
}

use std::time::Duration;

use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use chrono::{SecondsFormat, Utc};
use outbox_relay::trouble::{TroubleKind, Troubles};
use serde_json::{Value, json};

use crate::{app::App, health::Readiness, http::error::ApiError};

/// `GET /auth/health/live`: touches no dependency, because a restart cures none of theirs.
pub async fn live(State(app): State<App>) -> Response {
    Json(report(&app, StatusCode::OK)).into_response()
}

/// `GET /auth/health` and `GET /auth/health/ready`: whether requests can be served. A no has the
/// health report's fields and the error's, for readers of either. What keeps a role from its work, while
/// requests are served, is a detail.
pub async fn ready(State(app): State<App>) -> Response {
    let readiness = app.health.check(&app).await;
    if readiness == Readiness::Ready {
        let mut body = report(&app, StatusCode::OK);
        add_details(&app, &mut body);
        return Json(body).into_response();
    }
    let error = ApiError::Unavailable;
    let mut body = report(&app, error.status());
    add_details(&app, &mut body);
    let message = readiness.to_string();
    body["statusCode"] = body["status"].clone();
    body["message"] = json!(message);
    body["errorCode"] = json!(error.code());
    body["error"] = json!({ "code": error.code(), "message": message });
    let (mut parts, _) = error.into_response().into_parts();
    parts.headers.remove(axum::http::header::CONTENT_LENGTH);
    Response::from_parts(parts, Json(body).into_response().into_body())
}

fn add_details(app: &App, body: &mut Value) {
    let parts = [("relay", listed(&app.publishing)), ("sagas", listed(&app.replies))];
    let troubled: serde_json::Map<String, Value> = parts
        .into_iter()
        .filter(|(_, troubles)| !troubles.is_empty())
        .map(|(part, t)| (part.to_owned(), json!(t)))
        .collect();
    if !troubled.is_empty() {
        body["details"] = Value::Object(troubled);
    }
}

fn listed<K: TroubleKind>(troubles: &Troubles<K>) -> Vec<Value> {
    let one = |(kind, detail, since): (K, String, Duration)| json!({ "trouble": kind.as_str(), "detail": detail, "seconds": since.as_secs() });
    troubles.now().into_iter().map(one).collect()
}

fn report(app: &App, status: StatusCode) -> Value {
    json!({
        "status": status.as_u16(),
        "timestamp": Utc::now().to_rfc3339_opts(SecondsFormat::Millis, true),
        "uptime": app.started.elapsed().as_millis() as f64 / 1000.0,
        "service": "auth-service",
        "version": env!("CARGO_PKG_VERSION"),
    })
}

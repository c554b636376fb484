use axum::{
    Json,
    extract::State,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use chrono::{SecondsFormat, Utc};
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
    let troubles = app.replies.troubles();
    if !troubles.is_empty() {
        let troubles: Vec<Value> = troubles
            .iter()
            .map(|(trouble, detail, since)| {
                json!({ "trouble": trouble.as_str(), "detail": detail, "seconds": since.as_secs() })
            })
            .collect();
        body["details"] = json!({ "sagas": troubles });
    }
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

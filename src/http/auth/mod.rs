//! The resources, one file each, and the shape of their success.

mod health;
mod login;
mod logout;
mod me;
mod refresh;
mod register;

use axum::{
    Json, Router,
    http::StatusCode,
    response::{IntoResponse, Response},
    routing::{delete, get, post},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::cookies;
use crate::{app::App, domain::User};

/// The routes, without their prefix.
pub fn router(app: &App) -> Router<App> {
    let router = Router::new()
        .route("/register", post(register::register))
        .route("/login", post(login::login))
        .route("/logout", delete(logout::logout))
        .route("/me", get(me::me))
        .route("/health", get(health::ready))
        .route("/health/ready", get(health::ready))
        .route("/health/live", get(health::live));
    match app.config.http.rest_refresh {
        true => router.route("/refresh", post(refresh::refresh)),
        false => router,
    }
}

/// A success, with the cookies it sets.
struct Success<T> {
    status: StatusCode,
    message: &'static str,
    data: T,
    cookies: Vec<String>,
}

impl<T: Serialize> IntoResponse for Success<T> {
    fn into_response(self) -> Response {
        let body = json!({ "statusCode": self.status.as_u16(), "message": self.message, "data": self.data });
        let mut response = (self.status, Json(body)).into_response();
        cookies::append(response.headers_mut(), self.cookies);
        response
    }
}

/// A user as clients see it.
fn shown(user: &User) -> Value {
    json!({
        "id": user.id.0,
        "username": user.username,
        "email": user.email,
        "isVerified": user.is_verified,
    })
}

//! REST: the router and what stands around every route.
//!
//! From the outside in: request ids and the error's final form ([`context`]), security headers, the
//! panic catcher, CORS, the body's bounds ([`body`]), the origin policy ([`origin`]), a deadline,
//! the routes. Every error on the way is an [`error::ApiError`].

mod auth;
mod body;
pub mod context;
pub mod cookies;
pub mod error;
mod extract;
mod jwks;
mod origin;
mod problem;

use std::{any::Any, time::Duration};

use axum::{
    Router,
    extract::Request,
    http::{HeaderName, HeaderValue, Method, StatusCode, header},
    middleware::{Next, from_fn, from_fn_with_state},
    response::{IntoResponse, Response},
    routing::get,
};
use outbox_relay::logging::truncated;
use serde_json::Value;
use tower_http::{
    catch_panic::CatchPanicLayer,
    cors::{AllowOrigin, CorsLayer},
    set_header::SetResponseHeaderLayer,
};

use crate::app::App;
use error::ApiError;

/// What a request may take beside waiting for hashes and connections. Everything in it has a bound
/// of its own, and this is above their sum: it must never cut a COMMIT short whose outcome could
/// still be told.
const WORK_DEADLINE: Duration = Duration::from_secs(45);
/// Requests under way when a stop begins have this long to finish.
pub const FINISH_DEADLINE: Duration = Duration::from_secs(20);

/// All routes, each under `/auth/…` and, for gateways that strip that, under its bare path.
pub fn router(app: App) -> Router {
    let resources = auth::router(&app);
    let config = &app.config;
    let work = WORK_DEADLINE + 3 * config.passwords.hasher.max_wait + 4 * config.database.acquire_timeout;
    let mut router = Router::new()
        .merge(resources.clone())
        .nest("/auth", resources)
        .route("/.well-known/jwks.json", get(jwks::jwks))
        .fallback(async || ApiError::NotFound)
        .method_not_allowed_fallback(async || ApiError::MethodNotAllowed)
        .layer(from_fn(move |request, next| deadline(work, request, next)))
        .layer(from_fn_with_state(app.clone(), origin::refuse_foreign))
        .layer(from_fn_with_state(app.clone(), body::bound));
    if let Some(cors) = cors(&config.http.cors_origins) {
        router = router.layer(cors);
    }
    router = router.layer(CatchPanicLayer::custom(caught));
    for (name, value) in headers(config.http.cookies.secure) {
        router = router.layer(SetResponseHeaderLayer::if_not_present(name, HeaderValue::from_static(value)));
    }
    router.layer(from_fn(context::context)).with_state(app)
}

/// What hyper can't read never comes to a route; this is the body of its answer.
pub fn unreadable(status: StatusCode) -> Value {
    ApiError::Unreadable(status).body()
}

/// Answers what takes too long. Only the waiting ends: a transaction that has begun ends by itself.
async fn deadline(work: Duration, request: Request, next: Next) -> Response {
    match tokio::time::timeout(work, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::Unavailable.into_response(),
    }
}

fn caught(panic: Box<dyn Any + Send>) -> Response {
    let said = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("nothing");
    tracing::error!(said = %truncated(said), "a request handler panicked");
    ApiError::Internal.into_response()
}

fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origins: Vec<HeaderValue> = origins.iter().filter_map(|origin| origin.parse().ok()).collect();
    let own = ["x-correlation-id", "idempotency-key"].map(HeaderName::from_static);
    (!origins.is_empty()).then(|| {
        CorsLayer::new()
            .allow_origin(AllowOrigin::list(origins))
            .allow_credentials(true)
            .allow_methods([Method::GET, Method::POST, Method::PUT, Method::DELETE])
            .allow_headers([header::CONTENT_TYPE, header::ACCEPT].into_iter().chain(own.clone()).collect::<Vec<_>>())
            .expose_headers([context::REQUEST_ID, context::CORRELATION_ID, header::RETRY_AFTER])
            .max_age(Duration::from_secs(600))
            // The layer would put its own list in place of ours.
            .vary([header::ACCEPT, header::ORIGIN, HeaderName::from_static("sec-fetch-site")])
    })
}

/// On every answer that does not say otherwise itself.
fn headers(secure: bool) -> impl Iterator<Item = (HeaderName, &'static str)> {
    let always = [
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::CONTENT_SECURITY_POLICY, "default-src 'none'; frame-ancestors 'none'"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::VARY, "Accept, Origin, Sec-Fetch-Site"),
    ];
    let over_tls = secure.then_some((header::STRICT_TRANSPORT_SECURITY, "max-age=31536000"));
    always.into_iter().chain(over_tls)
}

#[cfg(test)]
mod tests {
    use axum::body::{Body, to_bytes};
    use tower::ServiceExt;

    use super::*;

    #[tokio::test]
    async fn a_panic_is_answered_in_the_fleets_shape_and_tells_nothing() {
        let router: Router = Router::new()
            .route("/", get(async || -> () { panic!("the pepper is salt") }))
            .layer(CatchPanicLayer::custom(caught))
            .layer(from_fn(context::context));
        let response = router.oneshot(Request::new(Body::empty())).await.expect("an answer");
        assert_eq!(response.status(), 500);
        assert!(response.headers().contains_key(context::REQUEST_ID));
        let body = to_bytes(response.into_body(), 4096).await.expect("a body");
        let body: serde_json::Value = serde_json::from_slice(&body).expect("JSON");
        assert_eq!(body, ApiError::Internal.body());
        assert_eq!(body["errorCode"], "INTERNAL_ERROR");
    }

    #[test]
    fn tls_is_demanded_only_where_cookies_demand_it_too() {
        let demanded = |secure| headers(secure).any(|(name, _)| name == header::STRICT_TRANSPORT_SECURITY);
        assert!(demanded(true) && !demanded(false));
    }
}

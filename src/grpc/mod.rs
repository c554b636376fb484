//! gRPC: tokens for gateways, accounts for other services, health and reflection.
//!
//! Every refusal is a line of `status`. From the outside in: the panic catcher, then `surround`
//! (log line, figures, deadline, and the code of what tonic itself could not read), then the
//! services.
//!
//! `UNAUTHENTICATED` from `TokenService` and `token.Token` means that the session is over;
//! `UNAVAILABLE` and `DEADLINE_EXCEEDED` that it is not known. A request that can't be read, or is
//! larger than 64 KiB, is `INVALID_ARGUMENT`; a method that does not exist is `UNIMPLEMENTED`.

mod account;
mod callers;
mod legacy;
mod readiness;
mod status;
mod surround;
mod token;

use std::{any::Any, io, sync::Arc, time::Duration};

use auth_proto::{
    auth::v1::{account_service_server::AccountServiceServer, token_service_server::TokenServiceServer},
    legacy::token::token_server::TokenServer,
};
use axum::middleware::from_fn;
use outbox_relay::logging::truncated;
use tokio_util::sync::CancellationToken;
use tonic::{body::Body, service::Routes};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{
    app::App,
    config::GrpcTls,
    server::{Listener, Protocol, tls},
};
use callers::Callers;
use readiness::Readiness;

/// A token is at most 4 KiB; no request is larger than a few of them.
const LARGEST_REQUEST: usize = 64 * 1024;
/// Requests under way when a stop begins have this long to finish.
const FINISH_DEADLINE: Duration = Duration::from_secs(20);
const HEALTH: &str = "grpc.health.v1.Health";

/// Why gRPC is not served.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// Certificate and key don't go together, say.
    #[error("GRPC_TLS_CERT, GRPC_TLS_KEY or GRPC_TLS_CLIENT_CA can't be used: {0}")]
    Tls(String),
    /// The contracts in this binary can't be read.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Serving failed.
    #[error("gRPC: {0}")]
    Serving(#[source] io::Error),
}

/// What the port speaks, with certificates that are read and tested.
pub fn protocol(tls: Option<&GrpcTls>) -> Result<Protocol, GrpcError> {
    Ok(Protocol::Grpc(tls.map(tls::acceptor).transpose().map_err(GrpcError::Tls)?))
}

/// Serves until `stop`, then finishes what is under way. The health service says NOT_SERVING until
/// this instance is ready, whenever it is not, and from the beginning of the drain.
pub async fn serve(listener: Arc<Listener>, app: App, stop: CancellationToken) -> Result<(), GrpcError> {
    let (reporter, health) = tonic_health::server::health_reporter();
    let readiness = Readiness::new(reporter, served_names(&app)).await;
    let routes = routes(&app)?.add_service(health);
    let router =
        routes.prepare().into_axum_router().layer(from_fn(surround::surround)).layer(CatchPanicLayer::custom(caught));
    // Following ends with the streams of those who watch: they would hold the stop up for ever.
    let (served, ()) =
        tokio::join!(listener.serve(router, FINISH_DEADLINE, stop.clone()), readiness.follow(&app, &stop));
    served.map_err(GrpcError::Serving)
}

fn routes(app: &App) -> Result<Routes, GrpcError> {
    let callers = Callers::new(&app.config.grpc);
    let accounts =
        AccountServiceServer::new(account::Accounts::new(app.clone())).max_decoding_message_size(LARGEST_REQUEST);
    let tokens = TokenServiceServer::new(token::Tokens::new(app.clone())).max_decoding_message_size(LARGEST_REQUEST);
    let mut routes = Routes::new(tokens)
        .add_service(tonic::service::interceptor::InterceptedService::new(accounts, callers))
        .add_service(reflection(app).build_v1()?)
        .add_service(reflection(app).build_v1alpha()?);
    if app.config.grpc.legacy_token_rpc {
        let legacy = TokenServer::new(legacy::LegacyTokens::new(app.clone()));
        routes = routes.add_service(legacy.max_decoding_message_size(LARGEST_REQUEST));
    }
    Ok(routes)
}

/// All services but the one for health, and what surrounds them.
#[cfg(feature = "fuzzing")]
pub(crate) fn router(app: &App) -> Result<axum::Router, GrpcError> {
    Ok(routes(app)?.prepare().into_axum_router().layer(from_fn(surround::surround)))
}

/// What the health service can be asked about, beside the server as a whole.
fn served_names(app: &App) -> Vec<&'static str> {
    let mut names = vec!["", token::NAME, account::NAME];
    if app.config.grpc.legacy_token_rpc {
        names.push(legacy::NAME);
    }
    names
}

/// What is called elsewhere is in the contracts too; only what is served here is listed.
fn reflection(app: &App) -> tonic_reflection::server::Builder<'static> {
    let builder = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(auth_proto::DESCRIPTORS)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        .with_service_name(HEALTH);
    let services = served_names(app).into_iter().filter(|name| !name.is_empty());
    services.fold(builder, tonic_reflection::server::Builder::with_service_name)
}

fn caught(panic: Box<dyn Any + Send>) -> axum::http::Response<Body> {
    let said = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("nothing");
    tracing::error!(said = %truncated(said), "a gRPC handler panicked");
    status::internal().into_http()
}

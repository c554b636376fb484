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

use std::{any::Any, io, time::Duration};

use auth_proto::{
    auth::v1::{account_service_server::AccountServiceServer, token_service_server::TokenServiceServer},
    legacy::token::token_server::TokenServer,
};
use axum::middleware::from_fn;
use secrecy::ExposeSecret;
use tokio::net::{TcpListener, TcpStream};
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
use tonic::{
    body::Body,
    service::Routes,
    transport::{Certificate, Identity, Server, ServerTlsConfig, server::TcpIncoming},
};
use tower_http::catch_panic::CatchPanicLayer;

use crate::{app::App, config::GrpcTls};
use callers::Callers;
use readiness::Readiness;

/// A token is at most 4 KiB; no request is larger than a few of them.
const LARGEST_REQUEST: usize = 64 * 1024;
/// Requests under way on one connection; a gateway has one or two connections.
const STREAMS_PER_CONNECTION: u32 = 256;
/// A connection whose other end is gone without a word is noticed after this and the next.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(30);
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(10);
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);
/// Requests under way when a stop begins have this long to finish.
const FINISH_DEADLINE: Duration = Duration::from_secs(20);
const HEALTH: &str = "grpc.health.v1.Health";
/// After an accept that failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why gRPC is not served.
#[derive(Debug, thiserror::Error)]
pub enum GrpcError {
    /// Certificate and key don't go together, say.
    #[error("GRPC_TLS_CERT, GRPC_TLS_KEY or GRPC_TLS_CLIENT_CA can't be used: {}", chain(.0))]
    Tls(#[source] tonic::transport::Error),
    /// The contracts in this binary can't be read.
    #[error("reflection: {0}")]
    Reflection(#[from] tonic_reflection::server::Error),
    /// Serving failed.
    #[error("gRPC: {}", chain(.0))]
    Transport(#[source] tonic::transport::Error),
}

/// Serves until `stop`, then finishes what is under way. The health service says NOT_SERVING until
/// this instance is ready, whenever it is not, and from the beginning of the drain.
pub async fn serve(listener: TcpListener, app: App, stop: CancellationToken) -> Result<(), GrpcError> {
    let mut server = Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION)
        .http2_keepalive_interval(Some(KEEPALIVE_EVERY))
        .http2_keepalive_timeout(Some(KEEPALIVE_PATIENCE));
    if let Some(tls) = &app.config.grpc.tls {
        server = server.tls_config(tls_config(tls)).map_err(GrpcError::Tls)?;
    }
    let (reporter, health) = tonic_health::server::health_reporter();
    let readiness = Readiness::new(reporter, served_names(&app)).await;
    let routes = routes(&app)?.add_service(health);
    let service = routes.into_axum_router().layer(from_fn(surround::surround));

    let accepted = accepted(TcpIncoming::from(listener).with_nodelay(Some(true)).with_keepalive(Some(KEEPALIVE_EVERY)));
    let serving = server.layer(CatchPanicLayer::custom(caught)).serve_with_incoming_shutdown(
        service,
        accepted,
        stop.clone().cancelled_owned(),
    );
    let finishing = async {
        // Ends with the streams of those who watch: they would hold the stop up for ever.
        readiness.follow(&app, &stop).await;
        tokio::time::sleep(FINISH_DEADLINE).await;
    };
    tokio::select! {
        served = serving => served.map_err(GrpcError::Transport),
        () = finishing => {
            tracing::warn!("gRPC requests were still under way at the end of the stop");
            Ok(())
        }
    }
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

fn tls_config(tls: &GrpcTls) -> ServerTlsConfig {
    let config = ServerTlsConfig::new()
        .identity(Identity::from_pem(&tls.certificate, tls.key.expose_secret()))
        .timeout(HANDSHAKE_DEADLINE);
    match &tls.client_ca {
        Some(ca) => config.client_ca_root(Certificate::from_pem(ca)),
        None => config,
    }
}

/// Connections, whatever happens: tonic would take a failed accept for the end.
fn accepted(incoming: TcpIncoming) -> impl Stream<Item = io::Result<TcpStream>> {
    incoming
        .then(async |accepted| match accepted {
            Ok(stream) => Some(Ok(stream)),
            Err(error) => {
                tracing::warn!(%error, "a gRPC connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                None
            }
        })
        .filter_map(|accepted| accepted)
}

fn caught(panic: Box<dyn Any + Send>) -> axum::http::Response<Body> {
    let said = panic
        .downcast_ref::<&str>()
        .copied()
        .or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("nothing");
    tracing::error!(said, "a gRPC handler panicked");
    status::internal().into_http()
}

/// tonic's errors say what happened in their sources only.
fn chain(error: &tonic::transport::Error) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

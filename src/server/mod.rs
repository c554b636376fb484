//! What every listener shares: one accept loop, and bounds for everything an outsider can open or hold.
//!
//! A connection waits for its client in one of a few ways (its first request, the next one, a body, an answer
//! that is taken), and each of them has a deadline ([`Timeouts`]). A listener has at most so many connections
//! at once ([`ListenerConfig`](crate::config::ListenerConfig)): when they are used up, the one that has waited
//! longest for its client makes room, so that whoever opens a thousand and says nothing keeps nobody out.
//!
//! - `connection`: what a connection waits for, and until when.
//! - `stream`, `body`: what tells it.
//! - `descriptors`: the limits fit what the process may open.

mod body;
mod connection;
mod descriptors;
mod stream;
pub mod tls;

use std::{
    collections::HashMap,
    convert::Infallible,
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use axum::{Router, http::StatusCode};
use hyper::{Request, body::Incoming, service::Service as _, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto::Builder,
    service::TowerToHyperService,
};
use outbox_relay::logging::{Throttle, truncated};
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::config::{ListenerConfig, Timeouts};
use connection::{Connection, Overdue};
pub use descriptors::fit_descriptors;
use stream::Watched;
use tls::ClientCertificate;

/// After an accept that failed, for want of file descriptors mostly.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// A connection that was asked to make room, or to end in good order, is closed after this.
const PARTING: Duration = Duration::from_secs(1);
/// The largest head of a request, in bytes.
const LARGEST_HEAD: usize = 64 * 1024;
/// HTTP/2 requests under way on one connection; a gateway has one or two connections.
const STREAMS_PER_CONNECTION: u32 = 256;
/// An HTTP/2 connection whose other end is gone without a word is noticed after this and the next.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(30);
const KEEPALIVE_PATIENCE: Duration = Duration::from_secs(10);

/// A bound port, what is served there and within which limits.
pub struct Listener {
    /// `http`, `grpc` or `admin`: in metrics and log lines.
    name: &'static str,
    address: SocketAddr,
    /// Lent to the accept loop; it comes back when that fails, and is closed at a stop.
    socket: Mutex<Option<TcpListener>>,
    config: ListenerConfig,
    timeouts: Timeouts,
    protocol: Protocol,
}

/// What is spoken on a port.
pub enum Protocol {
    /// HTTP/1.1, and HTTP/2 for clients that know that we speak it. A request that can't be read gets this
    /// body in its answer.
    Http(fn(StatusCode) -> Value),
    /// HTTP/2 alone.
    Grpc(Option<TlsAcceptor>),
}

/// Connections of one run of the accept loop.
struct Connections {
    listener: Arc<Listener>,
    builder: Builder<TokioExecutor>,
    permits: Arc<Semaphore>,
    open: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    crowded: Throttle,
}

impl Listener {
    /// Binds the address, whose port `variable` names.
    pub async fn bind(
        name: &'static str,
        (wanted, variable): (SocketAddr, &str),
        config: ListenerConfig,
        timeouts: Timeouts,
        protocol: Protocol,
    ) -> anyhow::Result<Arc<Self>> {
        let socket = TcpListener::bind(wanted).await.with_context(|| {
            format!("can't listen on {wanted}: set {variable} to a free port, or stop what holds this one")
        })?;
        let address = socket.local_addr()?;
        Ok(Arc::new(Self { name, address, socket: Mutex::new(Some(socket)), config, timeouts, protocol }))
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop`; requests under way then have `finish` to end.
    pub async fn serve(self: Arc<Self>, router: Router, finish: Duration, stop: CancellationToken) -> io::Result<()> {
        let mut lent = Lent::of(&self)?;
        let connections = Arc::new(Connections::of(self.clone()));
        let (tasks, over) = (TaskTracker::new(), CancellationToken::new());
        // Dropped at whatever end of this future: no connection outlives its accept loop.
        let _over = over.clone().drop_guard();
        let failures = Throttle::<()>::new();
        loop {
            let accepted = tokio::select! {
                biased;
                () = stop.cancelled() => break,
                accepted = lent.socket().accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    if let Some(recovered) = failures.recovered() {
                        let (failures, secs) = (recovered.occurrences, recovered.lasted.as_secs());
                        tracing::info!(listener = self.name, failures, secs, "connections are accepted again");
                    }
                    let Some(permit) = stop.run_until_cancelled(connections.permit()).await else { break };
                    let connections = connections.clone();
                    let (router, stop, over) = (router.clone(), stop.clone(), over.clone());
                    tasks.spawn(over.run_until_cancelled_owned(async move {
                        connections.serve(stream, permit, router, &stop).await;
                    }));
                }
                Err(error) => {
                    metrics::counter!("auth_accept_errors_total", "listener" => self.name).increment(1);
                    if let Some(line) = failures.occurred(()) {
                        let left_out = line.left_out;
                        tracing::warn!(listener = self.name, %error, left_out, "a connection could not be accepted");
                    }
                    // Out of descriptors: somebody who waits for nothing has one.
                    connections.make_room();
                    stop.run_until_cancelled(sleep(ACCEPT_PAUSE)).await;
                }
            }
        }
        // Whoever connects from here on is refused and goes elsewhere.
        lent.close();
        tasks.close();
        if timeout(finish, tasks.wait()).await.is_err() {
            let open = tasks.len();
            tracing::warn!(listener = self.name, open, "connections were still open at the end of the stop");
        }
        Ok(())
    }
}

impl Connections {
    fn of(listener: Arc<Listener>) -> Self {
        let mut builder = Builder::new(TokioExecutor::new());
        if matches!(listener.protocol, Protocol::Grpc(_)) {
            builder = builder.http2_only();
        }
        // The head's deadline is ours: hyper's would run while a connection is idle, too.
        let mut http1 = builder.http1();
        http1.timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(LARGEST_HEAD).half_close(true);
        if listener.timeouts.max_headers != crate::config::MAX_HEADERS {
            http1.max_headers(listener.timeouts.max_headers);
        }
        builder
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS_PER_CONNECTION)
            .max_header_list_size(LARGEST_HEAD as u32)
            .keep_alive_interval(KEEPALIVE_EVERY)
            .keep_alive_timeout(KEEPALIVE_PATIENCE);
        let permits = Arc::new(Semaphore::new(listener.config.max_connections));
        Self { listener, builder, permits, open: Mutex::default(), next: AtomicU64::new(0), crowded: Throttle::new() }
    }

    /// Waits for room. Where there is none, the connection that has waited longest for its client is closed.
    async fn permit(&self) -> OwnedSemaphorePermit {
        loop {
            if let Ok(permit) = self.permits.clone().try_acquire_owned() {
                return permit;
            }
            if let Some(line) = self.crowded.occurred(()) {
                let (limit, left_out) = (self.listener.config.max_connections, line.left_out);
                tracing::warn!(
                    listener = self.listener.name,
                    limit,
                    left_out,
                    "the connections are used up; the one that has waited longest for its client makes room"
                );
            }
            self.make_room();
            // All of them at work: one that begins to wait meanwhile is found by the next look.
            if let Ok(Ok(permit)) = timeout(ACCEPT_PAUSE, self.permits.clone().acquire_owned()).await {
                return permit;
            }
        }
    }

    fn make_room(&self) {
        let open = self.open();
        let longest = open.values().filter_map(|connection| Some((connection.waiting()?, connection)));
        if let Some((_, connection)) = longest.min_by_key(|(since, _)| *since) {
            connection.evict();
        }
    }

    async fn serve(&self, stream: TcpStream, _permit: OwnedSemaphorePermit, router: Router, stop: &CancellationToken) {
        let connection = Arc::new(Connection::new(self.listener.config.idle_timeout, self.listener.timeouts));
        let _entered = Entered::new(self, connection.clone());
        let _ = stream.set_nodelay(true);
        let reason = match &self.listener.protocol {
            Protocol::Http(refusal) => {
                let stream = Watched::new(stream, connection.clone(), Some(*refusal));
                self.drive(stream, &connection, router, None, stop).await
            }
            Protocol::Grpc(None) => {
                self.drive(Watched::new(stream, connection.clone(), None), &connection, router, None, stop).await
            }
            Protocol::Grpc(Some(acceptor)) => {
                let handshake = tokio::select! {
                    handshake = acceptor.accept(stream) => handshake,
                    overdue = connection.overdue() => Err(io::Error::other(overdue.as_str())),
                };
                match handshake {
                    Ok(stream) => {
                        let certificates = stream.get_ref().1.peer_certificates();
                        let certificate = certificates.is_some_and(|all| !all.is_empty()).then_some(ClientCertificate);
                        let stream = Watched::new(stream, connection.clone(), None);
                        self.drive(stream, &connection, router, certificate, stop).await
                    }
                    Err(error) => {
                        let error = error.to_string();
                        tracing::debug!(listener = self.listener.name, error = %truncated(&error), "no TLS");
                        "handshake"
                    }
                }
            }
        };
        let listener = self.listener.name;
        metrics::counter!("auth_connections_closed_total", "listener" => listener, "reason" => reason).increment(1);
    }

    /// Serves a connection to its end. Returns why it ended.
    async fn drive<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(
        &self,
        stream: Watched<S>,
        connection: &Arc<Connection>,
        router: Router,
        certificate: Option<ClientCertificate>,
        stop: &CancellationToken,
    ) -> &'static str {
        let router = TowerToHyperService::new(router);
        let watched = connection.clone();
        let service = service_fn(move |mut request: Request<Incoming>| {
            let exchange = watched.begin();
            if let Some(certificate) = certificate {
                request.extensions_mut().insert(certificate);
            }
            let request = request.map(|body| body::Received::new(body, exchange.clone()));
            let answer = router.call(request);
            async move {
                let answer = answer.await?;
                Ok::<_, Infallible>(answer.map(|body| body::Sent::new(body, exchange)))
            }
        });
        let mut serving = std::pin::pin!(self.builder.serve_connection(TokioIo::new(stream), service));
        let mut reason = "client";
        let mut close_by = None;
        loop {
            let parting = async {
                match close_by {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                _ = &mut serving => return reason,
                () = parting => return reason,
                overdue = connection.overdue(), if close_by.is_none() => {
                    reason = overdue.as_str();
                    if overdue != Overdue::Idle {
                        return reason;
                    }
                    close_by = Some(Instant::now() + PARTING);
                    serving.as_mut().graceful_shutdown();
                }
                () = stop.cancelled(), if !connection.is_parting() => {
                    reason = "stop";
                    connection.part(PARTING);
                    serving.as_mut().graceful_shutdown();
                }
            }
        }
    }

    fn open(&self) -> MutexGuard<'_, HashMap<u64, Arc<Connection>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Among those that are open, as long as it lives.
struct Entered<'a>(&'a Connections, u64);

impl<'a> Entered<'a> {
    fn new(connections: &'a Connections, connection: Arc<Connection>) -> Self {
        let id = connections.next.fetch_add(1, Ordering::Relaxed);
        connections.open().insert(id, connection);
        metrics::gauge!("auth_connections", "listener" => connections.listener.name).increment(1);
        Self(connections, id)
    }
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        self.0.open().remove(&self.1);
        metrics::gauge!("auth_connections", "listener" => self.0.listener.name).decrement(1);
    }
}

/// The socket, while the accept loop has it.
struct Lent<'a> {
    listener: &'a Listener,
    socket: Option<TcpListener>,
}

impl<'a> Lent<'a> {
    fn of(listener: &'a Listener) -> io::Result<Self> {
        let socket = listener.socket.lock().unwrap_or_else(PoisonError::into_inner).take();
        match socket {
            Some(socket) => Ok(Self { listener, socket: Some(socket) }),
            None => Err(io::Error::other("the port is closed")),
        }
    }

    fn socket(&self) -> &TcpListener {
        self.socket.as_ref().expect("closed at the end alone")
    }

    fn close(&mut self) {
        self.socket = None;
    }
}

impl Drop for Lent<'_> {
    fn drop(&mut self) {
        *self.listener.socket.lock().unwrap_or_else(PoisonError::into_inner) = self.socket.take();
    }
}

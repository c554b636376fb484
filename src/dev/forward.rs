//! A fixed port in front of the embedded broker, for clients that want to know their bootstrap
//! address beforehand.
//!
//! Only the first connection of a client comes through here: the broker's metadata then sends it to
//! the broker's own port on 127.0.0.1.

use std::{
    io::{self, ErrorKind},
    net::{Ipv4Addr, SocketAddr},
    time::Duration,
};

use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_util::task::AbortOnDropHandle;

/// Takes connections on a port and passes them on. It ends with this value.
#[derive(Debug)]
pub struct Forwarder {
    address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

/// Why there is no forwarder.
#[derive(Debug, thiserror::Error)]
pub enum ForwardError {
    /// Somebody else listens there.
    #[error("port {0} is taken: choose another --broker-port, or 0 for any free port")]
    PortTaken(u16),
    /// The port can't be listened on for another reason.
    #[error("listening on port {port} failed: choose another --broker-port, or 0 for any free port")]
    Listen {
        /// The port.
        port: u16,
        /// Why.
        source: io::Error,
    },
}

impl Forwarder {
    /// Listens on `127.0.0.1:port` and passes every connection to `target` (`host:port`).
    pub async fn start(port: u16, target: String) -> Result<Self, ForwardError> {
        let failed = |source: io::Error| match source.kind() {
            ErrorKind::AddrInUse => ForwardError::PortTaken(port),
            _ => ForwardError::Listen { port, source },
        };
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, port)).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let task = AbortOnDropHandle::new(tokio::spawn(pass_on(listener, target)));
        Ok(Self { address, _task: task })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

async fn pass_on(listener: TcpListener, target: String) {
    // Dropped with the task, which ends the connections too.
    let mut connections = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((mut client, _)) => {
                let target = target.clone();
                connections.spawn(async move {
                    // Either side going away is the normal end; a broker that is down shows to the
                    // client as a closed connection, as it would without us.
                    if let Ok(mut broker) = TcpStream::connect(&target).await {
                        let _ = copy_bidirectional(&mut client, &mut broker).await;
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the broker port takes no connection");
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        }
        while connections.try_join_next().is_some() {}
    }
}

#[cfg(test)]
mod tests {
    use rdkafka::{
        ClientConfig,
        producer::{FutureProducer, FutureRecord},
    };

    use super::*;
    use crate::dev::broker::EmbeddedBroker;

    #[tokio::test]
    async fn the_forwarded_port_serves_as_a_bootstrap_address() {
        let broker = EmbeddedBroker::start(&["user.create"]).await.expect("a broker");
        let forwarder = Forwarder::start(0, broker.bootstrap_servers().to_owned()).await.expect("a forwarder");
        let producer: FutureProducer =
            ClientConfig::new().set("bootstrap.servers", forwarder.address().to_string()).create().expect("a producer");
        producer
            .send(FutureRecord::to("user.create").key("1").payload("{}"), Duration::from_secs(10))
            .await
            .expect("delivered");
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let first = Forwarder::start(0, "127.0.0.1:1".to_owned()).await.expect("a forwarder");
        let port = first.address().port();
        let second = Forwarder::start(port, "127.0.0.1:1".to_owned()).await;
        assert_eq!(
            second.expect_err("taken").to_string(),
            format!("port {port} is taken: choose another --broker-port, or 0 for any free port")
        );
    }
}

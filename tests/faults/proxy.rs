//! A wire that breaks on demand: a TCP proxy between the service and PostgreSQL, Kafka or another
//! service.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{mpsc, watch},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

use crate::refusal;

/// What the wire does.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Wire {
    /// Passes everything on.
    Whole,
    /// Every connection is cut, and new ones are closed at once.
    Cut,
    /// Connections stay and nothing passes.
    Silent,
    /// Connections that exist fall silent; new ones pass. A server that failed over.
    OldSilent,
    /// Everything comes this much later.
    Slow(Duration),
    /// A connection is reset after this many bytes to the server.
    ResetAfter(u64),
    /// A COMMIT is cut off before it reaches the server.
    CommitLost,
    /// A COMMIT reaches the server, and its answer is lost.
    AnswerLost,
    /// On connections that are made now, the first Produce request of each partition, and the first after so long
    /// a rest, is refused by Kafka's protocol while the second is taken.
    FirstRefused(Duration),
}

/// A listening proxy. It ends with this value.
pub struct Proxy {
    pub port: u16,
    wire: watch::Sender<(u64, Wire)>,
    refused: Arc<AtomicU64>,
    _listening: AbortOnDropHandle<()>,
}

impl Proxy {
    /// To `host:port`, on any free port.
    pub async fn to(target: String) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let port = listener.local_addr().expect("an address").port();
        Self::on(listener, port, Arc::new(target))
    }

    fn on(listener: TcpListener, port: u16, target: Arc<String>) -> Self {
        let (wire, state) = watch::channel((0, Wire::Whole));
        let refused = Arc::new(AtomicU64::new(0));
        let count = refused.clone();
        let listening = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(connect(client, target.clone(), state.clone(), count.clone()));
            }
        });
        Self { port, wire, refused, _listening: AbortOnDropHandle::new(listening) }
    }

    /// How many requests were refused for [`Wire::FirstRefused`].
    pub fn refused(&self) -> u64 {
        self.refused.load(Ordering::SeqCst)
    }

    pub fn set(&self, wire: Wire) {
        self.wire.send_modify(|state| *state = (state.0 + 1, wire));
    }

    /// For a while, then whole again.
    pub async fn set_for(&self, wire: Wire, length: Duration) {
        self.set(wire);
        sleep(length).await;
        self.set(Wire::Whole);
    }
}

async fn connect(client: TcpStream, target: Arc<String>, state: watch::Receiver<(u64, Wire)>, refused: Arc<AtomicU64>) {
    let (born, wire) = *state.borrow();
    if wire == Wire::Cut {
        return;
    }
    let Ok(server) = TcpStream::connect(target.as_str()).await else { return };
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let ((from_client, to_client), (from_server, to_server)) = (client.into_split(), server.into_split());
    if let Wire::FirstRefused(rest) = wire {
        let (refuse, refusals) = mpsc::unbounded_channel();
        tokio::select! {
            _ = refusal::pass_requests(from_client, to_server, refuse, rest) => {}
            _ = refusal::pass_responses(from_server, to_client, refusals, &refused) => {}
        }
        return;
    }
    let muted = Arc::new(AtomicBool::new(false));
    let up = Way { state: state.clone(), born, to_server: true, muted: muted.clone() };
    let down = Way { state, born, to_server: false, muted };
    // Whichever way ends first ends both, as a closed socket does.
    tokio::select! {
        () = pump(from_client, to_server, up) => {}
        () = pump(from_server, to_client, down) => {}
    }
}

/// One way of a connection.
struct Way {
    state: watch::Receiver<(u64, Wire)>,
    /// The state's number when the connection was made.
    born: u64,
    to_server: bool,
    /// Nothing of what the server says passes any more.
    muted: Arc<AtomicBool>,
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, way: Way) {
    let Way { mut state, born, to_server, muted } = way;
    let mut buffer = vec![0; 64 * 1024];
    let mut passed = 0u64;
    loop {
        let (now, wire) = *state.borrow_and_update();
        if wire == Wire::Cut {
            return;
        }
        let silent = wire == Wire::Silent || (wire == Wire::OldSilent && born < now);
        let read = tokio::select! {
            read = from.read(&mut buffer), if !silent => read,
            changed = state.changed() => match changed {
                Ok(()) => continue,
                Err(_) => return,
            },
        };
        let Ok(read @ 1..) = read else { return };
        let committing = to_server && buffer[..read].windows(7).any(|bytes| bytes == b"COMMIT\0");
        let now = *state.borrow();
        match now {
            (_, Wire::CommitLost) if committing => return,
            (_, Wire::AnswerLost) if committing => muted.store(true, Ordering::SeqCst),
            (_, Wire::Slow(by)) => sleep(by).await,
            (_, Wire::ResetAfter(bytes)) if to_server && passed + read as u64 > bytes => {
                // What fits goes through: the other side is left with half of something.
                let _ = to.write_all(&buffer[..bytes.saturating_sub(passed) as usize]).await;
                return;
            }
            _ => {}
        }
        if !to_server && muted.load(Ordering::SeqCst) {
            // The answer to the COMMIT is here, so it has happened: now nobody learns of it.
            return;
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
        passed += read as u64;
    }
}

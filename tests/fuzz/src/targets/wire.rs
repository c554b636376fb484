//! REST over a real connection: whatever bytes a client sends until it stops sending.

use std::{net::SocketAddr, sync::LazyLock, time::Duration};

use auth_service::{
    http,
    server::{Listener, Protocol},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use super::Target;
use crate::{
    http::REST,
    parts::text,
    service::{APP, RUNTIME, filled_in},
};

pub const TARGET: Target = Target {
    name: "wire",
    seeds: &[
        b"GET /auth/health/live HTTP/1.1\r\nhost: a\r\n\r\n",
        b"POST /auth/login HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}GET /me HTTP/1.1\r\nhost: a\r\ncookie: accessToken={access}\r\n\r\n",
        b"POST /login HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\ncontent-type: application/json\r\n\r\n5;x=y\r\n{\"a\":\r\n2\r\n1}\r\n0\r\nx: y\r\n\r\n",
        b"POST /login HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"GET \xff HTTP/1.1\r\n\r\n",
        b"GET /me HTTP/1.1\r\nhost: a\r\nx\x00: y\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 99999999999999999999\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00\x00\x00\x05\x01\x05\x00\x00\x00\x01\x82\x84\x86\x41\x00",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\xff\xff\x00\xff\xff\xff\xff\xff",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    ],
    run,
};

/// Far above what an input needs on a busy machine, far below where the listener itself would give up.
const PATIENCE: Duration = Duration::from_secs(45);

static ADDRESS: LazyLock<SocketAddr> = LazyLock::new(|| {
    let config = &APP.config;
    let wanted = (SocketAddr::from(([127, 0, 0, 1], 0)), "PORT");
    let bind = Listener::bind("http", wanted, config.http.listener, config.timeouts, Protocol::Http(http::unreadable));
    let listener = RUNTIME.block_on(bind).expect("a free port");
    let address = listener.address();
    RUNTIME.spawn(listener.serve(REST.clone(), Duration::ZERO, CancellationToken::new()));
    address
});

fn run(input: &[u8]) {
    let (address, input) = (*ADDRESS, filled_in(input));
    let exchange = async {
        let mut stream = TcpStream::connect(address).await.expect("the listener accepts");
        // It may have been answered, and closed, before all of it is sent.
        let _ = stream.write_all(&input).await;
        let _ = stream.shutdown().await;
        let mut answer = vec![];
        let _ = stream.read_to_end(&mut answer).await;
        answer
    };
    let answer = RUNTIME.block_on(async { timeout(PATIENCE, exchange).await });
    let answer = answer.unwrap_or_else(|_| panic!("no end of the answer to {:?}", text(&input)));
    let Some(status) = answer.strip_prefix(b"HTTP/1.1 ").or(answer.strip_prefix(b"HTTP/1.0 ")) else { return };
    let status: u16 = text(&status[..3]).parse().expect("a status");
    assert!(status < 500 || status == 503, "{status} for {:?}", text(&input));
    if (400..500).contains(&status) && !input.starts_with(b"HEAD") {
        assert!(text(&answer).contains("\"errorCode\":\""), "{:?} for {:?}", text(&answer), text(&input));
    }
}

//! A stream that tells its connection when bytes come and when they are not taken.

use std::{
    io,
    pin::{Pin, pin},
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use axum::http::StatusCode;
use serde_json::Value;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};
use uuid::Uuid;

use super::connection::Connection;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A client that is still sending when we close would see a reset instead of its answer: so long, and so many
/// bytes, it is listened to.
const LINGER: Duration = Duration::from_secs(2);
const LINGER_BYTES: usize = 4 * 1024 * 1024;

/// What hyper answers to a head that it can't read.
const UNREADABLE: [StatusCode; 3] =
    [StatusCode::BAD_REQUEST, StatusCode::URI_TOO_LONG, StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE];

/// See the module.
pub(super) struct Watched<S> {
    stream: S,
    connection: Arc<Connection>,
    /// Bytes of the HTTP/2 preface seen; `None` when it is something else.
    preface: Option<usize>,
    /// The body of an answer to what can't be read. hyper answers that itself, without one.
    refusal: Option<fn(StatusCode) -> Value>,
    /// Of that answer, what is not written yet.
    unwritten: Vec<u8>,
    lingering: Option<(Pin<Box<Sleep>>, usize)>,
    refused: bool,
}

impl<S> Watched<S> {
    pub(super) fn new(stream: S, connection: Arc<Connection>, refusal: Option<fn(StatusCode) -> Value>) -> Self {
        Self { stream, connection, preface: Some(0), refusal, unwritten: vec![], lingering: None, refused: false }
    }

    fn look_at(&mut self, bytes: &[u8]) {
        let mut ends_preface = false;
        if let Some(seen) = self.preface {
            let expected = &PREFACE[seen..PREFACE.len().min(seen + bytes.len())];
            self.preface = bytes.starts_with(expected).then_some(seen + expected.len());
            if self.preface == Some(PREFACE.len()) {
                ends_preface = true;
                self.preface = None;
            }
        }
        self.connection.received(ends_preface);
    }

    /// hyper's own answer to what it can't read: a head alone, while no handler is at work.
    fn own_refusal(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let refusal = self.refusal?;
        let status = bytes.strip_prefix(b"HTTP/1.1 ")?.get(..3)?;
        let status = StatusCode::from_bytes(status).ok().filter(|status| UNREADABLE.contains(status))?;
        let head = std::str::from_utf8(bytes).ok()?;
        // An answer of ours has an id, also the one without a body.
        let ours = head.contains("\r\nx-request-id: ") || !head.contains("\r\ncontent-length: 0\r\n");
        if ours || !head.ends_with("\r\n\r\n") || !self.connection.is_quiet() {
            return None;
        }
        let body = refusal(status).to_string();
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {}\r\ncache-control: no-store\r\n\
             x-content-type-options: nosniff\r\nx-request-id: {}\r\nconnection: close\r\n\r\n",
            body.len(),
            Uuid::now_v7(),
        );
        Some((head + &body).into_bytes())
    }
}

impl<S: AsyncWrite + Unpin> Watched<S> {
    fn poll_rest(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.unwritten.is_empty() {
            let polled = Pin::new(&mut self.stream).poll_write(cx, &self.unwritten);
            self.connection.stalled(polled.is_pending());
            let written = ready!(polled)?;
            self.unwritten.drain(..written);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Watched<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.look_at(&buf.filled()[before..]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Watched<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        ready!(self.poll_rest(cx))?;
        if let Some(refusal) = self.own_refusal(bytes) {
            self.unwritten = refusal;
            self.refused = true;
            return Poll::Ready(Ok(bytes.len()));
        }
        let polled = Pin::new(&mut self.stream).poll_write(cx, bytes);
        self.connection.stalled(polled.is_pending());
        polled
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [bytes] = bufs {
            return self.poll_write(cx, bytes);
        }
        ready!(self.poll_rest(cx))?;
        let polled = Pin::new(&mut self.stream).poll_write_vectored(cx, bufs);
        self.connection.stalled(polled.is_pending());
        polled
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(cx))?;
        let polled = Pin::new(&mut self.stream).poll_flush(cx);
        self.connection.stalled(polled.is_pending());
        polled
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_rest(cx))?;
        ready!(Pin::new(&mut self.stream).poll_shutdown(cx))?;
        let this = &mut *self;
        if !this.refused {
            return Poll::Ready(Ok(()));
        }
        let (until, left) = this.lingering.get_or_insert_with(|| (Box::pin(sleep(LINGER)), LINGER_BYTES));
        let mut discarded = [0; 8192];
        while pin!(&mut *until).poll(cx).is_pending() && *left > 0 {
            let mut buf = ReadBuf::new(&mut discarded);
            match Pin::new(&mut this.stream).poll_read(cx, &mut buf) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => *left = left.saturating_sub(buf.filled().len()),
                Poll::Ready(_) => break,
            }
        }
        Poll::Ready(Ok(()))
    }
}

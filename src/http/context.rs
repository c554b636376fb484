//! What surrounds a request: its ids, its span, its figures, and the form its error takes.

use std::time::Instant;

use axum::{
    extract::{MatchedPath, Request},
    http::{HeaderMap, HeaderName, HeaderValue, Method},
    middleware::Next,
    response::Response,
};
use outbox_relay::logging::truncated;
use tracing::Instrument;
use uuid::Uuid;

use super::problem;
use crate::sessions::Arrived;

/// Names the one request.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// Names everything that follows from it, through outbox, Kafka and saga.
pub const CORRELATION_ID: HeaderName = HeaderName::from_static("x-correlation-id");
/// A longer id is replaced.
const MAX_ID: usize = 128;

/// A request's ids, for whoever works on it.
#[derive(Debug, Clone)]
pub struct Ids {
    /// See [`CORRELATION_ID`].
    pub correlation_id: String,
    /// The client chose it.
    pub correlation_given: bool,
}

/// The outermost layer.
pub async fn context(mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    let given = usable(request.headers(), &CORRELATION_ID);
    let request_id = usable(request.headers(), &REQUEST_ID).unwrap_or_else(|| Uuid::now_v7().to_string());
    let ids =
        Ids { correlation_given: given.is_some(), correlation_id: given.unwrap_or_else(|| Uuid::now_v7().to_string()) };
    let span = tracing::info_span!(
        "request", method = %truncated(request.method().as_str()), path = %truncated(request.uri().path()),
        request.id = request_id, correlation.id = ids.correlation_id
    );
    let wants_problem = problem::wanted(request.headers());
    let method = request.method().clone();
    let route = request.extensions().get::<MatchedPath>().map(|path| path.as_str().to_owned());
    let correlation_id = ids.correlation_id.clone();
    request.extensions_mut().insert(ids);
    request.extensions_mut().insert(Arrived(began));

    let mut response = async {
        let response = next.run(request).await;
        let took = began.elapsed();
        tracing::info!(status = response.status().as_u16(), took_ms = took.as_millis() as u64, "answered");
        let labels = [
            ("method", method_label(&method)),
            ("route", route.unwrap_or_else(|| "none".to_owned())),
            ("status", response.status().as_u16().to_string()),
        ];
        metrics::histogram!("http_request_seconds", &labels).record(took);
        response
    }
    .instrument(span)
    .await;

    if wants_problem {
        response = problem::rewrite(response, &request_id);
    }
    for (name, value) in [(REQUEST_ID, request_id), (CORRELATION_ID, correlation_id)] {
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// A client's own id, if it can stand in a log line, a Kafka header and a text column as it is.
fn usable(headers: &HeaderMap, name: &HeaderName) -> Option<String> {
    let value = headers.get(name)?.to_str().ok()?;
    let fine = (1..=MAX_ID).contains(&value.len()) && value.bytes().all(|byte| byte.is_ascii_graphic());
    fine.then(|| value.to_owned())
}

/// Anyone may invent methods; each would be a figure of its own.
fn method_label(method: &Method) -> String {
    match *method {
        Method::GET | Method::HEAD | Method::POST | Method::PUT | Method::DELETE | Method::OPTIONS => {
            method.as_str().to_owned()
        }
        _ => "other".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::{
        io,
        sync::{Arc, Mutex},
    };

    use axum::{Router, body::Body, middleware::from_fn};
    use tower::ServiceExt;

    use super::*;

    #[test]
    fn an_id_that_could_forge_a_log_line_is_not_taken() {
        let long = "x".repeat(MAX_ID + 1);
        for (given, taken) in [("abc-1:2/3", true), ("a b", false), ("", false), ("\u{e9}", false), (&long, false)] {
            let mut headers = HeaderMap::new();
            headers.insert(CORRELATION_ID, HeaderValue::from_bytes(given.as_bytes()).expect("a header"));
            assert_eq!(usable(&headers, &CORRELATION_ID).is_some(), taken, "{given}");
        }
    }

    /// Where log lines go.
    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("the lines").write(line)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[tokio::test]
    async fn a_line_about_a_request_is_short_whatever_its_method_and_path_are() {
        let (lines, long) = (Lines::default(), "X".repeat(8000));
        let writer = lines.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        let _logged = tracing::subscriber::set_default(subscriber);
        let router = Router::new().fallback(async || ()).layer(from_fn(context));
        let mut request = Request::builder().method(long.as_str()).uri(format!("/{long}"));
        request.headers_mut().expect("headers").insert(CORRELATION_ID, HeaderValue::from_str(&long).expect("a header"));
        router.oneshot(request.body(Body::empty()).expect("a request")).await.expect("an answer");
        let lines = String::from_utf8(lines.0.lock().expect("the lines").clone()).expect("text");
        assert!(lines.contains("answered") && lines.lines().all(|line| line.len() < 2000), "{lines}");
    }
}

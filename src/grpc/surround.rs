//! What surrounds every call: its deadline, its log line, its figures, and the right code for what
//! tonic could not read.

use std::time::{Duration, Instant};

use axum::{extract::Request, middleware::Next, response::Response};
use tonic::{Code, Status};

use super::status::{ERROR_CODE, Refusal};
use crate::sessions::Arrived;

/// No call is worked on for longer. Above what a use case waits for its connection and statements.
const WORK_DEADLINE: Duration = Duration::from_secs(15);

/// The layer.
pub async fn surround(mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    request.extensions_mut().insert(Arrived(began));
    let path = request.uri().path().to_owned();
    let response = match tokio::time::timeout(WORK_DEADLINE, next.run(request)).await {
        Ok(response) => readable(response),
        Err(_) => Status::from(Refusal::TooLate).into_http(),
    };
    let (code, took) = (code(&response), began.elapsed());
    // Anyone may invent methods; each would be a figure of its own.
    let method = if code == Code::Unimplemented { "other" } else { path.as_str() };
    let labels = [("method", method.to_owned()), ("code", format!("{code:?}"))];
    metrics::histogram!("grpc_request_seconds", &labels).record(took);
    let took_ms = took.as_millis() as u64;
    match path.starts_with("/grpc.") {
        true => tracing::debug!(path, ?code, took_ms, "answered by gRPC"),
        false => tracing::info!(path, ?code, took_ms, "answered by gRPC"),
    }
    response
}

/// tonic calls a message it can't decode INTERNAL, and one that is too large OUT_OF_RANGE. Both are
/// the client's doing. Our own refusals carry a word for machines, by which they are told apart.
fn readable(response: Response) -> Response {
    let ours = response.headers().contains_key(ERROR_CODE);
    match code(&response) {
        Code::Internal | Code::OutOfRange if !ours => Status::from(Refusal::Unreadable).into_http(),
        _ => response,
    }
}

/// A refusal stands in the headers; an answer's code comes behind its message, and is OK.
fn code(response: &Response) -> Code {
    match response.headers().get("grpc-status") {
        Some(code) => Code::from_bytes(code.as_bytes()),
        None => Code::Ok,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grpc::status;

    #[test]
    fn what_tonic_can_not_read_is_the_clients_doing_and_our_own_bugs_are_not() {
        let after = |status: Status| code(&readable(status.into_http()));
        assert_eq!(after(Status::internal("Missing request message.")), Code::InvalidArgument);
        assert_eq!(after(Status::out_of_range("too large")), Code::InvalidArgument);
        assert_eq!(after(Status::unimplemented("no such method")), Code::Unimplemented);
        assert_eq!(after(status::internal()), Code::Internal);
    }
}

//! What surrounds every call: its deadline, its log line, its figures, and the right code for what
//! tonic could not read.

use std::{
    collections::HashSet,
    sync::LazyLock,
    time::{Duration, Instant},
};

use axum::{extract::Request, http::HeaderMap, middleware::Next, response::Response};
use outbox_relay::logging::truncated;
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::{Code, Status};

use super::status::{ERROR_CODE, Refusal};
use crate::sessions::Arrived;

/// No call is worked on for longer. Above what a use case waits for its connection and statements.
const WORK_DEADLINE: Duration = Duration::from_secs(15);

const REFLECTION: [&str; 2] = [
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
];

/// The layer.
pub async fn surround(mut request: Request, next: Next) -> Response {
    let began = Instant::now();
    request.extensions_mut().insert(Arrived(began));
    let path = request.uri().path().to_owned();
    let deadline = asked_deadline(request.headers()).map_or(WORK_DEADLINE, |asked| asked.min(WORK_DEADLINE));
    let response = match tokio::time::timeout(deadline, next.run(request)).await {
        Ok(response) => readable(response),
        Err(_) => Status::from(Refusal::TooLate).into_http(),
    };
    let (code, took) = (code(&response), began.elapsed());
    let labels = [("method", method_label(&path).to_owned()), ("code", format!("{code:?}"))];
    metrics::histogram!("grpc_request_seconds", &labels).record(took);
    let took_ms = took.as_millis() as u64;
    match path.starts_with("/grpc.") {
        true => tracing::debug!(path = %truncated(&path), ?code, took_ms, "answered by gRPC"),
        false => tracing::info!(path = %truncated(&path), ?code, took_ms, "answered by gRPC"),
    }
    response
}

/// Anyone may invent methods, and be refused before it shows that they don't exist; each would be a figure of its
/// own. So the label is a method that our contracts name, or `other`.
fn method_label(path: &str) -> &str {
    static METHODS: LazyLock<HashSet<String>> = LazyLock::new(|| {
        let contracts = [auth_proto::DESCRIPTORS, tonic_health::pb::FILE_DESCRIPTOR_SET];
        let mut methods: HashSet<String> = REFLECTION.iter().map(|path| (*path).to_owned()).collect();
        for set in contracts.into_iter().filter_map(|set| FileDescriptorSet::decode(set).ok()) {
            for file in &set.file {
                for service in &file.service {
                    let name = format!("{}.{}", file.package(), service.name());
                    methods.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
                }
            }
        }
        methods
    });
    METHODS.get(path).map_or("other", String::as_str)
}

/// The deadline a client asks for (`grpc-timeout`: at most eight digits and a unit).
fn asked_deadline(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    let count: u64 = digits.parse().ok().filter(|_| digits.len() <= 8)?;
    match unit {
        "H" => Some(Duration::from_secs(count * 3600)),
        "M" => Some(Duration::from_secs(count * 60)),
        "S" => Some(Duration::from_secs(count)),
        "m" => Some(Duration::from_millis(count)),
        "u" => Some(Duration::from_micros(count)),
        "n" => Some(Duration::from_nanos(count)),
        _ => None,
    }
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
    fn a_method_that_the_contracts_do_not_name_is_no_label() {
        for known in [
            "/auth.v1.TokenService/RefreshAccessToken",
            "/auth.v1.AccountService/GetAccount",
            "/token.Token/RefreshToken",
            "/grpc.health.v1.Health/Check",
            REFLECTION[0],
        ] {
            assert_eq!(method_label(known), known);
        }
        for invented in ["", "/", "/auth.v1.AccountService/GetAccounts", "/auth.v1.accountservice/GetAccount", "//x"] {
            assert_eq!(method_label(invented), "other", "{invented}");
        }
    }

    #[test]
    fn a_client_may_ask_for_less_time() {
        let asked = |value: &'static str| {
            asked_deadline(&HeaderMap::from_iter([(
                "grpc-timeout".parse().expect("a name"),
                value.parse().expect("text"),
            )]))
        };
        assert_eq!(asked("100m"), Some(Duration::from_millis(100)));
        assert_eq!(asked("99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for bad in ["", "m", "1", "1x", "-1S", "123456789S", "1.5S"] {
            assert_eq!(asked(bad), None, "{bad}");
        }
    }

    #[test]
    fn what_tonic_can_not_read_is_the_clients_doing_and_our_own_bugs_are_not() {
        let after = |status: Status| code(&readable(status.into_http()));
        assert_eq!(after(Status::internal("Missing request message.")), Code::InvalidArgument);
        assert_eq!(after(Status::out_of_range("too large")), Code::InvalidArgument);
        assert_eq!(after(Status::unimplemented("no such method")), Code::Unimplemented);
        assert_eq!(after(status::internal()), Code::Internal);
    }
}

//! Replies of other services: headers and value.

use outbox_relay::{fuzzing::kept_headers, inbox::Bytes};
use saga_orchestrator::{fuzzing, reply::Received};

use super::Target;
use crate::parts::{parts, text};

/// Header lines `name=value`; the value.
pub const TARGET: Target = Target {
    name: "saga_reply",
    seeds: &[
        b"saga-id=0198c0de-0000-7000-8000-000000000001\ncorrelationId=c\nce_id=1\nce_source=user-service\x1e{\"id\":7}",
        b"correlationId=c-1\nservice=user-service\x1e{\"from\":\"user-service\",\"status\":\"ok\"}",
        b"service=user-service\x1e{\"id\":\"12\",\"status\":\"error\",\"message\":\"full\\u0000\"}",
        b"causation-id=x\x1e{\"id\":7.0,\"sagaId\":\"0198c0de-0000-7000-8000-000000000002\",\"reason\":\"taken\"}",
        b"\x1e\xef\xbb\xbf{\"id\":-9223372036854775808,\"id\":1e400}",
        b"ce_id=\xff\x00\ncorrelationId=a\ncorrelationId=b\x1e[[[[{\"id\":true}]]]]",
        b"service=other\x1e{\"status\":{\"a\":[1,2]},\"error\":\"\\ud83d\\ude00\"}",
    ],
    run,
};

/// A reason is cut at 500 characters; an id of the sender's own may be as long as a header.
const LONGEST_WORDS: usize = 2500;

fn run(input: &[u8]) {
    let [lines, payload] = parts(input);
    let received = received(lines, payload);
    for text in fuzzing::texts(&received, "user-service") {
        // PostgreSQL's text and jsonb hold no NUL.
        assert!(!text.contains('\0'), "{text:?}");
        let from_outside = lines.windows(text.len().max(1)).any(|window| window == text.as_bytes());
        assert!(text.len() <= LONGEST_WORDS || from_outside, "{} bytes: {text:?}", text.len());
    }
    let (kept, read) = kept_headers(&received.bytes);
    // Of a NUL, not of a backslash before "u0000".
    let nul = kept.replace("\\\\", "").contains("\\u0000");
    assert!(!nul, "jsonb would refuse {kept}");
    assert_eq!(read, received.bytes);
}

fn received(lines: &[u8], payload: &[u8]) -> Received {
    let header = |line: &[u8]| {
        let at = line.iter().position(|byte| *byte == b'=');
        // Kafka's client ends a name at its NUL.
        let name = text(&line[..at.unwrap_or(line.len())]).replace('\0', "");
        (name, at.map(|at| line[at + 1..].to_vec()))
    };
    let bytes = Bytes {
        key: None,
        headers: lines.split(|byte| *byte == b'\n').map(header).collect(),
        unreadable_headers: usize::from(lines.contains(&0xff)),
        payload: (!payload.is_empty()).then(|| payload.to_vec()),
    };
    Received {
        topic: "user.create.close".to_owned(),
        partition: 0,
        offset: 7,
        kafka_at: chrono::DateTime::from_timestamp_millis(1000),
        cluster_id: "cluster".to_owned(),
        bytes,
    }
}

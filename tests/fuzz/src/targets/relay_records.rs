//! What the relay takes from the database and `outbox verify` from Kafka: headers of stored rows, records anybody wrote.

use std::collections::BTreeSet;

use outbox_relay::{
    fuzzing::{compare, stored_headers},
    headers::MessageHeaders,
};
use rdkafka::{
    Timestamp,
    message::{Header, Headers, OwnedHeaders, OwnedMessage},
};
use serde_json::Value;

use super::Target;
use crate::parts::{parts, text};

/// A JSON object of headers; how far rows are from their messages; messages, one a line: `key|name=value,…|value`.
pub const TARGET: Target = Target {
    name: "relay_records",
    seeds: &[
        b"{\"ce_id\":\"0198c0de-0000-7000-8000-000000000001\",\"correlationId\":\"c\\u0000\\ud83d\\ude00\"}\x1e0\x1e7|ce_source=auth-service,ce_id=0198c0de-0000-7000-8000-000000000001,aggregate-seq=1|{}\n7|ce_source=auth-service,ce_id=0198c0de-0000-7000-8000-000000000002,aggregate-seq=2|{}",
        b"{\"a\":\"1\",\"a\":\"2\"}\x1e1\x1e7|ce_source=auth-service,ce_id=0198c0de-0000-7000-8000-000000000001,aggregate-seq=-9223372036854775808|\n7|ce_source=auth-service,ce_id=0198c0de-0000-7000-8000-000000000001,aggregate-seq=9223372036854775807,replay-of=1|x",
        b"{\"a\":1}\x1e-1\x1e|ce_source=other|\n\xff|ce_id=x,aggregate-seq=1.5|\n|=,\xff=\xff|\n7|aggregate-seq=1,ce_id=0198c0de000070008000000000000001,ce_source=auth-service|y",
        b"[\"a\"]\x1e\x1e",
        b"{\"a\":\"\\ud800\"}\x1e9223372036854775807\x1e7|ce_source=auth-service,ce_id=urn:uuid:0198c0de-0000-7000-8000-000000000001,aggregate-seq=1|z",
    ],
    run,
};

fn run(input: &[u8]) {
    let [json, shift, lines] = parts(input);
    check_stored(&text(json));
    let messages: Vec<OwnedMessage> =
        lines.split(|byte| *byte == b'\n').enumerate().map(|(offset, line)| message(offset as i64, line)).collect();
    let sources = BTreeSet::from(["auth-service".to_owned()]);
    let shift = text(shift).parse().unwrap_or(0);
    let compared = compare(&messages, &sources, shift);
    assert_eq!(compared.messages, messages.len() as u64);
    assert!(compared.proven <= compared.rows && compared.rows <= compared.messages);
    if shift == 0 {
        assert!(compared.proven + compared.findings.len() as u64 >= compared.rows, "{compared:?}");
    }
    let known = lines.len() + 2000;
    assert!(compared.findings.iter().all(|finding| finding.len() <= known), "{compared:?}");
}

/// What goes to Kafka is what is stored, and a row that can't be sent is refused.
fn check_stored(json: &str) {
    let Some(headers) = stored_headers(json) else {
        let texts = |object: &serde_json::Map<String, Value>| object.values().all(Value::is_string);
        let stored: Option<Value> = serde_json::from_str(json).ok();
        assert!(!stored.as_ref().and_then(Value::as_object).is_some_and(texts), "{json:?} is refused");
        return;
    };
    let read = MessageHeaders::read(Some(&headers));
    assert_eq!((read.unreadable, read.readable.len()), (0, headers.count()));
    // PostgreSQL's jsonb holds neither a NUL nor a name twice, so neither is looked for.
    if let Ok(Value::Object(stored)) = serde_json::from_str(json)
        && stored.len() == headers.count()
        && !stored.iter().any(|(name, value)| format!("{name}{value}").contains(['\0', '\\']))
    {
        for (name, value) in &stored {
            assert_eq!(read.text(name), value.as_str(), "{name:?} in {json:?}");
        }
    }
}

fn message(offset: i64, line: &[u8]) -> OwnedMessage {
    let mut fields = line.splitn(3, |byte| *byte == b'|');
    let mut field = || fields.next().map(<[u8]>::to_vec);
    let (key, list, value) = (field(), field().unwrap_or_default(), field());
    let headers = list.split(|byte| *byte == b',').fold(OwnedHeaders::new(), |headers, header| {
        let at = header.iter().position(|byte| *byte == b'=');
        let (name, value) = (&header[..at.unwrap_or(header.len())], at.map(|at| &header[at + 1..]));
        headers.insert(Header { key: &text(name).replace('\0', ""), value })
    });
    OwnedMessage::new(value, key, "topic".to_owned(), Timestamp::CreateTime(offset), 0, offset, Some(headers))
}

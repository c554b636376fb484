//! Reading a reply: which saga it names, and what it says. Pure.

use std::collections::BTreeMap;

use serde_json::Value;
use uuid::Uuid;

use crate::{definition::Meaning, machine::Answer};

const LONGEST_KEY: usize = 512;

/// A message as it came from Kafka.
#[derive(Debug, Clone)]
pub struct Received {
    /// Topic, without the configured prefix.
    pub topic: String,
    /// Partition it stood in.
    pub partition: i32,
    /// Offset it stood at.
    pub offset: i64,
    /// When it was written, in milliseconds of Unix time.
    pub timestamp_ms: i64,
    /// Id of the Kafka cluster it came from; offsets mean nothing without it.
    pub cluster_id: String,
    /// Key.
    pub key: Option<Vec<u8>>,
    /// Headers that are text.
    pub headers: BTreeMap<String, String>,
    /// Value.
    pub payload: Option<Vec<u8>>,
}

impl Received {
    /// What the inbox knows the message by: its own id if it has one, else its place in Kafka. The
    /// time belongs to the place: a topic that is made anew begins at offset 0 again.
    pub(crate) fn message_key(&self) -> String {
        match self.headers.get("ce_id").filter(|id| !id.is_empty()) {
            Some(id) => {
                let source = self.headers.get("ce_source").map_or("", String::as_str);
                let key = format!("id:{}:{source}:{id}", self.topic);
                // An index entry has its limit, a foreign id has none.
                match key.len() <= LONGEST_KEY {
                    true => key,
                    false => format!("id-hash:{}:{}", self.topic, Uuid::new_v5(&Uuid::NAMESPACE_OID, key.as_bytes())),
                }
            }
            None => {
                let Self { cluster_id, topic, partition, offset, timestamp_ms, .. } = self;
                format!("at:{cluster_id}:{topic}:{partition}:{offset}:{timestamp_ms}")
            }
        }
    }
}

/// A header's value as text. What PostgreSQL could not hold as text (not UTF-8, or with a NUL in it)
/// stands as its bytes in hexadecimal: kept, and never mistaken for an id.
pub(crate) fn header_text(value: Option<&[u8]>) -> String {
    let bytes = value.unwrap_or_default();
    match std::str::from_utf8(bytes) {
        Ok(text) if !text.contains('\0') => text.to_owned(),
        _ => bytes.iter().fold("hex:".to_owned(), |hex, byte| hex + &format!("{byte:02x}")),
    }
}

/// How a reply names its saga. The first that is present decides alone; the others may only agree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Naming {
    pub by: NamedBy,
    /// The subject the value speaks of, when it does.
    pub subject: Option<String>,
    /// The correlation id it carries, when the saga is named by its id.
    pub correlation_id: Option<String>,
    /// The command it says it answers.
    pub causation_id: Option<Uuid>,
}

/// What names the saga.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum NamedBy {
    SagaId(Uuid),
    CorrelationId(String),
    Subject(String),
}

/// What a reply says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Step(Answer),
    Undone,
    UndoRefused(String),
}

/// Which saga a reply names, or why it can't be told.
pub(crate) fn naming(message: &Received) -> Result<Naming, String> {
    let value = value_of(message)?;
    let header = message.headers.get("saga-id").filter(|text| !text.is_empty());
    let field = present(&value, "sagaId");
    let parse =
        |text: &str, place: &str| Uuid::parse_str(text).map_err(|_| format!("{place} is not a saga id (a UUID)"));
    let header = header.map(|text| parse(text, "the saga-id header")).transpose()?;
    let field = match field {
        None => None,
        Some(Value::String(text)) => Some(parse(text, "sagaId in the value")?),
        Some(_) => return Err("sagaId in the value is not text".to_owned()),
    };
    if let (Some(header), Some(field)) = (header, field)
        && header != field
    {
        return Err(format!("the saga-id header names {header}, the value names {field}"));
    }
    let correlation_id = message.headers.get("correlationId").filter(|text| !text.is_empty()).cloned();
    let subject = subject_of(&value)?;
    let causation_id = match message.headers.get("causation-id").filter(|text| !text.is_empty()) {
        // Other services may put an id of their own kind here: only a UUID can be one of ours.
        Some(text) => Uuid::parse_str(text).ok(),
        None => None,
    };
    let by = match (header.or(field), &correlation_id, &subject) {
        (Some(saga_id), ..) => NamedBy::SagaId(saga_id),
        (None, Some(correlation_id), _) => NamedBy::CorrelationId(correlation_id.clone()),
        (None, None, Some(subject)) => NamedBy::Subject(subject.clone()),
        (None, None, None) => {
            return Err(
                "it names no saga: no saga-id header, no sagaId or id in the value, no correlationId header".into()
            );
        }
    };
    Ok(Naming { by, subject, correlation_id, causation_id })
}

/// What a reply on a topic of this meaning says; an error says why it is not understood.
pub(crate) fn verdict(message: &Received, meaning: Meaning, participant: &str) -> Result<Verdict, String> {
    let value = value_of(message)?;
    let reason = || {
        let text = |name| present(&value, name).and_then(Value::as_str);
        let reason = text("reason").or_else(|| text("message")).or_else(|| text("error"));
        // PostgreSQL's text and jsonb hold no NUL.
        reason.unwrap_or("no reason given").replace('\0', "\u{fffd}").chars().take(500).collect::<String>()
    };
    Ok(match meaning {
        Meaning::Done => Verdict::Step(Answer::Done),
        Meaning::Refused => Verdict::Step(Answer::Refused(reason())),
        Meaning::Undone => Verdict::Undone,
        Meaning::UndoRefused => Verdict::UndoRefused(reason()),
        Meaning::Either => {
            let service = message.headers.get("service").map(String::as_str);
            if service != Some(participant) {
                return Err(format!(
                    "the service header is {}; this step is answered by {participant:?} (SAGA_PARTICIPANT)",
                    service.map_or("missing".to_owned(), |name| format!("{name:?}"))
                ));
            }
            match present(&value, "status").and_then(Value::as_str) {
                Some("ok") => Verdict::Step(Answer::Done),
                Some("error") => Verdict::Step(Answer::Refused(reason())),
                Some(other) => return Err(format!("status {other:?} is neither \"ok\" nor \"error\"")),
                None => return Err("the value has no status".to_owned()),
            }
        }
    })
}

/// The reason a reply gives may hold anything the other service put in; this is all we read of it.
fn value_of(message: &Received) -> Result<Value, String> {
    let Some(payload) = message.payload.as_deref().filter(|bytes| !bytes.is_empty()) else {
        return Err("it has no value".to_owned());
    };
    match serde_json::from_slice::<Value>(payload) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err("its value is not a JSON object".to_owned()),
        Err(error) => Err(format!("its value is not JSON: line {} column {}", error.line(), error.column())),
    }
}

fn present<'a>(value: &'a Value, name: &str) -> Option<&'a Value> {
    value.get(name).filter(|field| !field.is_null())
}

/// `id` of the value: a number, or a number as text, as JavaScript services send it.
fn subject_of(value: &Value) -> Result<Option<String>, String> {
    let subject = match present(value, "id") {
        None => return Ok(None),
        Some(Value::Number(number)) => number.as_i64().map(|id| id.to_string()),
        Some(Value::String(text)) => text.parse::<i64>().ok().map(|id| id.to_string()),
        Some(_) => None,
    };
    subject.map(Some).ok_or_else(|| "id in the value is not a whole number".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SAGA: &str = "0198c0de-0000-7000-8000-000000000001";

    fn message(headers: &[(&str, &str)], payload: &str) -> Received {
        Received {
            topic: "user.create.close".into(),
            partition: 0,
            offset: 7,
            timestamp_ms: 1000,
            cluster_id: "c".into(),
            key: None,
            headers: headers.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            payload: Some(payload.as_bytes().to_vec()),
        }
    }

    #[test]
    fn the_first_name_that_is_present_decides() {
        let id = || Uuid::parse_str(SAGA).unwrap();
        let by = |headers: &[(&str, &str)], payload| naming(&message(headers, payload)).map(|naming| naming.by);
        assert_eq!(by(&[("saga-id", SAGA), ("correlationId", "c")], r#"{"id":1}"#), Ok(NamedBy::SagaId(id())));
        let in_value = format!(r#"{{"id":1,"sagaId":"{SAGA}"}}"#);
        assert_eq!(by(&[("correlationId", "c")], &in_value), Ok(NamedBy::SagaId(id())));
        assert_eq!(by(&[("correlationId", "c")], r#"{"id":1}"#), Ok(NamedBy::CorrelationId("c".into())));
        assert_eq!(by(&[], r#"{"id":"12"}"#), Ok(NamedBy::Subject("12".into())));
    }

    #[test]
    fn what_can_not_be_read_says_why() {
        let why = |headers: &[(&str, &str)], payload| naming(&message(headers, payload)).unwrap_err();
        assert!(why(&[], "nonsense").contains("not JSON"));
        assert!(why(&[], "[1]").contains("not a JSON object"));
        assert!(why(&[], "{}").contains("names no saga"));
        assert!(why(&[], r#"{"id":1.5}"#).contains("whole number"));
        assert!(why(&[], r#"{"id":true}"#).contains("whole number"));
        assert!(why(&[("saga-id", "x")], r#"{"id":1}"#).contains("UUID"));
        assert!(why(&[("saga-id", SAGA)], r#"{"sagaId":"0198c0de-0000-7000-8000-000000000002"}"#).contains("names"));
        assert!(why(&[], "").contains("no value"));
    }

    #[test]
    fn what_a_database_could_not_hold_is_kept_as_hexadecimal() {
        assert_eq!(header_text(Some(b"plain \xc3\xbc")), "plain ü");
        assert_eq!(header_text(Some(b"a\0b")), "hex:610062");
        assert_eq!(header_text(Some(b"\xff")), "hex:ff");
        assert_eq!(header_text(None), "");
    }

    #[test]
    fn saga_reply_is_understood_only_from_the_participant() {
        let verdict =
            |headers: &[(&str, &str)], payload| verdict(&message(headers, payload), Meaning::Either, "user-service");
        let service = [("service", "user-service")];
        assert_eq!(verdict(&service, r#"{"from":"user-service","status":"ok"}"#), Ok(Verdict::Step(Answer::Done)));
        assert_eq!(
            verdict(&service, r#"{"status":"error","message":"full"}"#),
            Ok(Verdict::Step(Answer::Refused("full".into())))
        );
        assert!(verdict(&service, r#"{"status":"maybe"}"#).is_err());
        assert!(verdict(&service, "{}").is_err());
        assert!(verdict(&[("service", "other")], r#"{"status":"ok"}"#).is_err());
        assert!(verdict(&[], r#"{"status":"ok"}"#).is_err());
    }

    #[test]
    fn a_message_without_an_id_is_known_by_its_place() {
        assert_eq!(message(&[], "{}").message_key(), "at:c:user.create.close:0:7:1000");
        assert_eq!(message(&[("ce_id", "x"), ("ce_source", "s")], "{}").message_key(), "id:user.create.close:s:x");
        let long = message(&[("ce_id", &"x".repeat(9000))], "{}").message_key();
        assert!(long.starts_with("id-hash:user.create.close:") && long.len() < 100, "{long}");
    }
}

//! Reading a reply: which saga it names, and what it says. Pure.

use std::fmt;

use chrono::{DateTime, Utc};
use outbox_relay::{inbox::Bytes, logging::truncated};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, SeqAccess, Visitor},
};
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
    /// When it was written, if Kafka says so.
    pub kafka_at: Option<DateTime<Utc>>,
    /// Id of the Kafka cluster it came from; offsets mean nothing without it.
    pub cluster_id: String,
    /// Key, headers and value.
    pub bytes: Bytes,
}

impl Received {
    /// What the inbox knows the message by: its own id if it has one, else its place in Kafka. Time and
    /// content belong to the place: a topic, or a cluster, that is made anew begins at offset 0 again.
    pub(crate) fn identity(&self, digest: &[u8]) -> String {
        let Self { cluster_id, topic, partition, offset, .. } = self;
        let (Ok(Some(id)), source) = (self.header("ce_id"), self.values("ce_source").next().unwrap_or_default()) else {
            let time = self.kafka_at.map_or(-1, |at| at.timestamp_millis());
            let content = digest.iter().take(8).fold(0, |number: u64, byte| number << 8 | u64::from(*byte));
            return format!("at:{cluster_id}:{topic}:{partition}:{offset}:{time}:{content:016x}");
        };
        // The length keeps source and id apart, whatever they contain.
        match std::str::from_utf8(source) {
            Ok(text) if !text.contains('\0') && text.len() + id.len() <= LONGEST_KEY => {
                format!("id:{topic}:{}:{text}:{id}", text.len())
            }
            // An index entry has its limit, a foreign id has none.
            _ => {
                let whole = [&(source.len() as u64).to_be_bytes(), source, id.as_bytes()].concat();
                format!("id-hash:{topic}:{}", Uuid::new_v5(&Uuid::NAMESPACE_OID, &whole))
            }
        }
    }

    /// The text of a header that says what the message means. `None`: it has no such header, or an empty one.
    fn header(&self, name: &str) -> Result<Option<&str>, String> {
        let mut found = None;
        for value in self.values(name).filter(|value| !value.is_empty()) {
            let text = std::str::from_utf8(value).ok().filter(|text| !text.contains('\0'));
            let text = text.ok_or_else(|| format!("the {name} header is not text"))?;
            if found.replace(text).is_some_and(|other| other != text) {
                return Err(format!("it has several {name} headers, and they disagree"));
            }
        }
        Ok(found)
    }

    fn values(&self, name: &str) -> impl Iterator<Item = &[u8]> {
        self.bytes.headers.iter().filter(move |(other, _)| other == name).filter_map(|(_, value)| value.as_deref())
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
    let parse =
        |text: &str, place: &str| Uuid::parse_str(text).map_err(|_| format!("{place} is not a saga id (a UUID)"));
    let header = message.header("saga-id")?.map(|text| parse(text, "the saga-id header")).transpose()?;
    let field = match value.saga_id {
        None => None,
        Some(Scalar::Text(text)) => Some(parse(&text, "sagaId in the value")?),
        Some(_) => return Err("sagaId in the value is not text".to_owned()),
    };
    if let (Some(header), Some(field)) = (header, field)
        && header != field
    {
        return Err(format!("the saga-id header names {header}, the value names {field}"));
    }
    let correlation_id = message.header("correlationId")?.map(str::to_owned);
    let subject = value.id.map(subject).transpose()?;
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
    Ok(Naming { by, subject, correlation_id })
}

/// What a reply on a topic of this meaning says; an error says why it is not understood.
pub(crate) fn verdict(message: &Received, meaning: Meaning, participant: &str) -> Result<Verdict, String> {
    let value = value_of(message)?;
    let reason = || {
        let given = [&value.reason, &value.message, &value.error];
        let reason = given.into_iter().find_map(|field| field.as_ref()?.as_text()).unwrap_or("no reason given");
        // PostgreSQL's text and jsonb hold no NUL.
        reason.replace('\0', "\u{fffd}").chars().take(500).collect::<String>()
    };
    Ok(match meaning {
        Meaning::Done => Verdict::Step(Answer::Done),
        Meaning::Refused => Verdict::Step(Answer::Refused(reason())),
        Meaning::Undone => Verdict::Undone,
        Meaning::UndoRefused => Verdict::UndoRefused(reason()),
        Meaning::Either => {
            let service = message.header("service")?;
            if service != Some(participant) {
                return Err(format!(
                    "the service header is {}; this step is answered by {participant:?} (SAGA_PARTICIPANT)",
                    service.map_or("missing".to_owned(), |name| format!("{:?}", truncated(name)))
                ));
            }
            match value.status.as_ref().and_then(Scalar::as_text) {
                Some("ok") => Verdict::Step(Answer::Done),
                Some("error") => Verdict::Step(Answer::Refused(reason())),
                Some(other) => {
                    return Err(format!("status {:?} is neither \"ok\" nor \"error\"", truncated(other)));
                }
                None => return Err("the value has no status".to_owned()),
            }
        }
    })
}

/// What is read of a value. Everything else in it is skipped, however deep or long.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct ReplyValue {
    id: Option<Scalar>,
    saga_id: Option<Scalar>,
    status: Option<Scalar>,
    reason: Option<Scalar>,
    message: Option<Scalar>,
    error: Option<Scalar>,
}

/// A field's value, as far as it is of use.
#[derive(Debug, PartialEq)]
enum Scalar {
    Text(String),
    Whole(i64),
    Fraction(f64),
    /// True, false, an object, an array, or a number beyond all ids.
    Other,
}

impl Scalar {
    fn as_text(&self) -> Option<&str> {
        match self {
            Scalar::Text(text) => Some(text),
            _ => None,
        }
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Scalars;

        impl<'de> Visitor<'de> for Scalars {
            type Value = Scalar;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("any JSON value")
            }

            fn visit_str<E>(self, text: &str) -> Result<Scalar, E> {
                Ok(Scalar::Text(text.to_owned()))
            }

            fn visit_i64<E>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar::Whole(number))
            }

            fn visit_u64<E>(self, number: u64) -> Result<Scalar, E> {
                Ok(i64::try_from(number).map_or(Scalar::Other, Scalar::Whole))
            }

            fn visit_f64<E>(self, number: f64) -> Result<Scalar, E> {
                Ok(Scalar::Fraction(number))
            }

            fn visit_bool<E>(self, _: bool) -> Result<Scalar, E> {
                Ok(Scalar::Other)
            }

            fn visit_unit<E>(self) -> Result<Scalar, E> {
                Ok(Scalar::Other)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Scalar, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Scalar, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Scalar::Other)
            }
        }

        deserializer.deserialize_any(Scalars)
    }
}

/// The value of a reply: a JSON object, with or without a byte order mark before it.
fn value_of(message: &Received) -> Result<ReplyValue, String> {
    let payload = message.bytes.payload.as_deref().unwrap_or_default();
    let payload = payload.strip_prefix(b"\xef\xbb\xbf").unwrap_or(payload);
    let Some(first) = payload.iter().find(|byte| !byte.is_ascii_whitespace()) else {
        return Err("it has no value".to_owned());
    };
    // A struct is read from an array, too, field by field.
    if *first != b'{' && serde_json::from_slice::<IgnoredAny>(payload).is_ok() {
        return Err("its value is not a JSON object".to_owned());
    }
    serde_json::from_slice(payload).map_err(|error| match error.classify() {
        // A field that is there twice.
        serde_json::error::Category::Data => format!("its value is ambiguous: {error}"),
        _ => format!("its value is not JSON: line {} column {}", error.line(), error.column()),
    })
}

/// `id` of the value: a number, or a number as text, as JavaScript services send it.
fn subject(id: Scalar) -> Result<String, String> {
    /// Up to here a floating-point number is exact.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    let id = match id {
        Scalar::Whole(id) => Some(id),
        Scalar::Fraction(id) if id.fract() == 0.0 && id.abs() <= EXACT => Some(id as i64),
        Scalar::Text(text) => text.parse().ok(),
        Scalar::Fraction(_) | Scalar::Other => None,
    };
    id.map(|id| id.to_string()).ok_or_else(|| "id in the value is not a whole number".to_owned())
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
            kafka_at: DateTime::from_timestamp_millis(1000),
            cluster_id: "c".into(),
            bytes: Bytes {
                headers: headers.iter().map(|(k, v)| ((*k).to_owned(), Some(v.as_bytes().to_vec()))).collect(),
                payload: Some(payload.as_bytes().to_vec()),
                ..Bytes::default()
            },
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
    fn a_whole_number_is_one_however_it_is_written() {
        let subject = |id: &str| naming(&message(&[], &format!(r#"{{"id":{id}}}"#))).map(|naming| naming.subject);
        for id in ["7", "7.0", "7e0", "70E-1", "\"7\""] {
            assert_eq!(subject(id), Ok(Some("7".into())), "{id}");
        }
        assert_eq!(subject("-7"), Ok(Some("-7".into())));
        assert_eq!(subject("9223372036854775807"), Ok(Some("9223372036854775807".into())));
        for id in ["7.5", "9007199254740994.0", "9223372036854775808", "1e19", "\"7.0\"", "\"\"", "true", "[7]", "{}"] {
            assert!(subject(id).unwrap_err().contains("whole number"), "{id}");
        }
        assert!(subject("1e999").unwrap_err().contains("not JSON"));
    }

    #[test]
    fn a_byte_order_mark_is_no_part_of_the_value_and_depth_no_danger() {
        let by = |payload: &str| naming(&message(&[], payload)).map(|naming| naming.by);
        assert_eq!(by("\u{feff}{\"id\":7}"), Ok(NamedBy::Subject("7".into())));
        let deep = "[".repeat(1_000_000);
        assert!(by(&deep).unwrap_err().contains("not JSON"));
        assert!(by(&format!(r#"{{"id":{deep}}}"#)).unwrap_err().contains("not JSON"));
        let closed = format!("{deep}{}", "]".repeat(1_000_000));
        assert_eq!(by(&format!(r#"{{"id":7,"x":{closed}}}"#)), Ok(NamedBy::Subject("7".into())));
        assert!(by(&closed).unwrap_err().contains("not a JSON object"));
        assert!(by("[7,null,null,null,null,null]").unwrap_err().contains("not a JSON object"));
    }

    #[test]
    fn what_is_there_twice_must_agree() {
        let by = |headers: &[(&str, &str)], payload| naming(&message(headers, payload)).map(|naming| naming.by);
        assert!(by(&[], r#"{"id":7,"id":8}"#).unwrap_err().contains("duplicate field `id`"));
        assert_eq!(by(&[("correlationId", "c"), ("correlationId", "c")], "{}"), Ok(NamedBy::CorrelationId("c".into())));
        assert!(by(&[("correlationId", "c"), ("correlationId", "d")], "{}").unwrap_err().contains("disagree"));
        assert!(by(&[("correlationId", "a\0b")], "{}").unwrap_err().contains("not text"));
    }

    #[test]
    fn a_message_is_known_by_its_id_else_by_its_place() {
        let key = |headers: &[(&str, &str)]| message(headers, "{}").identity(&[0xab; 32]);
        assert_eq!(key(&[]), "at:c:user.create.close:0:7:1000:abababababababab");
        assert_eq!(key(&[("ce_id", "x"), ("ce_source", "s")]), "id:user.create.close:1:s:x");
        assert_eq!(key(&[("ce_id", "x")]), "id:user.create.close:0::x");
        assert_ne!(
            key(&[("ce_id", "c"), ("ce_source", "a:b")]),
            key(&[("ce_id", "b:c"), ("ce_source", "a")]),
            "source and id are kept apart"
        );
        let long = key(&[("ce_id", &"x".repeat(9000))]);
        assert!(long.starts_with("id-hash:user.create.close:") && long.len() < 100, "{long}");
        assert!(key(&[("ce_id", "x"), ("ce_id", "y")]).starts_with("at:"), "two ids are none");
        assert!(key(&[("ce_id", "x\0")]).starts_with("at:"));
    }
}

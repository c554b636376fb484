//! What goes into the outbox, and which lane it takes.

use std::collections::BTreeMap;

use uuid::Uuid;

/// How many lanes keys are spread over. A constant of the schema: `outbox_lanes` has this many
/// rows, and a row's lane is stored with it.
pub const LANES: i16 = 64;

/// A message to be sent. Its payload is opaque to the relay.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NewMessage {
    /// The message's identity (`ce_id`): the same for every attempt and every replay.
    pub id: Uuid,
    /// Kafka topic.
    pub topic: String,
    /// Kafka key. Messages of one key are published in the order their transactions commit.
    pub key: String,
    /// The event's source, a URI reference (`ce_source`).
    pub source: String,
    /// The value, as it will stand in Kafka.
    pub payload: Vec<u8>,
    /// Media type of the payload.
    pub content_type: &'static str,
    /// Headers beside the CloudEvents ones.
    pub headers: BTreeMap<String, String>,
    /// The saga this message belongs to, for operators who look for it.
    pub saga_id: Option<Uuid>,
}

impl NewMessage {
    /// All headers that are known before the message has its place in the outbox; the relay adds
    /// `ce_time` and `aggregate-seq`, which the database decides.
    pub(crate) fn stored_headers(&self) -> BTreeMap<String, String> {
        let mut headers = self.headers.clone();
        headers.extend(
            [
                ("ce_specversion", "1.0".to_owned()),
                ("ce_id", self.id.to_string()),
                ("ce_source", self.source.clone()),
                ("ce_type", self.topic.clone()),
                ("ce_subject", self.key.clone()),
                ("content-type", self.content_type.to_owned()),
            ]
            .map(|(name, value)| (name.to_owned(), value)),
        );
        headers
    }

    /// Whether Kafka could ever take this topic name. An illegal one would pause for ever.
    pub(crate) fn has_legal_topic(&self) -> bool {
        let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        (1..=249).contains(&self.topic.len())
            && !matches!(self.topic.as_str(), "." | "..")
            && self.topic.chars().all(legal)
    }
}

/// The lane of a key: FNV-1a, 64 bits, folded to [`LANES`]. It must never change while rows are
/// in the outbox, so it is neither the standard library's hash (seeded) nor PostgreSQL's (may
/// change between major versions).
pub fn lane_of(key: &str) -> i16 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let hash = key.bytes().fold(OFFSET_BASIS, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    // The low bits of FNV are the weakest: fold the high half in.
    ((hash ^ (hash >> 32)) % LANES as u64) as i16
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_keeps_its_lane_across_releases() {
        assert_eq!([lane_of("1"), lane_of("2"), lane_of("4711")], [48, 25, 10]);
    }

    #[test]
    fn consecutive_ids_spread_over_all_lanes() {
        let mut used = [0u32; LANES as usize];
        (1..=6400).for_each(|id| used[lane_of(&id.to_string()) as usize] += 1);
        assert!(used.iter().all(|&n| (50..=150).contains(&n)), "{used:?}");
    }

    #[test]
    fn a_topic_kafka_would_refuse_is_refused_first() {
        let named = |topic: &str| NewMessage {
            id: Uuid::nil(),
            topic: topic.to_owned(),
            key: "1".into(),
            source: "s".into(),
            payload: vec![],
            content_type: "application/json",
            headers: BTreeMap::new(),
            saga_id: None,
        };
        assert!(named("user.create").has_legal_topic());
        for bad in ["", ".", "..", "a b", "a/b", "ü", &"x".repeat(250)] {
            assert!(!named(bad).has_legal_topic(), "{bad:?}");
        }
    }
}

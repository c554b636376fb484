//! The inbox: every message taken from Kafka, once, in the transaction of its effects.
//!
//! A message that takes effect has a row under its identity: its own id, else its place in Kafka. That row
//! burns the id: another message under it takes no effect. A message that takes no effect leaves the id
//! free and has a row under its content, so that the same junk sent a thousand times is one row that counts
//! to a thousand.

use std::fmt::Write;

use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

/// A message on its way into the inbox.
#[derive(Debug, Clone, Copy)]
pub struct Incoming<'a> {
    /// Who takes it in; each consumer has an inbox of its own.
    pub consumer: &'a str,
    /// The message's own id, else its place in Kafka with the cluster's id.
    pub identity: &'a str,
    /// Tells a copy of the message from another one under the same id; see [`Bytes::digest`].
    pub digest: &'a [u8],
    /// Topic.
    pub topic: &'a str,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
    /// When it was written, by Kafka's clock or its sender's.
    pub kafka_at: Option<DateTime<Utc>>,
}

impl Incoming<'_> {
    /// The key of a row that burns no id.
    fn content_key(&self) -> String {
        format!("content:{}:{}", self.topic, hex(self.digest))
    }
}

/// What became of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Outcome {
    /// It took effect.
    Applied,
    /// It waits for something that is under way; its bytes are kept.
    Deferred,
    /// It came after the fact and has no effect.
    Late,
    /// It says what was known.
    Duplicate,
    /// It names nothing that exists; its bytes are kept.
    Unknown,
    /// It should not have come; its bytes are kept.
    Unexpected,
    /// It was not understood; its bytes are kept.
    Rejected,
}

impl Outcome {
    /// As stored.
    pub fn as_str(self) -> &'static str {
        match self {
            Outcome::Applied => "applied",
            Outcome::Deferred => "deferred",
            Outcome::Late => "late",
            Outcome::Duplicate => "duplicate",
            Outcome::Unknown => "unknown",
            Outcome::Unexpected => "unexpected",
            Outcome::Rejected => "rejected",
        }
    }
}

/// A message's bytes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Bytes {
    /// Key.
    pub key: Option<Vec<u8>>,
    /// Headers in their order. A name may come more than once.
    pub headers: Vec<(String, Option<Vec<u8>>)>,
    /// How many more headers it has, whose names are not UTF-8 and can't be read.
    pub unreadable_headers: usize,
    /// Value.
    pub payload: Option<Vec<u8>>,
}

/// Headers that may differ between two sendings of one message.
const OF_THE_SENDING: [&str; 4] = ["traceparent", "tracestate", "baggage", "ce_time"];

impl Bytes {
    /// SHA-256 of the message on this topic, but for the headers that belong to one sending of it (trace
    /// context and `ce_time`).
    pub fn digest(&self, topic: &str) -> Vec<u8> {
        fn part(hash: &mut Sha256, bytes: Option<&[u8]>) {
            // With lengths, so that no two lists of parts are the same bytes; -1 stands for null.
            hash.update(bytes.map_or(-1, |bytes| bytes.len() as i64).to_be_bytes());
            hash.update(bytes.unwrap_or_default());
        }
        let mut hash = Sha256::new();
        part(&mut hash, Some(topic.as_bytes()));
        part(&mut hash, self.key.as_deref());
        part(&mut hash, self.payload.as_deref());
        for (name, value) in self.headers.iter().filter(|(name, _)| !OF_THE_SENDING.contains(&name.as_str())) {
            part(&mut hash, Some(name.as_bytes()));
            part(&mut hash, value.as_deref());
        }
        hash.update((self.unreadable_headers as u64).to_be_bytes());
        hash.finalize().to_vec()
    }

    pub(crate) fn kept_headers(&self) -> Vec<KeptHeader> {
        let kept = self.headers.iter().map(|(name, value)| {
            let (text, hex) = match value.as_deref() {
                None => (None, None),
                // What PostgreSQL can't hold as text stands as bytes.
                Some(bytes) => match std::str::from_utf8(bytes) {
                    Ok(text) if !text.contains('\0') => (Some(text.to_owned()), None),
                    _ => (None, Some(hex(bytes))),
                },
            };
            KeptHeader { name: Some(name.clone()), text, hex }
        });
        let nameless = || KeptHeader { name: None, text: None, hex: None };
        kept.chain(std::iter::repeat_with(nameless).take(self.unreadable_headers)).collect()
    }

    /// The opposite of [`kept_headers`](Self::kept_headers).
    pub(crate) fn add_kept(&mut self, kept: Vec<KeptHeader>) {
        for KeptHeader { name, text, hex } in kept {
            match name {
                Some(name) => {
                    let value = hex.map(|hex| unhex(&hex)).or(text.map(String::into_bytes));
                    self.headers.push((name, value));
                }
                None => self.unreadable_headers += 1,
            }
        }
    }
}

/// A header as it stands in `raw_headers`. Without a name: the name is not UTF-8.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct KeptHeader {
    name: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    text: Option<String>,
    /// Instead of the text: a value that is no text, in hexadecimal.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    hex: Option<String>,
}

/// A message that waits in the inbox.
#[derive(Debug, Clone)]
pub struct Waiting {
    /// Its identity.
    pub identity: String,
    /// Its digest.
    pub digest: Vec<u8>,
    /// Topic.
    pub topic: String,
    /// Partition.
    pub partition: i32,
    /// Offset.
    pub offset: i64,
    /// When it was written.
    pub kafka_at: Option<DateTime<Utc>>,
    /// Its bytes.
    pub bytes: Bytes,
}

/// What the inbox knows of a message when it comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Nothing under its identity has taken effect. The identity is this message's now, until
    /// [`conclude`] or [`keep`].
    New {
        /// The same content came before, and took no effect.
        seen: bool,
    },
    /// This very message took effect before. The copy is counted.
    Copy,
    /// Another message took effect under its id.
    Reused,
}

/// Takes a message in. Two consumers that got the same message in a rebalance meet here: the second waits
/// for the first's transaction, then sees the row.
pub async fn claim(conn: &mut PgConnection, message: Incoming<'_>) -> Result<Claim, sqlx::Error> {
    loop {
        let (claimed, seen): (bool, bool) = sqlx::query_as(
            "with claimed as (
                 insert into inbox (consumer, message_key, digest, topic, partition, \"offset\", kafka_at, outcome)
                 values ($1, $2, $3, $4, $5, $6, $7, 'applied') on conflict do nothing returning 1)
             select exists (select from claimed),
                    exists (select from inbox where consumer = $1 and message_key = $8)",
        )
        .bind(message.consumer)
        .bind(message.identity)
        .bind(message.digest)
        .bind(message.topic)
        .bind(message.partition)
        .bind(message.offset)
        .bind(message.kafka_at)
        .bind(message.content_key())
        .fetch_one(&mut *conn)
        .await?;
        if claimed {
            return Ok(Claim::New { seen });
        }
        let same: Option<bool> = sqlx::query_scalar(
            "update inbox
                set copies = copies + case when digest = $3 then 1 else 0 end,
                    last_at = case when digest = $3 then clock_timestamp() else last_at end
              where consumer = $1 and message_key = $2
             returning coalesce(digest = $3, true)",
        )
        .bind(message.consumer)
        .bind(message.identity)
        .bind(message.digest)
        .fetch_optional(&mut *conn)
        .await?;
        match same {
            Some(true) => return Ok(Claim::Copy),
            Some(false) => return Ok(Claim::Reused),
            // Gone by retention between the two statements.
            None => {}
        }
    }
}

/// What became of a message, with the reason.
#[derive(Debug, Clone, Copy)]
pub struct Disposition<'a> {
    /// What.
    pub outcome: Outcome,
    /// Why, in words.
    pub detail: Option<&'a str>,
    /// The saga it is about.
    pub saga_id: Option<Uuid>,
    /// Its bytes, where they are kept.
    pub bytes: Option<&'a Bytes>,
}

/// Notes that a claimed message took effect, or waits to. Its id is burnt.
pub async fn conclude(
    conn: &mut PgConnection,
    message: Incoming<'_>,
    disposition: Disposition<'_>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update inbox set outcome = $3, detail = $4, saga_id = $5, raw_key = $6, raw_headers = $7, raw_payload = $8
          where consumer = $1 and message_key = $2",
    )
    .bind(message.consumer)
    .bind(message.identity)
    .bind(disposition.outcome.as_str())
    .bind(disposition.detail)
    .bind(disposition.saga_id)
    .bind(disposition.bytes.and_then(|bytes| bytes.key.as_deref()))
    .bind(disposition.bytes.map(|bytes| Json(bytes.kept_headers())))
    .bind(disposition.bytes.and_then(|bytes| bytes.payload.as_deref()))
    .execute(conn)
    .await?;
    Ok(())
}

/// Gives the identity of a claimed message back: it took no effect, so a good message may use the id.
pub async fn release(conn: &mut PgConnection, message: Incoming<'_>) -> Result<(), sqlx::Error> {
    sqlx::query("delete from inbox where consumer = $1 and message_key = $2")
        .bind(message.consumer)
        .bind(message.identity)
        .execute(conn)
        .await?;
    Ok(())
}

/// Keeps a message that took no effect, under its content: a copy is counted, and what became of the last
/// one stands.
pub async fn keep(
    conn: &mut PgConnection,
    message: Incoming<'_>,
    disposition: Disposition<'_>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "insert into inbox (consumer, message_key, digest, topic, partition, \"offset\", kafka_at,
                            outcome, detail, saga_id, raw_key, raw_headers, raw_payload)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)
         on conflict (consumer, message_key) do update
            set copies = inbox.copies + 1, last_at = clock_timestamp(),
                outcome = excluded.outcome, detail = excluded.detail, saga_id = excluded.saga_id,
                raw_key = coalesce(inbox.raw_key, excluded.raw_key),
                raw_headers = coalesce(inbox.raw_headers, excluded.raw_headers),
                raw_payload = coalesce(inbox.raw_payload, excluded.raw_payload)",
    )
    .bind(message.consumer)
    .bind(message.content_key())
    .bind(message.digest)
    .bind(message.topic)
    .bind(message.partition)
    .bind(message.offset)
    .bind(message.kafka_at)
    .bind(disposition.outcome.as_str())
    .bind(disposition.detail)
    .bind(disposition.saga_id)
    .bind(disposition.bytes.and_then(|bytes| bytes.key.as_deref()))
    .bind(disposition.bytes.map(|bytes| Json(bytes.kept_headers())))
    .bind(disposition.bytes.and_then(|bytes| bytes.payload.as_deref()))
    .execute(conn)
    .await?;
    Ok(())
}

#[derive(sqlx::FromRow)]
struct WaitingRow {
    message_key: String,
    digest: Option<Vec<u8>>,
    topic: String,
    partition: i32,
    offset: i64,
    kafka_at: Option<DateTime<Utc>>,
    raw_key: Option<Vec<u8>>,
    raw_headers: Option<Json<Vec<KeptHeader>>>,
    raw_payload: Option<Vec<u8>>,
}

impl WaitingRow {
    fn waiting(self) -> Waiting {
        let mut bytes = Bytes { key: self.raw_key, payload: self.raw_payload, ..Bytes::default() };
        bytes.add_kept(self.raw_headers.map(|Json(kept)| kept).unwrap_or_default());
        Waiting {
            digest: self.digest.unwrap_or_else(|| bytes.digest(&self.topic)),
            identity: self.message_key,
            topic: self.topic,
            partition: self.partition,
            offset: self.offset,
            kafka_at: self.kafka_at,
            bytes,
        }
    }
}

/// The messages that were deferred for this saga, oldest first.
pub async fn deferred(conn: &mut PgConnection, consumer: &str, saga_id: Uuid) -> Result<Vec<Waiting>, sqlx::Error> {
    let rows: Vec<WaitingRow> = sqlx::query_as(
        "select message_key, digest, topic, partition, \"offset\", kafka_at, raw_key, raw_headers, raw_payload
           from inbox where saga_id = $2 and consumer = $1 and outcome = 'deferred' order by received_at",
    )
    .bind(consumer)
    .bind(saga_id)
    .fetch_all(conn)
    .await?;
    Ok(rows.into_iter().map(WaitingRow::waiting).collect())
}

/// How many messages of each outcome a person should look at.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
pub struct Attention {
    /// `unknown`, `unexpected` or `rejected`.
    pub outcome: String,
    /// How many.
    pub count: i64,
    /// The newest of them.
    pub newest_at: DateTime<Utc>,
}

/// Messages a person should look at.
pub async fn attention(conn: &mut PgConnection) -> Result<Vec<Attention>, sqlx::Error> {
    sqlx::query_as(
        "select outcome, count(*) as count, max(last_at) as newest_at from inbox
          where outcome in ('unknown', 'unexpected', 'rejected') group by outcome order by outcome",
    )
    .fetch_all(conn)
    .await
}

/// Forgets messages whose last copy is older than `keep`, `most` at a time, whether somebody looked at them
/// or not: what anybody can send must not be kept for ever. `keep` must exceed the topics' retention: a
/// message that can still be read again must be known.
pub async fn purge(conn: &mut PgConnection, keep: std::time::Duration, most: i64) -> Result<u64, sqlx::Error> {
    let (purged, unattended): (i64, i64) = sqlx::query_as(
        "with purged as (
             delete from inbox where (consumer, message_key) in (
                 select consumer, message_key from inbox
                  where last_at < clock_timestamp() - make_interval(secs => $1) and outcome <> 'deferred'
                  order by last_at limit $2)
             returning outcome)
         select count(*), count(*) filter (where outcome in ('unknown', 'unexpected', 'rejected')) from purged",
    )
    .bind(keep.as_secs_f64())
    .bind(most)
    .fetch_one(conn)
    .await?;
    if unattended > 0 {
        tracing::warn!(messages = unattended, "messages that took no effect are past retention and were deleted");
    }
    Ok(purged as u64)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(bytes.len() * 2), |mut hex, byte| {
        // Writing to a String can't fail.
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}

/// Of what [`hex`] wrote.
fn unhex(text: &str) -> Vec<u8> {
    let digits = text.as_bytes().chunks(2).filter_map(|pair| std::str::from_utf8(pair).ok());
    digits.filter_map(|pair| u8::from_str_radix(pair, 16).ok()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(headers: &[(&str, Option<&[u8]>)]) -> Bytes {
        let headers = headers.iter().map(|(name, value)| ((*name).to_owned(), value.map(<[u8]>::to_vec))).collect();
        Bytes { key: Some(b"7\xff".to_vec()), headers, unreadable_headers: 2, payload: None }
    }

    #[test]
    fn headers_are_kept_byte_for_byte() {
        let headers: [(&str, Option<&[u8]>); 7] = [
            ("a", Some(b"plain \xc3\xbc")),
            ("a", Some(b"again")),
            ("nul", Some(b"a\0b")),
            ("bytes", Some(b"\xff\x00")),
            ("null", None),
            ("", Some(b"")),
            ("hex", Some(b"hex:ff")),
        ];
        let before = bytes(&headers);
        let kept = serde_json::to_value(before.kept_headers()).unwrap();
        let row = WaitingRow {
            message_key: "at".into(),
            digest: None,
            topic: "t".into(),
            partition: 0,
            offset: 0,
            kafka_at: None,
            raw_key: before.key.clone(),
            raw_headers: Some(Json(serde_json::from_value(kept).unwrap())),
            raw_payload: None,
        };
        assert_eq!(row.waiting().bytes, before);
    }

    #[test]
    fn a_digest_tells_messages_apart_but_not_sendings_of_one() {
        let of = |headers: &[(&str, Option<&[u8]>)]| bytes(headers).digest("t");
        let one = of(&[("saga-id", Some(b"1"))]);
        assert_eq!(one, of(&[("traceparent", Some(b"00-x")), ("saga-id", Some(b"1")), ("ce_time", Some(b"now"))]));
        assert_ne!(one, of(&[("saga-id", Some(b"2"))]));
        assert_ne!(one, of(&[("saga-i", Some(b"d1"))]));
        assert_ne!(of(&[("a", None)]), of(&[("a", Some(b""))]));
        assert_ne!(one, bytes(&[("saga-id", Some(b"1"))]).digest("u"));
    }
}

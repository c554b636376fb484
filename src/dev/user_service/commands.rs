//! What a command says, and what its answer looks like. Pure.

use std::collections::BTreeMap;

use chrono::SecondsFormat;
use outbox_relay::logging::truncated;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::profiles::{Decided, Profile};

/// This service's name in the messages it sends.
const SENDER: &str = "user-service";

/// The topics commands come on, without the configured prefix.
pub(super) const TOPICS: [&str; 2] = ["user.create", "user.delete"];

/// A command of a saga.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Command {
    pub order: Order,
    pub user_id: i64,
    pub saga_id: Uuid,
    /// The message's own id; the answer names it as its cause.
    message_id: String,
    correlation_id: String,
    traceparent: Option<String>,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    Create(Profile),
    Erase,
}

/// The answer to a command, ready to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer {
    /// Without the configured prefix.
    pub topic: &'static str,
    pub key: String,
    pub headers: Vec<(&'static str, String)>,
    pub payload: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Body {
    id: i64,
    #[serde(default)]
    username: String,
    #[serde(default)]
    email: String,
    saga_id: Option<Uuid>,
    correlation_id: Option<String>,
}

impl Command {
    /// Reads a message from a topic (named without prefix). `Err` says what is wrong with it.
    pub fn read(topic: &str, headers: &BTreeMap<String, String>, payload: Option<&[u8]>) -> Result<Self, String> {
        let body: Body = serde_json::from_slice(payload.unwrap_or_default())
            // It quotes what it did not expect, whole.
            .map_err(|error| format!("the value is not the JSON of a command: {}", truncated(&error.to_string())))?;
        if [&body.username, &body.email].into_iter().any(|text| text.contains('\0')) {
            return Err("the username or e-mail has a NUL in it, which no database holds".to_owned());
        }
        let saga_id = match headers.get("saga-id") {
            Some(text) => text.parse().map_err(|_| "the saga-id header is no UUID".to_owned())?,
            None => body.saga_id.ok_or("neither a saga-id header nor a sagaId names the saga")?,
        };
        let order = match topic {
            "user.create" => Order::Create(Profile {
                user_id: body.id,
                username: body.username,
                email: body.email,
                saga_id: Some(saga_id),
            }),
            "user.delete" => Order::Erase,
            other => return Err(format!("{other} is not a topic of commands")),
        };
        Ok(Self {
            order,
            user_id: body.id,
            saga_id,
            message_id: headers.get("ce_id").cloned().unwrap_or_default(),
            correlation_id: headers
                .get("correlationId")
                .cloned()
                .or(body.correlation_id)
                .unwrap_or_else(|| saga_id.to_string()),
            traceparent: headers.get("traceparent").cloned(),
        })
    }
}

impl Answer {
    /// The same command message and decision always make the same answer, down to its id, so that
    /// whoever reads it twice can tell.
    pub fn to(command: &Command, decided: &Decided) -> Self {
        let topic = match (&command.order, &decided.refusal) {
            (Order::Create(_), None) => "user.create.done",
            (Order::Create(_), Some(_)) => "user.create.close",
            (Order::Erase, None) => "user.delete.done",
            (Order::Erase, Some(_)) => "user.delete.close",
        };
        let id = Uuid::new_v5(&command.saga_id, format!("{topic} {}", command.message_id).as_bytes());
        let mut headers = vec![
            ("saga-id", command.saga_id.to_string()),
            ("correlationId", command.correlation_id.clone()),
            ("sender", SENDER.to_owned()),
            ("content-type", "application/json".to_owned()),
            ("ce_specversion", "1.0".to_owned()),
            ("ce_id", id.to_string()),
            ("ce_source", SENDER.to_owned()),
            ("ce_type", topic.to_owned()),
            ("ce_time", decided.at.to_rfc3339_opts(SecondsFormat::Millis, true)),
            ("ce_subject", command.user_id.to_string()),
        ];
        if !command.message_id.is_empty() {
            headers.push(("causation-id", command.message_id.clone()));
        }
        headers.extend(command.traceparent.clone().map(|parent| ("traceparent", parent)));
        let mut payload = json!({ "id": command.user_id, "sagaId": command.saga_id });
        if let Some(reason) = &decided.refusal {
            payload["reason"] = Value::from(reason.as_str());
        }
        Self { topic, key: command.user_id.to_string(), headers, payload: payload.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;

    use super::*;

    const SAGA: &str = "0198c0de-0000-7000-8000-000000000001";

    fn headers(pairs: &[(&str, &str)]) -> BTreeMap<String, String> {
        pairs.iter().map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    #[test]
    fn the_saga_is_named_by_header_or_value_and_must_be_named() {
        let body = format!(r#"{{"id":7,"username":"ann","email":"a@b.cd","sagaId":"{SAGA}"}}"#);
        let by_value = Command::read("user.create", &headers(&[]), Some(body.as_bytes())).expect("a command");
        assert_eq!((by_value.saga_id.to_string().as_str(), by_value.correlation_id.as_str()), (SAGA, SAGA));

        let by_header = Command::read("user.delete", &headers(&[("saga-id", SAGA)]), Some(br#"{"id":7}"#));
        assert_eq!(by_header.expect("a command").order, Order::Erase);

        for (headers, payload) in [
            (headers(&[]), Some(br#"{"id":7}"#.as_slice())),
            (headers(&[("saga-id", "seven")]), Some(br#"{"id":7}"#.as_slice())),
            (headers(&[("saga-id", SAGA)]), Some(b"seven".as_slice())),
            (headers(&[("saga-id", SAGA)]), None),
        ] {
            assert!(Command::read("user.delete", &headers, payload).is_err(), "{headers:?}");
        }
    }

    #[test]
    fn what_is_wrong_with_a_command_is_said_in_one_short_line() {
        let payload = format!(r#"{{"id":"{}"}}"#, "\\n".repeat(5000));
        let problem = Command::read("user.delete", &headers(&[("saga-id", SAGA)]), Some(payload.as_bytes()));
        let problem = problem.expect_err("no number");
        assert!(problem.len() < 400 && !problem.contains('\n'), "{problem}");
    }

    #[test]
    fn the_same_command_gets_the_same_answer_and_another_message_an_id_of_its_own() {
        let read = |ce_id| {
            let headers = headers(&[("saga-id", SAGA), ("ce_id", ce_id), ("correlationId", "c-1")]);
            Command::read("user.delete", &headers, Some(br#"{"id":7}"#)).expect("a command")
        };
        let decided = Decided { refusal: None, at: DateTime::UNIX_EPOCH };
        let answer = Answer::to(&read("first"), &decided);
        assert_eq!(answer, Answer::to(&read("first"), &decided));
        assert_ne!(answer.headers, Answer::to(&read("second"), &decided).headers);
        assert_eq!(answer.payload, format!(r#"{{"id":7,"sagaId":"{SAGA}"}}"#));
        assert!(answer.headers.contains(&("causation-id", "first".to_owned())));
        assert!(answer.headers.contains(&("correlationId", "c-1".to_owned())));
    }
}

//! What other services say, as a message.

use outbox_relay::inbox::Bytes;
use serde_json::json;
use uuid::Uuid;

use super::Play;
use crate::{
    definition::Undo,
    orchestrator::Flows,
    reply::Received,
    suite::{Subject, stage::PARTICIPANT},
};

/// The reason every refusal gives.
pub(in crate::suite) const REFUSAL: &str = "the suite refuses";

/// What another service says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::suite) enum Say {
    Done(usize),
    Refused(usize),
    Undone(usize),
    UndoRefused(usize),
}

/// How it names the saga.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::suite) enum Naming {
    Header,
    Value,
    CorrelationId,
    /// As services of the original fleet do, on the topic for either answer.
    Original,
}

impl<F: Flows, S: Subject> Play<'_, F, S> {
    pub(super) fn next_offset(&mut self) -> i64 {
        self.stage.messages as i64 + 1_000_000
    }

    /// A new message that says it.
    pub(super) fn message(&mut self, what: Say) -> Received {
        let original = match (what, self.naming) {
            (Say::Done(step) | Say::Refused(step), Naming::Original) => self.stage.definition.steps[step].either,
            _ => None,
        };
        let topic = original.unwrap_or_else(|| self.topic(what));
        let (step, undo) = match what {
            Say::Done(step) | Say::Refused(step) => (step, false),
            Say::Undone(step) | Say::UndoRefused(step) => (step, true),
        };
        let mut headers = vec![
            header("ce_id", &Uuid::now_v7().to_string()),
            header("ce_source", PARTICIPANT),
            header("causation-id", &self.remote.message_id(step, undo).to_string()),
        ];
        let mut value = json!({ "reason": REFUSAL });
        match self.naming {
            Naming::Header => headers.push(header("saga-id", &self.saga_id.to_string())),
            Naming::Value => value["sagaId"] = json!(self.saga_id),
            Naming::CorrelationId | Naming::Original => {
                headers.push(header("correlationId", &self.correlation_id));
            }
        }
        if original.is_some() {
            headers.push(header("service", PARTICIPANT));
            let status = if matches!(what, Say::Done(_)) { "ok" } else { "error" };
            value = json!({ "from": PARTICIPANT, "status": status, "message": REFUSAL });
        }
        Received {
            topic: topic.to_owned(),
            partition: 0,
            offset: self.next_offset(),
            kafka_at: None,
            cluster_id: "suite".to_owned(),
            bytes: Bytes { headers, payload: Some(value.to_string().into_bytes()), ..Bytes::default() },
        }
    }

    fn topic(&self, what: Say) -> &'static str {
        let step = |step: usize| &self.stage.definition.steps[step];
        match what {
            Say::Done(at) => step(at).done,
            Say::Refused(at) => step(at).refused,
            Say::Undone(at) | Say::UndoRefused(at) => match (&step(at).undo, what) {
                (Undo::Command { done, .. }, Say::Undone(_)) => done,
                (Undo::Command { refused, .. }, _) => refused,
                // `cases` asks only steps with an undo command about it.
                (Undo::Nothing { .. }, _) => "",
            },
        }
    }

    pub(super) fn name(&self, what: Say) -> String {
        let (step, word) = match what {
            Say::Done(step) => (step, "done"),
            Say::Refused(step) => (step, "refused"),
            Say::Undone(step) => (step, "undone"),
            Say::UndoRefused(step) => (step, "undo refused"),
        };
        format!("{word:?} of step {}", self.stage.definition.steps[step].name)
    }
}

fn header(name: &str, value: &str) -> (String, Option<Vec<u8>>) {
    (name.to_owned(), Some(value.as_bytes().to_vec()))
}

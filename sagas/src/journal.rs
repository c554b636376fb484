//! How events read in a saga's log.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use crate::{
    machine::{Answer, Event, Settlement},
    state::{Saga, Status},
    store::LogLine,
};

/// Who brought an event, for the log.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EventSource<'a> {
    pub actor: &'a str,
    /// Where the event is on record: the message's key in the inbox, say.
    pub reference: Option<&'a str>,
    /// When the command was published, for an event that says so.
    pub published_at: Option<DateTime<Utc>>,
    /// It came before, and was without effect: should it be so again, there is no second line.
    pub repeated: bool,
}

impl<'a> EventSource<'a> {
    pub(crate) fn of(actor: &'a str) -> Self {
        Self { actor, reference: None, published_at: None, repeated: false }
    }

    pub(crate) fn line(self, saga: &Saga, to: Status, event: &'a Event, mut detail: Value) -> LogLine<'a> {
        detail["said"] = said(event);
        if let Some(reference) = self.reference {
            detail["message"] = json!(reference);
        }
        LogLine {
            saga_id: saga.saga_id,
            revision: saga.revision + 1,
            event: event_name(event),
            from: Some(saga.status),
            to,
            actor: self.actor,
            detail,
        }
    }
}

fn event_name(event: &Event) -> &'static str {
    match event {
        Event::Replied { .. } => "replied",
        Event::Doubted { .. } => "doubted",
        Event::UndoReplied { .. } => "undo-replied",
        Event::UndoParked { .. } => "undo-parked",
        Event::Published => "published",
        Event::Parked { .. } => "parked",
        Event::Overdue { .. } => "overdue",
        Event::Settled(_) => "asked",
    }
}

fn said(event: &Event) -> Value {
    match event {
        Event::Replied { answer: Answer::Done, .. } => json!("done"),
        Event::Replied { answer: Answer::Refused(why), .. } => json!({ "refused": why }),
        Event::Doubted { .. } => json!("refused, by a reply that may be older than the saga"),
        Event::UndoReplied { refusal: None, .. } => json!("undone"),
        Event::UndoReplied { refusal: Some(why), .. } => json!({ "undoRefused": why }),
        Event::Published => Value::Null,
        Event::Parked { reason } | Event::UndoParked { reason, .. } => json!(reason),
        Event::Overdue { recourse } => json!(format!("{recourse:?}")),
        Event::Settled(settlement) => match settlement {
            Settlement::AlreadyDone => json!("already done"),
            Settlement::DoneNow => json!("done now"),
            Settlement::Refused(why) => json!({ "refused": why }),
            Settlement::Ambiguous(why) => json!({ "ambiguous": why }),
            Settlement::NoAnswer(why) | Settlement::GaveUp(why) => json!({ "noAnswer": why }),
        },
    }
}

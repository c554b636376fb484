//! What a saga is made of. A definition is data: it reads from top to bottom, and the machine, the
//! consumer and the documentation all read the same one.

use serde_json::Value;

/// A saga's kind.
#[derive(Debug)]
pub struct Definition {
    /// Stable name, stored with every saga.
    pub name: &'static str,
    /// Raised when steps change, so that running sagas of an earlier one can be told apart.
    pub version: i32,
    /// The steps, in order.
    pub steps: &'static [Step],
}

/// One step: a command to another service, and how to take it back.
#[derive(Debug)]
pub struct Step {
    /// Stable name, stored with every saga.
    pub name: &'static str,
    /// What is sent.
    pub command: Command,
    /// Topic of "done" replies.
    pub done: &'static str,
    /// Topic of "refused" replies.
    pub refused: &'static str,
    /// Topic on which services of the original fleet answer either way, with a status in the value.
    pub either: Option<&'static str>,
    /// How the step is taken back.
    pub undo: Undo,
}

/// A message to another service.
#[derive(Debug)]
pub struct Command {
    /// Its topic.
    pub topic: &'static str,
    /// Its value, from the saga's data. `sagaId`, `correlationId` and `occurredAt` are added.
    pub payload: fn(&Value) -> Value,
}

/// How a step is taken back. Saying that there is nothing to undo is a decision, not an omission.
#[derive(Debug)]
pub enum Undo {
    /// A command that erases whatever the step did, also when it did nothing, and also when the
    /// step's own command arrives only afterwards.
    Command {
        /// The command.
        command: Command,
        /// Topic of "undone" replies.
        done: &'static str,
        /// Topic of "won't undo" replies.
        refused: &'static str,
    },
    /// Nothing to undo, and why.
    Nothing {
        /// The reason.
        because: &'static str,
    },
}

/// What a reply topic says about a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meaning {
    /// The command was carried out.
    Done,
    /// The command was refused.
    Refused,
    /// The status in the value decides.
    Either,
    /// The undo command was carried out.
    Undone,
    /// The undo command was refused.
    UndoRefused,
}

impl Definition {
    /// What a message on `topic` says, and about which step.
    pub fn meaning_of(&self, topic: &str) -> Option<(usize, Meaning)> {
        self.steps.iter().enumerate().find_map(|(index, step)| Some((index, step.meaning_of(topic)?)))
    }

    /// All topics its commands go to.
    pub fn command_topics(&self) -> impl Iterator<Item = &'static str> {
        self.steps.iter().flat_map(|step| {
            let undo = match &step.undo {
                Undo::Command { command, .. } => Some(command.topic),
                Undo::Nothing { .. } => None,
            };
            [step.command.topic].into_iter().chain(undo)
        })
    }

    /// All topics on which replies to this saga may come.
    pub fn reply_topics(&self) -> impl Iterator<Item = &'static str> {
        self.steps.iter().flat_map(|step| {
            let undo = match &step.undo {
                Undo::Command { done, refused, .. } => vec![*done, *refused],
                Undo::Nothing { .. } => vec![],
            };
            [step.done, step.refused].into_iter().chain(step.either).chain(undo)
        })
    }

    /// The index of a step by its stored name.
    pub fn step_index(&self, name: &str) -> Option<usize> {
        self.steps.iter().position(|step| step.name == name)
    }
}

impl Step {
    fn meaning_of(&self, topic: &str) -> Option<Meaning> {
        match &self.undo {
            _ if topic == self.done => Some(Meaning::Done),
            _ if topic == self.refused => Some(Meaning::Refused),
            _ if self.either == Some(topic) => Some(Meaning::Either),
            Undo::Command { done, .. } if topic == *done => Some(Meaning::Undone),
            Undo::Command { refused, .. } if topic == *refused => Some(Meaning::UndoRefused),
            _ => None,
        }
    }
}

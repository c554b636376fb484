//! What the other services saw of one saga, and what must hold of it. They are strict: a command
//! that is not as it should be is a flaw, where real ones would make do.

use std::collections::BTreeSet;

use outbox_relay::test_kit::Delivered;
use serde_json::Value;
use uuid::Uuid;

use super::{Verdict, ensure};
use crate::{
    definition::{Definition, Undo},
    state::{Saga, Status},
};

/// The commands of one saga, in the order they came.
pub(super) struct Remote {
    definition: &'static Definition,
    saga_id: Uuid,
    correlation_id: String,
    subject: String,
    orders: Vec<Order>,
    /// Steps whose undo was refused the last time anything was said about it.
    refusing: BTreeSet<usize>,
    undone: BTreeSet<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Order {
    step: usize,
    undo: bool,
}

impl Remote {
    pub(super) fn of(definition: &'static Definition, saga: &Saga) -> Self {
        Self {
            definition,
            saga_id: saga.saga_id,
            correlation_id: saga.correlation_id.clone(),
            subject: saga.subject.clone(),
            orders: vec![],
            refusing: BTreeSet::new(),
            undone: BTreeSet::new(),
        }
    }

    /// Whether this message is one of this saga's, by its key or by what it says.
    pub(super) fn concerns(&self, message: &Delivered) -> bool {
        message.key == self.subject || message.headers.get("saga-id") == Some(&self.saga_id.to_string())
    }

    /// Takes a command in.
    pub(super) fn accept(&mut self, message: &Delivered) -> Verdict {
        let Delivered { topic, key, .. } = message;
        let order = self.order_on(topic).ok_or_else(|| format!("a message came on {topic:?}, where no step sends"))?;
        let name = self.name_of(order);
        ensure(!self.orders.contains(&order), || format!("{name} was sent twice"))?;
        ensure(*key == self.subject, || {
            format!("{name} has the key {key:?}, the saga's messages have {:?}", self.subject)
        })?;
        ensure(!order.undo || self.orders.contains(&Order { undo: false, ..order }), || {
            format!("{name} does not stand behind the command it undoes")
        })?;
        ensure(order.undo || self.orders.iter().all(|sent| !sent.undo), || format!("{name} was sent after an undo"))?;
        if order.undo
            && let Some(older) = self.orders.iter().find(|sent| sent.undo && sent.step < order.step)
        {
            return Err(format!("{name} was sent after {}: undos go newest first", self.name_of(*older)).into());
        }
        self.check_headers(order, message)?;
        self.check_value(order, message)?;
        self.orders.push(order);
        Ok(())
    }

    fn check_headers(&self, order: Order, message: &Delivered) -> Verdict {
        let cause = match order {
            Order { step: 0, undo: false } => self.saga_id,
            Order { step, undo: false } => self.id_of(Order { step: step - 1, undo: false }),
            Order { step, undo: true } => self.id_of(Order { step, undo: false }),
        };
        let expected = [
            ("saga-id", self.saga_id.to_string()),
            ("correlationId", self.correlation_id.clone()),
            ("causation-id", cause.to_string()),
            // It follows from saga, step and direction alone, so that a copy is known as one.
            ("ce_id", self.id_of(order).to_string()),
            ("ce_type", message.topic.clone()),
            ("ce_subject", self.subject.clone()),
            ("aggregate-seq", (self.orders.len() + 1).to_string()),
        ];
        for (header, expected) in expected {
            let found = message.headers.get(header);
            ensure(found == Some(&expected), || {
                format!("{} has the header {header} {found:?}, it should be {expected:?}", self.name_of(order))
            })?;
        }
        Ok(())
    }

    fn check_value(&self, order: Order, message: &Delivered) -> Verdict {
        let name = || self.name_of(order);
        let value: Value = serde_json::from_slice(&message.payload)
            .map_err(|error| format!("{}'s value is not JSON: {error}", name()))?;
        let expected = [("sagaId", self.saga_id.to_string()), ("correlationId", self.correlation_id.clone())];
        for (field, expected) in expected {
            ensure(value[field] == expected.as_str(), || {
                format!("{}'s value has {field} {}, it should be {expected:?}", name(), value[field])
            })?;
        }
        ensure(value["occurredAt"].is_string(), || format!("{}'s value does not say when it occurred", name()))
    }

    /// How many commands came.
    pub(super) fn count(&self) -> usize {
        self.orders.len()
    }

    pub(super) fn has_command(&self, step: usize) -> bool {
        self.orders.contains(&Order { step, undo: false })
    }

    pub(super) fn has_undo(&self, step: usize) -> bool {
        self.orders.contains(&Order { step, undo: true })
    }

    /// Message id of a step's command, or of its undo command.
    pub(super) fn message_id(&self, step: usize, undo: bool) -> Uuid {
        self.id_of(Order { step, undo })
    }

    /// Something is said about an undo. What is said before the undo came is no answer to it.
    pub(super) fn undo_answered(&mut self, step: usize, refused: bool) {
        if self.has_undo(step) {
            let (into, out_of) = match refused {
                true => (&mut self.refusing, &mut self.undone),
                false => (&mut self.undone, &mut self.refusing),
            };
            into.insert(step);
            out_of.remove(&step);
        }
    }

    /// The steps whose undo was refused the last time it was spoken of.
    pub(super) fn refusing(&self) -> &BTreeSet<usize> {
        &self.refusing
    }

    /// The undos that are not carried out yet, newest step first.
    pub(super) fn owing(&self) -> Vec<usize> {
        let undos = self.orders.iter().filter(|order| order.undo).map(|order| order.step);
        undos.filter(|step| !self.undone.contains(step)).collect()
    }

    /// What must be left elsewhere of a saga that has ended so.
    pub(super) fn check_end(&self, ended: Status) -> Verdict {
        for (step, defined) in self.definition.steps.iter().enumerate() {
            let (commanded, undone) = (self.has_command(step), self.has_undo(step));
            if ended == Status::Completed {
                ensure(commanded, || format!("it is completed, and step {} was never asked for", defined.name))?;
                ensure(!undone, || format!("it is completed, and step {} was undone", defined.name))?;
            } else if let Undo::Command { .. } = defined.undo {
                ensure(commanded == undone, || {
                    format!("it is taken back, and what step {} did elsewhere stays: no undo was sent", defined.name)
                })?;
            }
        }
        Ok(())
    }

    fn order_on(&self, topic: &str) -> Option<Order> {
        self.definition.steps.iter().enumerate().find_map(|(step, defined)| match &defined.undo {
            _ if defined.command.topic == topic => Some(Order { step, undo: false }),
            Undo::Command { command, .. } if command.topic == topic => Some(Order { step, undo: true }),
            _ => None,
        })
    }

    fn id_of(&self, order: Order) -> Uuid {
        let direction = if order.undo { "undo" } else { "do" };
        Uuid::new_v5(&self.saga_id, format!("{}/{direction}", self.definition.steps[order.step].name).as_bytes())
    }

    fn name_of(&self, order: Order) -> String {
        let what = if order.undo { "undo command" } else { "command" };
        format!("the {what} of step {}", self.definition.steps[order.step].name)
    }
}

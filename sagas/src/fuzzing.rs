//! Opens to `tests/fuzz` what this crate reads of bytes that others wrote. No part of its interface.

use crate::{
    definition::Meaning,
    machine::Answer,
    reply::{self, NamedBy, Received, Verdict},
};

/// Every text that comes of a reply and is stored or logged.
pub fn texts(message: &Received, participant: &str) -> Vec<String> {
    let mut texts = vec![message.identity(&message.bytes.digest(&message.topic))];
    match reply::naming(message) {
        Ok(naming) => {
            texts.extend(match naming.by {
                NamedBy::SagaId(id) => Some(id.to_string()),
                NamedBy::CorrelationId(id) | NamedBy::Subject(id) => Some(id),
            });
            texts.extend(naming.subject.into_iter().chain(naming.correlation_id));
        }
        Err(why) => texts.push(why),
    }
    for meaning in [Meaning::Done, Meaning::Refused, Meaning::Undone, Meaning::UndoRefused, Meaning::Either] {
        texts.extend(match reply::verdict(message, meaning, participant) {
            Ok(Verdict::Step(Answer::Refused(why)) | Verdict::UndoRefused(why)) | Err(why) => Some(why),
            Ok(Verdict::Step(Answer::Done) | Verdict::Undone) => None,
        });
    }
    texts
}

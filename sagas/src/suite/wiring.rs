//! What can be seen to be wrong in a definition before any saga runs. Pure.

use std::collections::BTreeMap;

use super::Failure;
use crate::{
    definition::{Definition, Step, Undo},
    machine::StepSet,
};

/// Steps have names of their own, and every topic has one meaning: a reply is understood by its topic
/// alone, so with two meanings it would be taken for the first.
pub(super) fn flaws(definition: &Definition) -> Vec<Failure> {
    let flaw = |step: Option<&Step>, what: String| Failure {
        flow: definition.name,
        step: step.map(|step| step.name),
        case: "as it is defined".to_owned(),
        what,
    };
    let mut flaws = vec![];
    if definition.steps.is_empty() {
        flaws.push(flaw(None, "it has no steps".to_owned()));
    }
    if definition.steps.len() > StepSet::MOST {
        flaws.push(flaw(None, format!("it has more than {} steps", StepSet::MOST)));
    }
    let mut names = BTreeMap::new();
    let mut meanings: BTreeMap<&str, String> = BTreeMap::new();
    for step in definition.steps {
        if names.insert(step.name, ()).is_some() {
            flaws.push(flaw(Some(step), "another step has the same name".to_owned()));
        }
        if let Undo::Nothing { because } = &step.undo
            && because.trim().is_empty()
        {
            flaws.push(flaw(Some(step), "it has nothing to undo and does not say why".to_owned()));
        }
        for (topic, use_of) in topics(step) {
            let meaning = format!("{use_of} of step {}", step.name);
            if let Some(other) = meanings.get(topic) {
                flaws
                    .push(flaw(Some(step), format!("the topic {topic:?} of its {use_of} is also that of the {other}")));
            } else {
                meanings.insert(topic, meaning);
            }
        }
    }
    flaws
}

fn topics(step: &Step) -> Vec<(&'static str, &'static str)> {
    let mut topics =
        vec![(step.command.topic, "command"), (step.done, "\"done\" replies"), (step.refused, "\"refused\" replies")];
    topics.extend(step.either.map(|topic| (topic, "replies either way")));
    if let Undo::Command { command, done, refused } = &step.undo {
        topics.extend([
            (command.topic, "undo command"),
            (*done, "\"undone\" replies"),
            (*refused, "\"undo refused\" replies"),
        ]);
    }
    topics
}

//! The state machine. Pure: `(state, event) → decision`, one arm for every pair, no clock, no I/O.
//! Live replies, deadlines, back-checks and replays all pass through [`decide`].

use crate::{
    definition::{Definition, Undo},
    state::{Evidence, Status},
};

/// What the machine needs to know of a saga.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Position {
    /// Where it stands.
    pub status: Status,
    /// The step it is at.
    pub step: usize,
    /// Its steps were taken back already (it is, or was, compensated).
    pub undone: bool,
    /// The steps whose undo was refused or can't be sent, and has not come through since.
    pub refused_undos: StepSet,
}

/// Steps of one saga, at most [`StepSet::MOST`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct StepSet(u64);

impl StepSet {
    /// So many steps a definition may have.
    pub const MOST: usize = u64::BITS as usize;

    /// These and that one.
    pub fn with(self, step: usize) -> Self {
        Self(self.0 | 1 << step)
    }

    /// These but that one.
    pub fn without(self, step: usize) -> Self {
        Self(self.0 & !(1 << step))
    }

    /// Whether that one is among them.
    pub fn contains(self, step: usize) -> bool {
        self.0 & 1 << step != 0
    }

    /// Whether there is none.
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }

    /// Their names, in the order of the definition.
    pub fn names(self, definition: &Definition) -> Vec<&'static str> {
        let named = definition.steps.iter().enumerate();
        named.filter(|(step, _)| self.contains(*step)).map(|(_, step)| step.name).collect()
    }
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A reply to a step's command.
    Replied {
        /// The step it answers.
        step: usize,
        /// What it says.
        answer: Answer,
    },
    /// A refusal that may have been meant for something older than this saga.
    Doubted {
        /// The step it answers.
        step: usize,
        /// Whom to ask about it.
        recourse: Recourse,
    },
    /// A reply to an undo command.
    UndoReplied {
        /// The step it would undo.
        step: usize,
        /// `None`: undone. `Some`: refused, with the reason.
        refusal: Option<String>,
    },
    /// An undo command can't be sent.
    UndoParked {
        /// The step it would undo.
        step: usize,
        /// Why.
        reason: String,
    },
    /// The pending command is in Kafka.
    Published,
    /// The pending command can't be sent.
    Parked {
        /// Why.
        reason: String,
    },
    /// The deadline has passed without a reply, or whoever was looking into it has vanished.
    Overdue {
        /// Whom to ask, or what to assume.
        recourse: Recourse,
    },
    /// The other service was asked.
    Settled(Settlement),
}

/// What a reply says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// Carried out.
    Done,
    /// Refused, with a reason.
    Refused(String),
}

/// What can be done about silence.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Recourse {
    /// The other service can be asked.
    Ask,
    /// It can't; silence counts as success.
    AssumeCompleted,
    /// It can't; a person has to look.
    NeedsOperator,
}

/// What came of asking.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Settlement {
    /// The step had been carried out.
    AlreadyDone,
    /// It had not; it has been now.
    DoneNow,
    /// A definite refusal.
    Refused(String),
    /// An answer that does not tell our own doing from somebody else's.
    Ambiguous(String),
    /// No answer; ask again later.
    NoAnswer(String),
    /// No answer, and it was asked often enough.
    GaveUp(String),
}

/// What is to be done. Everything in a transition happens in one transaction.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Decision {
    /// The saga moves.
    Move(Transition),
    /// The event has no effect; it is kept with this verdict.
    Ignore(Ignored),
    /// The event waits until the question under way is settled.
    Defer,
}

/// A move.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transition {
    /// The next status.
    pub to: Status,
    /// The next step.
    pub step: usize,
    /// What else happens, in this order.
    pub effects: Vec<Effect>,
    /// By what it is closed, when it is.
    pub evidence: Option<Evidence>,
    /// Why it is stuck, when it is.
    pub stuck_reason: Option<String>,
    /// What becomes of the deadline.
    pub deadline: Deadline,
    /// The steps whose undo stands refused from now on.
    pub refused_undos: StepSet,
}

/// What a move brings about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Effect {
    /// Send this step's command.
    Command(usize),
    /// Send this step's undo command.
    Undo(usize),
    /// Do what the flow does here when it completes.
    CompleteLocally,
    /// Take back what the flow did here.
    CompensateLocally,
}

/// What becomes of the deadline.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deadline {
    /// There is none: the saga rests, or its command is not out yet.
    None,
    /// One step's time after the command's publication.
    AfterPublication,
    /// It has come: whoever can be asked is asked at once.
    Now,
    /// As long as somebody is asking.
    WhileAsking,
    /// After the next, longer, pause.
    BackOff,
}

/// Why an event has no effect.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ignored {
    /// It says what is known already.
    Duplicate,
    /// It contradicts how the saga was closed, or comes for a step that is past.
    Late,
    /// It should not come at all in this state.
    Unexpected,
    /// It tells nothing the saga needs, and that is in order.
    Noted,
}

/// Decides what an event means for a saga of this kind that stands there.
pub fn decide(definition: &Definition, at: Position, event: &Event) -> Decision {
    use Event::{Doubted, Overdue, Parked, Published, Replied, Settled, UndoParked, UndoReplied};
    use Ignored::{Duplicate, Late, Noted, Unexpected};
    use Status::{Compensated, Completed, Resolving, Running, Stuck};

    match (at.status, event) {
        // A reply to a step's command.
        (_, Replied { step, .. }) if *step < at.step => Decision::Ignore(Late),
        (_, Replied { step, .. }) if *step > at.step => Decision::Ignore(Unexpected),
        (Running, Replied { answer, .. }) => answered(definition, at, answer, Evidence::Reply),
        (Resolving, Replied { .. }) => Decision::Defer,
        // The answer a stuck saga was waiting for settles it, unless it is stuck in its undoing.
        (Stuck, Replied { answer, .. }) if !at.undone => answered(definition, at, answer, Evidence::Reply),
        (Stuck, Replied { .. }) => Decision::Ignore(Late),
        (Completed, Replied { answer: Answer::Done, .. }) => Decision::Ignore(Duplicate),
        (Completed, Replied { answer: Answer::Refused(_), .. }) => Decision::Ignore(Late),
        (Compensated, Replied { answer: Answer::Refused(_), .. }) => Decision::Ignore(Duplicate),
        // The undo command is behind the command in the same key: what was done late is undone.
        (Compensated, Replied { answer: Answer::Done, .. }) => Decision::Ignore(Late),

        // A refusal that may belong to something older is asked about, not obeyed.
        (_, Doubted { step, .. }) if *step < at.step => Decision::Ignore(Late),
        (_, Doubted { step, .. }) if *step > at.step => Decision::Ignore(Unexpected),
        (Running, Doubted { recourse: Recourse::Ask, .. }) => Decision::Move(waiting(at, Running, Deadline::Now)),
        (Running, Doubted { recourse: Recourse::AssumeCompleted | Recourse::NeedsOperator, .. }) => {
            Decision::Move(stuck(
                at,
                "a refusal came that may be older than this saga, and no service is configured that could be asked \
                 (USER_SERVICE_GRPC_URL)"
                    .to_owned(),
            ))
        }
        (Resolving, Doubted { .. }) => Decision::Ignore(Noted),
        (Stuck, Doubted { .. }) => Decision::Ignore(Unexpected),
        (Completed, Doubted { .. }) => Decision::Ignore(Late),
        (Compensated, Doubted { .. }) => Decision::Ignore(Duplicate),

        // A reply to an undo command. Each undo is heard for itself: that one step is undone says
        // nothing of another, whose undo was refused.
        (Compensated | Stuck, UndoReplied { step, .. }) if *step > at.step => Decision::Ignore(Unexpected),
        (Compensated, UndoReplied { refusal: None, .. }) => Decision::Ignore(Noted),
        (Compensated, UndoReplied { step, refusal: Some(why) }) => {
            Decision::Move(not_undone(definition, at, *step, &format!("was refused: {why}")))
        }
        (Stuck, UndoReplied { step, refusal: None }) if at.undone => undone(definition, at, *step),
        (Stuck, UndoReplied { step, .. }) if at.undone && at.refused_undos.contains(*step) => {
            Decision::Ignore(Duplicate)
        }
        (Stuck, UndoReplied { step, refusal: Some(why) }) if at.undone => {
            Decision::Move(not_undone(definition, at, *step, &format!("was refused: {why}")))
        }
        (Running | Resolving | Completed | Stuck, UndoReplied { .. }) => Decision::Ignore(Unexpected),

        // An undo that can't be sent undoes nothing. Replayed, it goes out, and its reply heals.
        (Compensated | Stuck, UndoParked { step, reason }) if at.undone && !at.refused_undos.contains(*step) => {
            Decision::Move(not_undone(definition, at, *step, &format!("can't be sent: {reason}")))
        }
        (Running | Resolving | Completed | Compensated | Stuck, UndoParked { .. }) => Decision::Ignore(Noted),

        // What the outbox says of the pending command.
        (Running, Published) => Decision::Move(waiting(at, Running, Deadline::AfterPublication)),
        (Stuck, Published) if !at.undone => Decision::Move(waiting(at, Running, Deadline::AfterPublication)),
        (Running, Parked { reason }) => Decision::Move(stuck(at, format!("command parked: {reason}"))),
        (Resolving | Completed | Compensated | Stuck, Published | Parked { .. }) => Decision::Ignore(Noted),

        // Silence.
        (Running | Resolving, Overdue { recourse: Recourse::Ask }) => {
            Decision::Move(waiting(at, Resolving, Deadline::WhileAsking))
        }
        (Running | Resolving, Overdue { recourse: Recourse::AssumeCompleted }) => {
            answered(definition, at, &Answer::Done, Evidence::Assumption)
        }
        (Running | Resolving, Overdue { recourse: Recourse::NeedsOperator }) => Decision::Move(stuck(
            at,
            "no reply in time, and no service is configured that could be asked (USER_SERVICE_GRPC_URL)".to_owned(),
        )),
        (Completed | Compensated | Stuck, Overdue { .. }) => Decision::Ignore(Noted),

        // The outcome of asking. Only whoever moved the saga to Resolving may bring it.
        (Resolving, Settled(settlement)) => match settlement {
            Settlement::AlreadyDone | Settlement::DoneNow => {
                answered(definition, at, &Answer::Done, Evidence::BackCheck)
            }
            Settlement::Refused(why) => answered(definition, at, &Answer::Refused(why.clone()), Evidence::BackCheck),
            Settlement::Ambiguous(why) => Decision::Move(stuck(at, why.clone())),
            Settlement::NoAnswer(_) => Decision::Move(waiting(at, Running, Deadline::BackOff)),
            Settlement::GaveUp(why) => {
                Decision::Move(stuck(at, format!("no reply, and nobody answered when asked: {why}")))
            }
        },
        (Running | Completed | Compensated | Stuck, Settled(_)) => Decision::Ignore(Late),
    }
}

fn answered(definition: &Definition, at: Position, answer: &Answer, evidence: Evidence) -> Decision {
    Decision::Move(match answer {
        Answer::Done if at.step + 1 < definition.steps.len() => Transition {
            step: at.step + 1,
            effects: vec![Effect::Command(at.step + 1)],
            ..waiting(at, Status::Running, Deadline::None)
        },
        Answer::Done => closed(at, Status::Completed, vec![Effect::CompleteLocally], evidence),
        Answer::Refused(_) => {
            // Newest first, the refused step included: its command may yet be carried out by
            // somebody who saw it late.
            let undo = (0..=at.step)
                .rev()
                .filter(|&step| matches!(definition.steps[step].undo, Undo::Command { .. }))
                .map(Effect::Undo);
            let effects = std::iter::once(Effect::CompensateLocally).chain(undo).collect();
            closed(at, Status::Compensated, effects, evidence)
        }
    })
}

fn not_undone(definition: &Definition, at: Position, step: usize, why: &str) -> Transition {
    let others = at.refused_undos.without(step).names(definition);
    let others = if others.is_empty() { String::new() } else { format!("; nor is {} undone", others.join(", ")) };
    let reason = format!("the undo of {} {why}{others}", definition.steps[step].name);
    Transition { refused_undos: at.refused_undos.with(step), ..stuck(at, reason) }
}

/// An undo came through while the saga is stuck in its undoing: it is healed by the last one it
/// waits for.
fn undone(definition: &Definition, at: Position, step: usize) -> Decision {
    let left = at.refused_undos.without(step);
    if left.is_empty() {
        Decision::Move(closed(at, Status::Compensated, vec![], Evidence::Reply))
    } else if left == at.refused_undos {
        Decision::Ignore(Ignored::Noted)
    } else {
        let reason = format!("not undone: {}", left.names(definition).join(", "));
        Decision::Move(Transition { refused_undos: left, ..stuck(at, reason) })
    }
}

fn waiting(at: Position, to: Status, deadline: Deadline) -> Transition {
    Transition {
        to,
        step: at.step,
        effects: vec![],
        evidence: None,
        stuck_reason: None,
        deadline,
        refused_undos: at.refused_undos,
    }
}

fn closed(at: Position, to: Status, effects: Vec<Effect>, evidence: Evidence) -> Transition {
    let refused_undos = StepSet::default();
    Transition { effects, evidence: Some(evidence), refused_undos, ..waiting(at, to, Deadline::None) }
}

fn stuck(at: Position, reason: String) -> Transition {
    Transition { stuck_reason: Some(reason), ..waiting(at, Status::Stuck, Deadline::None) }
}

#[cfg(test)]
mod tests;

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
    use Event::{Overdue, Parked, Published, Replied, Settled, UndoParked, UndoReplied};
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
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{
        definition::{Command, Step},
        flows::create_user::DEFINITION,
    };

    fn at(status: Status) -> Position {
        Position { status, step: 0, undone: status == Status::Compensated, refused_undos: StepSet::default() }
    }

    fn replied(answer: Answer) -> Event {
        Event::Replied { step: 0, answer }
    }

    fn undo_replied(step: usize, refusal: Option<&str>) -> Event {
        Event::UndoReplied { step, refusal: refusal.map(str::to_owned) }
    }

    fn after(at: Position, transition: &Transition) -> Position {
        Position {
            status: transition.to,
            step: transition.step,
            undone: at.undone || transition.to == Status::Compensated,
            refused_undos: transition.refused_undos,
        }
    }

    fn next(status: Status, event: Event) -> Decision {
        decide(&DEFINITION, at(status), &event)
    }

    #[test]
    fn a_refusal_takes_the_user_back_and_sends_the_undo_behind_it() {
        let Decision::Move(transition) = next(Status::Running, replied(Answer::Refused("taken".into()))) else {
            panic!("a refusal moves a running saga");
        };
        assert_eq!(transition.to, Status::Compensated);
        assert_eq!(transition.effects, [Effect::CompensateLocally, Effect::Undo(0)]);
        assert_eq!(transition.evidence, Some(Evidence::Reply));
    }

    #[test]
    fn a_forged_close_has_no_effect_on_a_completed_saga() {
        let refused = || replied(Answer::Refused("forged".into()));
        assert_eq!(next(Status::Completed, refused()), Decision::Ignore(Ignored::Late));
        assert_eq!(next(Status::Compensated, refused()), Decision::Ignore(Ignored::Duplicate));
    }

    #[test]
    fn replies_wait_while_the_other_service_is_asked() {
        assert_eq!(next(Status::Resolving, replied(Answer::Done)), Decision::Defer);
    }

    #[test]
    fn silence_alone_closes_nothing_when_somebody_can_be_asked() {
        let Decision::Move(transition) = next(Status::Running, Event::Overdue { recourse: Recourse::Ask }) else {
            panic!("silence is looked into");
        };
        assert_eq!((transition.to, transition.effects), (Status::Resolving, vec![]));
    }

    #[test]
    fn a_refused_undo_needs_a_person_until_it_is_undone_after_all() {
        let Decision::Move(stuck) = next(Status::Compensated, undo_replied(0, Some("no"))) else {
            panic!("a refused undo is not ignored");
        };
        assert_eq!(stuck.to, Status::Stuck);
        let undone = after(at(Status::Compensated), &stuck);
        assert_eq!(
            decide(&DEFINITION, undone, &replied(Answer::Done)),
            Decision::Ignore(Ignored::Late),
            "a user that is gone is not completed"
        );
        let Decision::Move(healed) = decide(&DEFINITION, undone, &undo_replied(0, None)) else {
            panic!("the undo came through");
        };
        assert_eq!(healed.to, Status::Compensated);
    }

    /// Two steps like the one of the real flow.
    const fn undoable(name: &'static str) -> Step {
        const NOTHING: Command = Command { topic: "t", payload: |data| data.clone() };
        let undo = Undo::Command { command: NOTHING, done: "t", refused: "t" };
        Step { name, command: NOTHING, done: "t", refused: "t", either: None, undo }
    }

    static TWO_STEPS: Definition =
        Definition { name: "two_steps", version: 1, steps: &[undoable("first"), undoable("second")] };

    #[test]
    fn the_undo_of_one_step_does_not_make_up_for_anothers() {
        let mut position = Position { step: 1, ..at(Status::Compensated) };
        let mut hear = |step, refusal: Option<&str>| {
            match decide(&TWO_STEPS, position, &undo_replied(step, refusal)) {
                Decision::Move(transition) => position = after(position, &transition),
                Decision::Ignore(_) => {}
                Decision::Defer => panic!("nobody is being asked"),
            }
            position.status
        };
        assert_eq!(hear(1, Some("no")), Status::Stuck);
        assert_eq!(hear(0, None), Status::Stuck, "the first is undone, the second is not");
        assert_eq!(hear(0, Some("no")), Status::Stuck, "and now the first is not either");
        assert_eq!(hear(1, None), Status::Stuck);
        assert_eq!(hear(0, None), Status::Compensated);
    }

    #[test]
    fn an_undo_that_was_never_sent_can_not_be_refused() {
        let refused = decide(&TWO_STEPS, at(Status::Compensated), &undo_replied(1, Some("what?")));
        assert_eq!(refused, Decision::Ignore(Ignored::Unexpected));
    }

    #[test]
    fn an_undo_that_cant_be_sent_needs_a_person_until_it_came_through() {
        let parked = Event::UndoParked { step: 0, reason: "too large".into() };
        let Decision::Move(stuck) = next(Status::Compensated, parked.clone()) else {
            panic!("nothing is undone yet");
        };
        assert_eq!(stuck.stuck_reason.as_deref(), Some("the undo of create_profile can't be sent: too large"));
        let position = after(at(Status::Compensated), &stuck);
        assert_eq!(decide(&DEFINITION, position, &parked), Decision::Ignore(Ignored::Noted), "said once");
        let Decision::Move(healed) = decide(&DEFINITION, position, &undo_replied(0, None)) else {
            panic!("it was replayed and carried out");
        };
        assert_eq!(healed.to, Status::Compensated);
        assert_eq!(next(Status::Completed, parked), Decision::Ignore(Ignored::Noted));
    }

    #[test]
    fn an_answer_that_comes_at_last_settles_a_stuck_saga() {
        let Decision::Move(transition) = next(Status::Stuck, replied(Answer::Done)) else {
            panic!("the answer it waited for");
        };
        assert_eq!(transition.to, Status::Completed);
    }

    fn any_event() -> impl Strategy<Value = Event> {
        let recourse = prop_oneof![Just(Recourse::Ask), Just(Recourse::AssumeCompleted), Just(Recourse::NeedsOperator)];
        let settlement = prop_oneof![
            Just(Settlement::AlreadyDone),
            Just(Settlement::DoneNow),
            Just(Settlement::Refused("r".into())),
            Just(Settlement::Ambiguous("a".into())),
            Just(Settlement::NoAnswer("n".into())),
            Just(Settlement::GaveUp("g".into())),
        ];
        prop_oneof![
            Just(replied(Answer::Done)),
            Just(replied(Answer::Refused("r".into()))),
            Just(undo_replied(0, None)),
            Just(undo_replied(0, Some("u"))),
            Just(Event::UndoParked { step: 0, reason: "p".into() }),
            Just(Event::Published),
            Just(Event::Parked { reason: "p".into() }),
            recourse.prop_map(|recourse| Event::Overdue { recourse }),
            settlement.prop_map(Event::Settled),
        ]
    }

    proptest! {
        /// Whatever comes in whatever order: the user is completed or taken back at most once and
        /// never both; and what is stored always satisfies the table's checks.
        #[test]
        fn a_saga_is_closed_once_and_one_way(events in proptest::collection::vec(any_event(), 1..60)) {
            let mut position = at(Status::Running);
            let (mut completed, mut compensated) = (0, 0);
            for event in events {
                let Decision::Move(transition) = decide(&DEFINITION, position, &event) else { continue };
                completed += transition.effects.iter().filter(|e| **e == Effect::CompleteLocally).count();
                compensated += transition.effects.iter().filter(|e| **e == Effect::CompensateLocally).count();
                prop_assert_eq!(transition.to == Status::Stuck, transition.stuck_reason.is_some());
                let closed = matches!(transition.to, Status::Completed | Status::Compensated);
                prop_assert_eq!(closed, transition.evidence.is_some());
                prop_assert_eq!(transition.to == Status::Resolving, transition.deadline == Deadline::WhileAsking);
                position = after(position, &transition);
            }
            prop_assert!(completed + compensated <= 1, "completed {} times, compensated {} times", completed, compensated);
        }
    }
}

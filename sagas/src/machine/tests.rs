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
fn a_refusal_that_may_be_older_than_the_saga_is_asked_about() {
    let doubted = |recourse| Event::Doubted { step: 0, recourse };
    let Decision::Move(asked) = next(Status::Running, doubted(Recourse::Ask)) else { panic!("it is asked about") };
    assert_eq!((asked.to, asked.deadline, asked.effects), (Status::Running, Deadline::Now, vec![]));
    for nobody in [Recourse::AssumeCompleted, Recourse::NeedsOperator] {
        let Decision::Move(stuck) = next(Status::Running, doubted(nobody)) else { panic!("a person is asked") };
        assert_eq!((stuck.to, stuck.effects), (Status::Stuck, vec![]));
    }
    assert_eq!(next(Status::Completed, doubted(Recourse::Ask)), Decision::Ignore(Ignored::Late));
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
        recourse.clone().prop_map(|recourse| Event::Doubted { step: 0, recourse }),
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

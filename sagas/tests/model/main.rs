//! The saga machine in every order of events there is, by breadth-first search.
//!
//! What is run is the real [`decide`] with the real definition of the create saga; around it stands a
//! world ([`world`]) that does whatever messages, calls and processes can do: a command may be
//! parked, come twice or late; a reply may be lost, doubled, late, in any order, or a forged close;
//! the deadline may pass at any moment after publication; who asks may die or be taken for dead, and
//! his call still arrive; nobody may answer.
//!
//! Two kinds of participants ([`participant`]): one as the contract asks for, with all of that; and a
//! forgetful one, for which order and patience are all there is. The second shows what the order of
//! a key and the deferring of replies are good for: with the first kind, the participant's own memory
//! would cover for them.
//!
//! A property that holds proves little before it is known what would break it: each rule that is
//! taken out ([`Broken`]) has to be missed by a named property.

mod participant;
mod world;

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::Mutex,
};

use participant::Kind;
use saga_orchestrator::{
    Definition, Recourse, Settlement, Status,
    definition::{Command, Step, Undo},
    flows::create_user,
    machine::{Answer, Decision, Effect, Event, Ignored, Position, decide},
};
use stateright::{Checker, HasDiscoveries, Model, Property};
use world::{Learnt, Message, Question, Reply, Says, User, World};

const RESTS_WELL: &str = "with luck from now on it comes to rest, and is what it says";
const CLOSED_ONCE: &str = "the user is completed or taken back, once";
const REOPENED: &str = "a completed saga stays completed";

/// The model, with nothing or one rule taken out.
struct Sagas {
    definition: &'static Definition,
    recourse: Recourse,
    participants: Kind,
    broken: Option<Broken>,
    /// What is known to come to rest.
    proven: Mutex<HashSet<u64>>,
}

/// A rule that is not kept, or something that is not promised.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// A passed deadline completes the saga.
    SilenceIsSuccess,
    /// What was commanded is not undone.
    NoUndo,
    /// A close is obeyed after completion.
    LateCloseCounts,
    /// Replies do not wait for the outcome of a question.
    RepliesDoNotWait,
    /// An undo that can't be sent is left at that.
    ParkedUndoIsNothing,
    /// An undo can be in Kafka before its command.
    OrderLost,
    /// The one reply nobody asks after is lost: that an undo was refused.
    UndoRefusalLost,
    /// Calls outlive their question, and the participant does not remember an erasure.
    CallsOutliveTheirQuestion,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Publish {
        index: usize,
    },
    Park,
    /// By an operator.
    Unpark,
    Handle {
        index: usize,
        willing: bool,
    },
    HandleAgain {
        step: usize,
        undo: bool,
    },
    /// By somebody at the participant's.
    UndoAfterAll {
        step: usize,
    },
    Receive {
        reply: Reply,
    },
    Lose {
        reply: Reply,
    },
    Forge,
    NotePublished,
    /// By a sweep that read long ago.
    NotePublishedLate,
    NoteParked,
    NoteUndoParked,
    Overdue,
    AskerDies,
    Look,
    Create {
        willing: bool,
        answer_lost: bool,
    },
    NoAnswer,
    AmbiguousAnswer,
    StrayCall {
        willing: bool,
    },
    Settle,
}

impl Sagas {
    fn new(definition: &'static Definition, recourse: Recourse, participants: Kind, broken: Option<Broken>) -> Self {
        Self { definition, recourse, participants, broken, proven: Mutex::default() }
    }

    fn decide(&self, at: Position, event: &Event) -> Decision {
        let running = Position { status: Status::Running, ..at };
        match (self.broken, at.status, event) {
            (Some(Broken::SilenceIsSuccess), _, Event::Overdue { .. }) => {
                decide(self.definition, running, &Event::Replied { step: at.step, answer: Answer::Done })
            }
            (Some(Broken::LateCloseCounts), Status::Completed, Event::Replied { answer: Answer::Refused(_), .. })
            | (Some(Broken::RepliesDoNotWait), Status::Resolving, Event::Replied { .. }) => {
                decide(self.definition, running, event)
            }
            (Some(Broken::ParkedUndoIsNothing), _, Event::UndoParked { .. }) => Decision::Ignore(Ignored::Noted),
            (Some(Broken::NoUndo), ..) => match decide(self.definition, at, event) {
                Decision::Move(mut transition) => {
                    transition.effects.retain(|effect| !matches!(effect, Effect::Undo(_)));
                    Decision::Move(transition)
                }
                other => other,
            },
            _ => decide(self.definition, at, event),
        }
    }

    fn is_thorough(&self) -> bool {
        self.participants == Kind::Thorough
    }

    /// Two or more steps make the world large enough without these.
    fn has_all_troubles(&self) -> bool {
        self.is_thorough() && self.definition.steps.len() == 1
    }

    /// Who deals with the forgetful does not give up a call before it has ended.
    fn let_go(&self, world: &mut World) {
        if !self.is_thorough() && self.broken != Some(Broken::CallsOutliveTheirQuestion) {
            world.stray_call = None;
        }
    }

    fn allows(&self, world: &World, action: &Action) -> bool {
        let saga = &world.saga;
        match action {
            Action::Publish { index } => match self.broken {
                Some(Broken::OrderLost) => *index < world.outbox.len(),
                _ => *index == 0 && !world.outbox.is_empty() && !world.parked,
            },
            Action::Park => self.has_all_troubles() && !world.parked && !world.outbox.is_empty(),
            Action::Unpark => world.parked,
            Action::Handle { index, .. } => *index < world.commands.len() && (self.is_thorough() || *index == 0),
            Action::HandleAgain { step, undo } => {
                let participant = &world.participants[*step];
                let decided = if *undo { participant.undone } else { participant.accepted };
                self.has_all_troubles() && decided.is_some()
            }
            Action::UndoAfterAll { step } => world.participants[*step].undone == Some(false),
            Action::Receive { reply } => world.replies.contains(reply),
            Action::Lose { reply } => {
                let may_be_lost = reply.says != Says::UndoRefused || self.broken == Some(Broken::UndoRefusalLost);
                world.replies.contains(reply) && may_be_lost
            }
            Action::Forge => self.definition.steps.len() == 1 && !world.forged,
            Action::NotePublished => match saga.status {
                Status::Running => !saga.deadline && world.command_is_out(),
                Status::Stuck => saga.command_parked && world.command_is_out(),
                _ => false,
            },
            Action::NotePublishedLate => self.has_all_troubles() && world.command_is_out(),
            Action::NoteParked => saga.status == Status::Running && !saga.deadline && world.command_is_parked(),
            Action::NoteUndoParked => {
                saga.undone && world.parked_undo().is_some_and(|step| !saga.refused_undos.contains(step))
            }
            Action::Overdue => match saga.status {
                Status::Running => saga.deadline,
                // Whoever asks is taken for dead. Who deals with the forgetful is given all the time he needs.
                Status::Resolving => self.is_thorough() || world.question.is_none(),
                _ => false,
            },
            Action::AskerDies => world.question.is_some(),
            Action::Look => world.question == Some(Question::Looking),
            Action::Create { .. } => world.question == Some(Question::Creating),
            Action::NoAnswer => matches!(world.question, Some(Question::Looking | Question::Creating)),
            Action::AmbiguousAnswer => {
                world.question == Some(Question::Creating) && world.participants[saga.step].exists
            }
            Action::StrayCall { .. } => world.stray_call.is_some(),
            Action::Settle => matches!(world.question, Some(Question::Answered(_))),
        }
    }

    /// What happens next if nothing more goes wrong, and no person does anything.
    fn lucky(&self, world: &World) -> Option<World> {
        let mut actions = vec![Action::Publish { index: 0 }, Action::Handle { index: 0, willing: true }];
        actions.extend(world.replies.iter().map(|&reply| Action::Receive { reply }));
        actions.extend([Action::StrayCall { willing: true }, Action::NotePublished, Action::NoteParked]);
        actions.push(Action::NoteUndoParked);
        actions.extend([Action::Look, Action::Create { willing: true, answer_lost: false }, Action::Settle]);
        // Last, and not while somebody is asking.
        actions.extend(world.question.is_none().then_some(Action::Overdue));
        actions.into_iter().find_map(|action| self.next_state(world, action))
    }

    fn ends_well(&self, world: &World) -> bool {
        let mut proven = self.proven.lock().expect("no check panics");
        let mut course = vec![];
        let mut at = world.clone();
        loop {
            let mut hasher = DefaultHasher::new();
            at.hash(&mut hasher);
            let here = hasher.finish();
            if proven.contains(&here) {
                break;
            }
            if course.contains(&here) {
                return false;
            }
            course.push(here);
            match self.lucky(&at) {
                Some(next) => at = next,
                None if at.rests_well(self.definition, self.recourse) => break,
                None => return false,
            }
        }
        proven.extend(course);
        true
    }
}

impl Model for Sagas {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        vec![World::new(self.definition)]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        actions.extend((0..world.outbox.len()).map(|index| Action::Publish { index }));
        for index in 0..world.commands.len() {
            actions.extend([true, false].map(|willing| Action::Handle { index, willing }));
        }
        for step in 0..world.participants.len() {
            actions.extend([false, true].map(|undo| Action::HandleAgain { step, undo }));
            actions.push(Action::UndoAfterAll { step });
        }
        for &reply in &world.replies {
            actions.extend([Action::Receive { reply }, Action::Lose { reply }]);
        }
        actions.extend([Action::Park, Action::Unpark, Action::Forge]);
        actions.extend([Action::NotePublished, Action::NotePublishedLate, Action::NoteParked]);
        actions.push(Action::NoteUndoParked);
        actions.extend([Action::Overdue, Action::AskerDies, Action::Look, Action::NoAnswer, Action::AmbiguousAnswer]);
        for willing in [true, false] {
            actions.extend([false, true].map(|answer_lost| Action::Create { willing, answer_lost }));
            actions.push(Action::StrayCall { willing });
        }
        actions.push(Action::Settle);
    }

    fn next_state(&self, world: &World, action: Action) -> Option<World> {
        if !self.allows(world, &action) {
            return None;
        }
        let mut next = world.clone();
        let step = world.saga.step;
        let decide = |at: Position, event: &Event| self.decide(at, event);
        match action {
            Action::Publish { index } => {
                let message = next.outbox.remove(index);
                next.commands.push(message);
            }
            Action::Park => next.parked = true,
            Action::Unpark => next.parked = false,
            Action::Handle { index, willing } => {
                let message = next.commands.remove(index);
                next.handle(self.participants, message, willing, false);
            }
            Action::HandleAgain { step, undo } => next.handle(self.participants, Message { step, undo }, true, true),
            Action::UndoAfterAll { step } => {
                next.participants[step].undo_after_all();
                next.send_reply(Reply { step, says: Says::Undone, copy: true });
            }
            Action::Receive { reply } => {
                next.replies.remove(&reply);
                next.inbox.insert(reply);
                next.receive(decide, reply);
            }
            Action::Lose { reply } => {
                next.replies.remove(&reply);
            }
            Action::Forge => {
                next.forged = true;
                next.send_reply(Reply { step: 0, says: Says::Refused, copy: true });
            }
            Action::NotePublished | Action::NotePublishedLate => next.take_in(decide, &Event::Published),
            Action::NoteParked => next.take_in(decide, &Event::Parked { reason: String::new() }),
            Action::NoteUndoParked => {
                let step = next.parked_undo()?;
                next.take_in(decide, &Event::UndoParked { step, reason: String::new() });
            }
            Action::Overdue => {
                next.take_in(decide, &Event::Overdue { recourse: self.recourse });
                next.question = (next.saga.status == Status::Resolving).then_some(Question::Looking);
            }
            Action::AskerDies => {
                next.question_is_over();
                self.let_go(&mut next);
            }
            Action::Look if next.participants[step].exists => {
                next.question = Some(Question::Answered(Learnt::AlreadyDone));
            }
            Action::Look => next.question = Some(Question::Creating),
            Action::Create { willing, answer_lost } => {
                let done = next.participants[step].carry_out(self.participants, willing);
                let learnt = if done { Learnt::DoneNow } else { Learnt::Refused };
                next.question = Some(Question::Answered(if answer_lost { Learnt::Nothing } else { learnt }));
            }
            Action::NoAnswer => {
                next.question_is_over();
                self.let_go(&mut next);
                next.question = Some(Question::Answered(Learnt::Nothing));
            }
            Action::AmbiguousAnswer => next.question = Some(Question::Answered(Learnt::Ambiguous)),
            Action::StrayCall { willing } => {
                let step = next.stray_call.take()?;
                next.participants[step].carry_out(self.participants, willing);
            }
            Action::Settle => {
                let Some(Question::Answered(learnt)) = next.question.take() else { return None };
                let settlement: Settlement = learnt.settlement(next.saga.questions);
                next.take_in(decide, &Event::Settled(settlement));
                for reply in std::mem::take(&mut next.deferred) {
                    next.receive(decide, reply);
                }
            }
        }
        (next != *world).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always(RESTS_WELL, |model: &Self, world: &World| model.ends_well(world)),
            Property::always(CLOSED_ONCE, |_, world: &World| world.alarms.closed_locally <= 1),
            Property::always(REOPENED, |_, world: &World| !world.alarms.reopened),
            Property::always("the user is what the saga says", |_, world: &World| match world.user {
                User::Active => world.saga.status == Status::Completed,
                User::Gone => world.saga.undone && matches!(world.saga.status, Status::Compensated | Status::Stuck),
                User::Pending => !matches!(world.saga.status, Status::Completed | Status::Compensated),
            }),
            Property::always("the user is there to be completed or taken back", |_, world: &World| {
                !world.alarms.impossible
            }),
            Property::always("it is stuck for a reason only", |_, world: &World| !world.alarms.stuck_without_reason),
            Property::always("a reply moves the saga once", |_, world: &World| !world.alarms.replied_twice),
            Property::sometimes("completed", |_, world: &World| world.saga.status == Status::Completed),
            Property::sometimes("compensated", |_, world: &World| world.saga.status == Status::Compensated),
            Property::sometimes("stuck in its undoing", |_, world: &World| {
                world.saga.status == Status::Stuck && world.saga.undone
            }),
            Property::sometimes("done for a user that is gone", |_, world: &World| {
                world.user == User::Gone && world.participants.iter().any(|participant| participant.exists)
            }),
        ]
    }
}

/// Three steps, the one in the middle with nothing to undo.
static THREE_STEPS: Definition = Definition {
    name: "three_steps",
    version: 1,
    steps: &[step_with_undo("first"), STEP_WITHOUT_UNDO, step_with_undo("third")],
};

const STEP_WITHOUT_UNDO: Step =
    Step { undo: Undo::Nothing { because: "it only tells somebody" }, ..step_with_undo("second") };

const fn step_with_undo(name: &'static str) -> Step {
    Step {
        name,
        command: Command { topic: "do", payload: Clone::clone },
        done: "done",
        refused: "refused",
        either: None,
        undo: Undo::Command {
            command: Command { topic: "undo", payload: Clone::clone },
            done: "undone",
            refused: "undo refused",
        },
    }
}

/// Keeps every promise, in at least so many states.
fn holds(model: Sagas, states: usize) {
    let name = format!("{}, {:?}, {:?}", model.definition.name, model.recourse, model.participants);
    let checked = model.checker().spawn_bfs().join();
    eprintln!("{name}: {} states, {} deep", checked.unique_state_count(), checked.max_depth());
    checked.assert_properties();
    assert!(checked.unique_state_count() >= states, "{} states are too few", checked.unique_state_count());
}

/// What is missed when a rule is taken out.
fn falls(participants: Kind, broken: Broken, property: &'static str) {
    let model = Sagas::new(&create_user::DEFINITION, Recourse::Ask, participants, Some(broken));
    let checked = model.checker().finish_when(HasDiscoveries::AllOf([property].into())).spawn_bfs().join();
    let path = checked.assert_any_discovery(property);
    eprintln!("{broken:?}: {:?}", path.into_actions());
}

#[test]
fn a_registration_comes_to_rest_in_any_order_of_events() {
    holds(Sagas::new(&create_user::DEFINITION, Recourse::Ask, Kind::Thorough, None), 10_000);
}

#[test]
fn and_where_nobody_can_be_asked() {
    for recourse in [Recourse::AssumeCompleted, Recourse::NeedsOperator] {
        holds(Sagas::new(&create_user::DEFINITION, recourse, Kind::Thorough, None), 500);
    }
}

#[test]
fn and_with_a_participant_that_forgets() {
    holds(Sagas::new(&create_user::DEFINITION, Recourse::Ask, Kind::Forgetful, None), 1_000);
}

#[test]
fn and_with_three_steps() {
    holds(Sagas::new(&THREE_STEPS, Recourse::Ask, Kind::Thorough, None), 10_000);
}

#[test]
fn silence_taken_for_success_leaves_a_user_without_a_profile() {
    falls(Kind::Thorough, Broken::SilenceIsSuccess, RESTS_WELL);
}

#[test]
fn without_the_undo_a_profile_is_left_behind() {
    falls(Kind::Thorough, Broken::NoUndo, RESTS_WELL);
}

#[test]
fn a_late_close_that_counts_reopens_what_is_completed() {
    falls(Kind::Thorough, Broken::LateCloseCounts, REOPENED);
}

#[test]
fn replies_that_do_not_wait_leave_a_profile_behind_that_the_question_made() {
    falls(Kind::Forgetful, Broken::RepliesDoNotWait, RESTS_WELL);
}

#[test]
fn an_undo_that_cant_be_sent_and_goes_unnoticed_leaves_a_profile_behind() {
    falls(Kind::Thorough, Broken::ParkedUndoIsNothing, RESTS_WELL);
}

/// Not promised: silence about an undo is not looked into.
#[test]
fn a_refused_undo_whose_answer_is_lost_is_not_noticed() {
    falls(Kind::Thorough, Broken::UndoRefusalLost, RESTS_WELL);
}

/// Not promised: what a participant has to remember itself.
#[test]
fn a_late_call_raises_the_dead_where_erasures_are_forgotten() {
    falls(Kind::Forgetful, Broken::CallsOutliveTheirQuestion, RESTS_WELL);
}

#[test]
fn an_undo_before_its_command_leaves_a_profile_behind() {
    falls(Kind::Forgetful, Broken::OrderLost, RESTS_WELL);
}

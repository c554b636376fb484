//! One saga, its user, its outbox, its participants, and everything on the way between them.

use std::collections::BTreeSet;

use saga_orchestrator::{
    Definition, Recourse, Settlement, Status,
    definition::Undo,
    machine::{Answer, Deadline, Decision, Effect, Event, Position, StepSet, Transition},
    state::Evidence,
};

use crate::participant::{Kind, Participant};

/// After so many questions nobody answered, the saga is stuck.
pub const QUESTIONS: u8 = 2;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct World {
    pub saga: Saga,
    pub user: User,
    /// Not in Kafka yet, in order of the key.
    pub outbox: Vec<Message>,
    /// The outbox's first is parked, and everything waits behind it.
    pub parked: bool,
    /// In Kafka, not taken yet.
    pub commands: Vec<Message>,
    pub participants: Vec<Participant>,
    /// In Kafka, not taken yet. Any of them may be lost.
    pub replies: BTreeSet<Reply>,
    /// What was taken before: a message's own id is in the inbox.
    pub inbox: BTreeSet<Reply>,
    /// Replies that wait for the outcome of the question, in the order they came.
    pub deferred: Vec<Reply>,
    /// The question under way whose outcome still counts: nothing has happened to the saga since.
    pub question: Option<Question>,
    /// A call of a question that does not count any more may still arrive at this step's participant.
    pub stray_call: Option<usize>,
    pub forged: bool,
    pub alarms: Alarms,
}

/// `saga_state`, as far as decisions depend on it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Saga {
    pub status: Status,
    pub step: usize,
    pub undone: bool,
    pub refused_undos: StepSet,
    pub deadline: bool,
    pub questions: u8,
    pub assumed: bool,
    pub command_parked: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum User {
    Pending,
    Active,
    Gone,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Message {
    pub step: usize,
    pub undo: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Reply {
    pub step: usize,
    pub says: Says,
    /// The same once more, under another message id.
    pub copy: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Says {
    Done,
    Refused,
    Undone,
    UndoRefused,
}

/// `GetUser`, then `CreateUser`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Question {
    Looking,
    Creating,
    Answered(Learnt),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Learnt {
    AlreadyDone,
    DoneNow,
    Refused,
    Ambiguous,
    Nothing,
}

/// What must never happen on the way, noted when it does.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub struct Alarms {
    /// The user was completed or taken back so often.
    pub closed_locally: u8,
    /// The user was not there to be completed or taken back.
    pub impossible: bool,
    pub reopened: bool,
    pub replied_twice: bool,
    pub stuck_without_reason: bool,
    /// Replies that have moved the saga.
    pub effective: BTreeSet<(usize, Says)>,
}

impl Saga {
    fn position(&self) -> Position {
        let Saga { status, step, undone, refused_undos, .. } = *self;
        Position { status, step, undone, refused_undos }
    }
}

impl World {
    /// Right after the registration's commit.
    pub fn new(definition: &Definition) -> Self {
        Self {
            saga: Saga {
                status: Status::Running,
                step: 0,
                undone: false,
                refused_undos: StepSet::default(),
                deadline: false,
                questions: 0,
                assumed: false,
                command_parked: false,
            },
            user: User::Pending,
            outbox: vec![Message { step: 0, undo: false }],
            parked: false,
            commands: vec![],
            participants: vec![Participant::default(); definition.steps.len()],
            replies: BTreeSet::new(),
            inbox: BTreeSet::new(),
            deferred: vec![],
            question: None,
            stray_call: None,
            forged: false,
            alarms: Alarms::default(),
        }
    }

    /// The command whose answer is awaited.
    fn command(&self) -> Message {
        Message { step: self.saga.step, undo: false }
    }

    pub fn command_is_out(&self) -> bool {
        !self.outbox.contains(&self.command())
    }

    /// The step whose undo command is what is parked.
    pub fn parked_undo(&self) -> Option<usize> {
        self.outbox.first().filter(|first| self.parked && first.undo).map(|first| first.step)
    }

    pub fn command_is_parked(&self) -> bool {
        self.parked && self.outbox.first() == Some(&self.command())
    }

    /// `Orchestrator::take_in` with `carry_out`.
    pub fn take_in(&mut self, decide: impl Fn(Position, &Event) -> Decision, event: &Event) {
        match decide(self.saga.position(), event) {
            Decision::Defer => {}
            Decision::Ignore(_) => self.question_is_over(),
            Decision::Move(transition) => {
                self.question_is_over();
                self.sound_alarms(&transition, event);
                self.carry_out(transition);
            }
        }
    }

    /// `Orchestrator::receive`, and `take_up_deferred` where the reply has waited.
    pub fn receive(&mut self, decide: impl Fn(Position, &Event) -> Decision, reply: Reply) {
        let event = reply.event();
        match decide(self.saga.position(), &event) {
            Decision::Defer => self.deferred.push(reply),
            _ => self.take_in(decide, &event),
        }
    }

    /// The saga's revision has gone on: who asks finds that his outcome does not count any more, but
    /// what he has sent may still arrive.
    pub fn question_is_over(&mut self) {
        let question = self.question.take();
        if matches!(question, Some(Question::Looking | Question::Creating)) {
            self.stray_call = Some(self.saga.step);
        }
    }

    fn carry_out(&mut self, transition: Transition) {
        let mut to = transition.to;
        for effect in transition.effects {
            let message = match effect {
                Effect::CompleteLocally | Effect::CompensateLocally if self.user != User::Pending => {
                    self.alarms.impossible = true;
                    to = Status::Stuck;
                    break;
                }
                Effect::CompleteLocally => {
                    self.user = User::Active;
                    self.alarms.closed_locally += 1;
                    continue;
                }
                Effect::CompensateLocally => {
                    self.user = User::Gone;
                    self.alarms.closed_locally += 1;
                    continue;
                }
                Effect::Command(step) => Message { step, undo: false },
                Effect::Undo(step) => Message { step, undo: true },
            };
            self.outbox.push(message);
        }
        self.saga = Saga {
            status: to,
            step: transition.step,
            undone: self.saga.undone || to == Status::Compensated,
            refused_undos: transition.refused_undos,
            deadline: matches!(transition.deadline, Deadline::AfterPublication | Deadline::Now | Deadline::BackOff),
            questions: match transition.deadline {
                Deadline::BackOff => self.saga.questions + 1,
                Deadline::AfterPublication => 0,
                Deadline::None | Deadline::Now | Deadline::WhileAsking => self.saga.questions,
            },
            assumed: transition.evidence == Some(Evidence::Assumption),
            command_parked: to == Status::Stuck && self.command_is_parked(),
        };
    }

    fn sound_alarms(&mut self, transition: &Transition, event: &Event) {
        let reason = matches!(
            event,
            Event::UndoReplied { refusal: Some(_), .. }
                | Event::Parked { .. }
                | Event::UndoParked { .. }
                | Event::Overdue { recourse: Recourse::NeedsOperator }
                | Event::Settled(Settlement::Ambiguous(_) | Settlement::GaveUp(_))
        );
        let alarms = &mut self.alarms;
        let new = transition.to == Status::Stuck && self.saga.status != Status::Stuck;
        alarms.stuck_without_reason |= new && !reason;
        alarms.reopened |= self.saga.status == Status::Completed;
        let reply = match event {
            Event::Replied { step, answer: Answer::Done } => Some((*step, Says::Done)),
            Event::Replied { step, answer: Answer::Refused(_) } => Some((*step, Says::Refused)),
            _ => None,
        };
        alarms.replied_twice |= reply.is_some_and(|reply| !alarms.effective.insert(reply));
    }

    /// What has to be true when nothing more happens by itself.
    pub fn rests_well(&self, definition: &Definition, recourse: Recourse) -> bool {
        let undoable = |step: usize| matches!(definition.steps[step].undo, Undo::Command { .. });
        let left = (0..self.participants.len()).any(|step| undoable(step) && self.participants[step].exists);
        let assumed = self.saga.assumed && recourse == Recourse::AssumeCompleted;
        let rests = match self.saga.status {
            Status::Completed => {
                self.user == User::Active && (assumed || self.participants.iter().all(|made| made.exists))
            }
            Status::Compensated => self.user == User::Gone && !left,
            // Perhaps somebody has seen to it meanwhile, and said so to nobody.
            Status::Stuck if self.saga.undone => self.user == User::Gone,
            Status::Stuck => self.user == User::Pending,
            Status::Running | Status::Resolving => false,
        };
        rests && self.deferred.is_empty()
    }

    /// A participant has handled a message of ours, the first time or once more.
    pub fn handle(&mut self, kind: Kind, message: Message, willing: bool, copy: bool) {
        let Message { step, undo } = message;
        let participant = &mut self.participants[step];
        let says = match undo {
            false if participant.carry_out(kind, willing) => Says::Done,
            false => Says::Refused,
            true if participant.undo(kind, willing) => Says::Undone,
            true => Says::UndoRefused,
        };
        self.send_reply(Reply { step, says, copy });
    }

    pub fn send_reply(&mut self, reply: Reply) {
        if !self.inbox.contains(&reply) {
            self.replies.insert(reply);
        }
    }
}

impl Reply {
    fn event(self) -> Event {
        let why = String::new;
        match self.says {
            Says::Done => Event::Replied { step: self.step, answer: Answer::Done },
            Says::Refused => Event::Replied { step: self.step, answer: Answer::Refused(why()) },
            Says::Undone => Event::UndoReplied { step: self.step, refusal: None },
            Says::UndoRefused => Event::UndoReplied { step: self.step, refusal: Some(why()) },
        }
    }
}

impl Learnt {
    /// As the deadline's round has it: the last vain question says so.
    pub fn settlement(self, asked_before: u8) -> Settlement {
        let why = String::new;
        match self {
            Learnt::AlreadyDone => Settlement::AlreadyDone,
            Learnt::DoneNow => Settlement::DoneNow,
            Learnt::Refused => Settlement::Refused(why()),
            Learnt::Ambiguous => Settlement::Ambiguous(why()),
            Learnt::Nothing if asked_before + 1 >= QUESTIONS => Settlement::GaveUp(why()),
            Learnt::Nothing => Settlement::NoAnswer(why()),
        }
    }
}

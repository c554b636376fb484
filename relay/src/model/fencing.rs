//! Fencing at the broker: what it adds to [`takeover`](super::takeover) that each lane group is sent
//! by a transactional producer, and in which order an owner has to go about it.
//!
//! **Take** the lane (a new term), **fence** (`init_transactions`: the broker aborts what is open
//! and refuses everything of older producers from then on), only then **ask** the database whether
//! the term still stands, and produce: begin, sends, commit. Consumers read what is committed; the
//! archive comes after the commit. Whatever fails, a commit without an answer included, is settled by
//! fencing anew and reading the outbox again.
//!
//! Why the order matters: fencing says nothing about who is right. A relay that was frozen before it
//! fences, fences its successor when it thaws. Having asked *before*, it would go on under its old
//! term; asking *after*, it learns that it is over, and the successor fences back.
//!
//! As in the other model, a lease may run out at any moment, requests arrive late or never, and a
//! relay is frozen by simply not being the next to act. An `init_transactions` of somebody dead or
//! frozen may arrive at any time ([`Action::StrayFence`]). What an older producer has on the way is
//! forgotten when a new one has fenced: the broker refuses it. The broker's two phases of a commit
//! are one here: `init_transactions` waits until a commit that has begun is through.
//!
//! The real relay keeps its fence while its lanes are elsewhere for a time, where the model raises one at
//! every taking: whoever had the lanes and sent anything has raised its own, and what is sent behind the
//! old one is refused, which is the model's failed send.
//!
//! Terms are numbers here and bounded, since what is at stake is which is the older.

mod broker;

use broker::{Broker, ROWS, Request, Rows};
use stateright::{Checker, HasDiscoveries, Model, Property};

use super::Proven;

const RELAYS: usize = 2;
const LAST_TERM: u8 = 3;

/// The model, with nothing or one rule taken out.
struct Fencing {
    broken: Option<Broken>,
    proven: Proven,
}

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// No transactions at all: the relay of the other model. No fault, but what the mode is for.
    Unfenced,
    /// The database is asked before the broker fences, not after.
    AskedTooEarly,
    /// Archived when written, before the commit.
    ArchivedBeforeCommit,
    /// A commit without an answer is taken for done.
    SilenceIsCommit,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    database: Database,
    broker: Broker,
    relays: [Relay; RELAYS],
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Database {
    term: u8,
    owner: Option<usize>,
    archived: Rows,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Relay {
    term: u8,
    stage: Stage,
    in_flight: Option<u8>,
    /// Acknowledged, not committed.
    written: Rows,
    committing: bool,
    /// The commit happened, and the answer is on its way.
    answered: bool,
    /// Committed as far as it knows, not archived.
    sent: Rows,
}

/// How far a relay has got with a term.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
enum Stage {
    #[default]
    Outside,
    Taken,
    Fenced,
    /// Asked first, fences next: the wrong order.
    Asked,
    AtWork,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    LeaseRunsOut,
    KeeperTicks {
        relay: usize,
    },
    Fence {
        relay: usize,
    },
    StrayFence,
    Ask {
        relay: usize,
    },
    Send {
        relay: usize,
    },
    Arrives {
        request: Request,
    },
    Acknowledged {
        relay: usize,
    },
    Commit {
        relay: usize,
    },
    CommitAnswered {
        relay: usize,
    },
    /// Refused, timed out, or answered by nobody.
    Fails {
        relay: usize,
    },
    Archive {
        relay: usize,
        answer_lost: bool,
    },
    Crash {
        relay: usize,
    },
}

impl Database {
    fn owned_by(&self, relay: usize, term: u8) -> bool {
        self.owner == Some(relay) && self.term == term
    }
}

impl Relay {
    /// Back to the beginning of its term, with nothing in memory but what is to be archived.
    fn start_over(&mut self) {
        *self = Relay { term: self.term, stage: Stage::Taken, sent: self.sent, ..Relay::default() };
    }
}

impl Fencing {
    fn new(broken: Option<Broken>) -> Self {
        Self { broken, proven: Proven::default() }
    }

    fn unfenced(&self) -> bool {
        self.broken == Some(Broken::Unfenced)
    }

    /// The next row of the outbox that is not in the batch.
    fn next_row(state: &State, relay: usize) -> Option<u8> {
        let Relay { written, sent, .. } = state.relays[relay];
        (1..=ROWS).find(|&row| !state.database.archived.has(row) && !written.has(row) && !sent.has(row))
    }

    /// The broker has the row this relay has in flight, and its answer can still reach it.
    fn has_row_of(&self, state: &State, relay: usize) -> bool {
        let Some(row) = state.relays[relay].in_flight else { return false };
        match self.unfenced() {
            true => state.broker.visible.has(row),
            false => state.broker.producer == Some(relay) && state.broker.open.is_some_and(|open| open.rows.has(row)),
        }
    }

    fn allows(&self, state: &State, action: &Action) -> bool {
        let State { database, broker, relays } = state;
        let at_work = |relay: usize| relays[relay].stage == Stage::AtWork;
        let idle = |relay: usize| at_work(relay) && relays[relay].in_flight.is_none() && !relays[relay].committing;
        match *action {
            Action::LeaseRunsOut => database.owner.is_some(),
            Action::KeeperTicks { relay } => match database.owner {
                None => true,
                Some(owner) if owner == relay => relays[relay].term != database.term,
                Some(_) => relays[relay] != Relay::default(),
            },
            Action::Fence { relay } => match self.broken {
                Some(Broken::AskedTooEarly) => relays[relay].stage == Stage::Asked,
                _ => relays[relay].stage == Stage::Taken,
            },
            Action::Ask { relay } => match self.broken {
                Some(Broken::AskedTooEarly) => relays[relay].stage == Stage::Taken,
                _ => relays[relay].stage == Stage::Fenced,
            },
            Action::StrayFence => !self.unfenced(),
            Action::Send { relay } => idle(relay) && Self::next_row(state, relay).is_some(),
            Action::Arrives { request } => broker.on_the_way.contains(&request),
            Action::Acknowledged { relay } => self.has_row_of(state, relay),
            Action::Commit { relay } => idle(relay) && !relays[relay].written.is_empty(),
            Action::CommitAnswered { relay } => relays[relay].answered,
            Action::Fails { relay } => {
                at_work(relay) && (relays[relay].in_flight.is_some() || relays[relay].committing)
            }
            Action::Archive { relay, .. } => {
                let early = self.broken == Some(Broken::ArchivedBeforeCommit) && !relays[relay].written.is_empty();
                early || !relays[relay].sent.is_empty()
            }
            Action::Crash { relay } => relays[relay] != Relay::default(),
        }
    }

    /// What happens next if nothing more goes wrong.
    fn lucky(&self, state: &State) -> Option<State> {
        let mut actions: Vec<Action> = (0..RELAYS).map(|relay| Action::KeeperTicks { relay }).collect();
        actions.extend(state.broker.on_the_way.iter().map(|&request| Action::Arrives { request }));
        for relay in 0..RELAYS {
            actions.extend([Action::Acknowledged { relay }, Action::CommitAnswered { relay }]);
            actions.push(Action::Archive { relay, answer_lost: false });
            // With nothing on the way any more, no answer means that there was a refusal.
            actions.push(Action::Fails { relay });
            actions.extend([Action::Fence { relay }, Action::Ask { relay }]);
            actions.extend([Action::Send { relay }, Action::Commit { relay }]);
        }
        actions.into_iter().find_map(|action| self.next_state(state, action))
    }
}

impl Model for Fencing {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        vec![State { database: Database::default(), broker: Broker::default(), relays: Default::default() }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.extend([Action::LeaseRunsOut, Action::StrayFence]);
        actions.extend(state.broker.on_the_way.iter().map(|&request| Action::Arrives { request }));
        for relay in 0..RELAYS {
            if state.database.term < LAST_TERM || state.database.owner.is_some() {
                actions.push(Action::KeeperTicks { relay });
            }
            actions.extend([Action::Fence { relay }, Action::Ask { relay }]);
            actions.extend([Action::Send { relay }, Action::Acknowledged { relay }]);
            actions.extend([Action::Commit { relay }, Action::CommitAnswered { relay }]);
            actions.extend([false, true].map(|answer_lost| Action::Archive { relay, answer_lost }));
            actions.extend([Action::Fails { relay }, Action::Crash { relay }]);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        if !self.allows(state, &action) {
            return None;
        }
        let mut next = state.clone();
        let State { database, broker, relays } = &mut next;
        match action {
            Action::LeaseRunsOut => database.owner = None,
            Action::KeeperTicks { relay } => {
                if database.owner.is_none() {
                    database.owner = Some(relay);
                    database.term += 1;
                }
                relays[relay] = Relay::default();
                if database.owner == Some(relay) {
                    relays[relay].term = database.term;
                    relays[relay].stage = if self.unfenced() { Stage::AtWork } else { Stage::Taken };
                }
            }
            Action::Fence { relay } => {
                broker.fenced_by(Some(relay));
                let asked = relays[relay].stage == Stage::Asked;
                relays[relay].stage = if asked { Stage::AtWork } else { Stage::Fenced };
            }
            Action::StrayFence => broker.fenced_by(None),
            Action::Ask { relay } => {
                let stands = database.owned_by(relay, relays[relay].term);
                relays[relay].stage = match (stands, relays[relay].stage) {
                    (true, Stage::Fenced) => Stage::AtWork,
                    (true, _) => Stage::Asked,
                    (false, _) => Stage::Outside,
                };
            }
            Action::Send { relay } => {
                let row = Self::next_row(state, relay)?;
                let Relay { term, in_flight, .. } = &mut relays[relay];
                *in_flight = Some(row);
                // What an older producer sends is refused when it arrives.
                if self.unfenced() || broker.producer == Some(relay) {
                    broker.takes(Request::Produce { relay, term: *term, row });
                }
            }
            Action::Arrives { request } => {
                broker.on_the_way.retain(|other| *other != request);
                match request {
                    Request::Produce { term, row, .. } if self.unfenced() => {
                        let mut rows = Rows::default();
                        rows.add(row);
                        broker.publish(term, rows, database.archived);
                    }
                    Request::Produce { term, row, .. } => broker.write(term, row),
                    Request::Commit { relay, term } => {
                        if let Some(open) = broker.open.take() {
                            broker.publish(open.term, open.rows, database.archived);
                        }
                        let sender = &mut relays[relay];
                        sender.answered = sender.committing && sender.term == term;
                    }
                }
            }
            Action::Acknowledged { relay } => {
                let relay = &mut relays[relay];
                let row = relay.in_flight.take()?;
                let done = if self.unfenced() { &mut relay.sent } else { &mut relay.written };
                done.add(row);
            }
            Action::Commit { relay } => {
                relays[relay].committing = true;
                if broker.producer == Some(relay) {
                    broker.takes(Request::Commit { relay, term: relays[relay].term });
                }
            }
            Action::CommitAnswered { relay } => {
                let relay = &mut relays[relay];
                relay.sent = std::mem::take(&mut relay.written);
                (relay.committing, relay.answered) = (false, false);
            }
            Action::Fails { relay } => {
                let relay = &mut relays[relay];
                if relay.committing && self.broken == Some(Broken::SilenceIsCommit) {
                    relay.sent = std::mem::take(&mut relay.written);
                }
                relay.start_over();
                if self.unfenced() {
                    relay.stage = Stage::AtWork;
                }
            }
            Action::Archive { relay, answer_lost } => {
                let worker = &mut relays[relay];
                let owned = database.owned_by(relay, worker.term);
                let mut rows = worker.sent;
                if self.broken == Some(Broken::ArchivedBeforeCommit) {
                    rows.0 |= worker.written.0;
                }
                if owned {
                    database.archived.0 |= rows.0;
                }
                match (owned, answer_lost) {
                    (_, true) => {}
                    (true, false) => worker.sent = Rows::default(),
                    (false, false) => *worker = Relay::default(),
                }
            }
            Action::Crash { relay } => {
                relays[relay] = Relay::default();
                database.owner = database.owner.filter(|&owner| owner != relay);
                broker.producer = broker.producer.filter(|&producer| producer != relay);
            }
        }
        (next != *state).then_some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no zombie copies: nothing becomes visible under a term older than the newest", {
                |_, state: &State| !state.broker.zombie
            }),
            Property::always("what is archived never becomes visible again", |_, state: &State| {
                !state.broker.copy_of_archived
            }),
            Property::always("first occurrences are in order, without a gap", |_, state: &State| {
                !state.broker.out_of_order
            }),
            Property::always("what left the outbox is visible", |_, state: &State| {
                (1..=ROWS).all(|row| !state.database.archived.has(row) || state.broker.visible.has(row))
            }),
            Property::always("with luck from now on, everything gets out", |model: &Self, state: &State| {
                model.proven.ends_well(state, |state| model.lucky(state), |state| state.database.archived.all())
            }),
            Property::sometimes("a commit is on the way when the lane has another owner", |_, state: &State| {
                let overtaken = |request: &Request| match request {
                    Request::Commit { term, .. } => *term < state.database.term,
                    Request::Produce { .. } => false,
                };
                state.broker.on_the_way.iter().any(overtaken)
            }),
            Property::sometimes("a relay that is over fences its successor", |_, state: &State| {
                let over = |relay: usize| {
                    state.relays[relay].term < state.broker.newest && state.relays[relay].stage == Stage::Fenced
                };
                state.broker.producer.is_some_and(over)
            }),
            Property::sometimes("what is visible is written again", |_, state: &State| {
                state
                    .broker
                    .open
                    .is_some_and(|open| (1..=ROWS).any(|r| open.rows.has(r) && state.broker.visible.has(r)))
            }),
            Property::sometimes("everything is out", |_, state: &State| state.database.archived.all()),
        ]
    }
}

#[test]
fn fenced_relays_leave_no_zombie_copies_in_any_order_of_events() {
    let checked = Fencing::new(None).checker().spawn_bfs().join();
    eprintln!("fencing: {} states, {} deep", checked.unique_state_count(), checked.max_depth());
    checked.assert_properties();
    assert!(checked.unique_state_count() > 10_000, "{} states are too few", checked.unique_state_count());
}

/// What falls when a rule is taken out.
fn falls(broken: Broken, property: &'static str) {
    let wanted = HasDiscoveries::AllOf([property].into());
    let checked = Fencing::new(Some(broken)).checker().finish_when(wanted).spawn_bfs().join();
    let path = checked.assert_any_discovery(property);
    eprintln!("{broken:?}: {:?}", path.into_actions());
}

#[test]
fn unfenced_a_frozen_owner_publishes_after_its_successor() {
    falls(Broken::Unfenced, "no zombie copies: nothing becomes visible under a term older than the newest");
    falls(Broken::Unfenced, "what is archived never becomes visible again");
}

#[test]
fn asked_before_fencing_a_frozen_owner_publishes_after_its_successor() {
    falls(Broken::AskedTooEarly, "no zombie copies: nothing becomes visible under a term older than the newest");
}

#[test]
fn archived_before_the_commit_a_row_is_lost() {
    falls(Broken::ArchivedBeforeCommit, "what left the outbox is visible");
}

#[test]
fn a_commit_without_an_answer_that_is_taken_for_done_loses_a_row() {
    falls(Broken::SilenceIsCommit, "what left the outbox is visible");
}

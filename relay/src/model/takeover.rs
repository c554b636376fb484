//! Lease, delivery, take-over: two relays, one lane, two keys.
//!
//! What is modelled, and how much harsher than life it is:
//!
//! - **Writers** take their row ids before they commit, and commit in any order; within a key, one at
//!   a time, as its row lock has it. A read may begin at any id, since the marks are but a hint.
//! - **The lease** may run out at any moment. That a relay trusts itself for less long than the
//!   database does is left out: a process can be frozen between its look at the clock and its send,
//!   so nothing may rest on it. A relay goes on with what it believes for as long as the search
//!   likes before it looks again ([`Action::KeeperTicks`], [`Action::WorkerLooks`]).
//! - **The network** keeps every request that was ever sent and may deliver it at any later time,
//!   also when its sender has given it up, lost its lane or died. A report of success may come
//!   whenever the row is in the log; a report of failure at any time. A report of success that names no
//!   position may come at any time, too, whether the row is in the log or not. When exactly a relay was frozen
//!   does not matter then: it is one with the time its request takes.
//! - **The log** is the set of what the broker has, since copies are allowed; what is checked is the
//!   moment each row first gets there.
//! - **A crash** takes all a relay knows; what it sent stays on the way.
//!
//! Left out: parking, replays, suspicion and draining. They take rows or lanes away from a relay, and
//! no more than a crash does.
//!
//! Terms are told apart only as far as the SQL does: the lane's present one, and older ones. So the
//! number of take-overs, crashes, failures and copies is not bounded, and the search is still
//! finite.

mod broker;
mod database;
mod relay;

use std::sync::LazyLock;

use broker::{Broker, Rows};
use database::Database;
use relay::{Relay, Term};
use stateright::{Checker, HasDiscoveries, Model, Property};

use super::Proven;
use crate::message::lane_of;

const RELAYS: usize = 2;
/// Two keys of one lane.
static KEYS: LazyLock<[String; 2]> = LazyLock::new(|| {
    let first = "1".to_owned();
    let second = (2..).map(|n| n.to_string()).find(|key| lane_of(key) == lane_of(&first));
    [first, second.expect("64 lanes are soon full")]
});

/// The model, with nothing or one rule taken out.
struct Takeover {
    broken: Option<Broken>,
    /// The keys of the rows, by row id.
    rows: &'static [usize],
    proven: Proven,
}

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Broken {
    /// The next of a key is sent before the one before it is acknowledged.
    TwoOfAKeyInFlight,
    /// A row that the client took is taken for sent.
    DoneWhenEnqueued,
    /// Archived without asking for owner and term.
    NoTermGuard,
    /// Archived without looking whether the outbox still has it.
    ArchivedUnseen,
    /// Read from where the last read ended.
    Cursor,
    /// Sent although the one before it is not out.
    NoSequenceCheck,
    /// A report of a row that was given up counts as its acknowledgement.
    LateReportsCount,
    /// A report of success counts as an acknowledgement although it names no position.
    NoPositionNeeded,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct State {
    database: Database,
    broker: Broker,
    relays: [Relay; RELAYS],
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Action {
    Append,
    Commit { id: i64 },
    LeaseRunsOut,
    KeeperTicks { relay: usize },
    WorkerLooks { relay: usize },
    ReadAndSend { relay: usize, above: i64 },
    Arrives { id: i64 },
    Acknowledged { relay: usize, id: i64 },
    ReportedWithoutPosition { relay: usize, id: i64 },
    Failed { relay: usize, id: i64 },
    LateReport { relay: usize, id: i64 },
    ProducerReplaced { relay: usize },
    Archive { relay: usize, answer_lost: bool },
    Crash { relay: usize },
}

impl Takeover {
    /// Three rows: enough for a row that becomes visible late below one that was read, with the next of
    /// its key behind.
    fn new(broken: Option<Broken>) -> Self {
        Self { broken, rows: &[0, 1, 0], proven: Proven::default() }
    }

    /// What happens next if nothing more goes wrong.
    fn lucky(&self, state: &State) -> Option<State> {
        let mut actions = vec![];
        actions.extend(state.database.ids().map(|id| Action::Commit { id }));
        actions.extend((0..RELAYS).map(|relay| Action::KeeperTicks { relay }));
        actions.extend((0..RELAYS).map(|relay| Action::WorkerLooks { relay }));
        actions.extend(state.database.ids().map(|id| Action::Arrives { id }));
        for relay in 0..RELAYS {
            actions.extend(state.database.ids().map(|id| Action::Acknowledged { relay, id }));
            actions.push(Action::Archive { relay, answer_lost: false });
            actions.push(Action::ReadAndSend { relay, above: 0 });
        }
        actions.into_iter().find_map(|action| self.next_state(state, action).filter(|next| next != state))
    }
}

impl Model for Takeover {
    type State = State;
    type Action = Action;

    fn init_states(&self) -> Vec<State> {
        let database = Database { rows: vec![], owner: None, archived_by_another: false };
        vec![State { database, broker: Broker::default(), relays: Default::default() }]
    }

    fn actions(&self, state: &State, actions: &mut Vec<Action>) {
        actions.push(Action::Append);
        actions.extend(state.database.ids().map(|id| Action::Commit { id }));
        actions.extend(state.database.ids().map(|id| Action::Arrives { id }));
        actions.push(Action::LeaseRunsOut);
        for relay in 0..RELAYS {
            actions.extend([Action::KeeperTicks { relay }, Action::WorkerLooks { relay }]);
            // The marks are a hint: a read may begin anywhere.
            actions.extend((0..=state.database.rows.len() as i64).map(|above| Action::ReadAndSend { relay, above }));
            for id in state.database.ids() {
                actions.push(Action::Acknowledged { relay, id });
                actions.push(Action::ReportedWithoutPosition { relay, id });
                actions.push(Action::Failed { relay, id });
                actions.push(Action::LateReport { relay, id });
            }
            actions.extend([false, true].map(|answer_lost| Action::Archive { relay, answer_lost }));
            actions.extend([Action::ProducerReplaced { relay }, Action::Crash { relay }]);
        }
    }

    fn next_state(&self, state: &State, action: Action) -> Option<State> {
        if !state.allows(&action, self.rows) {
            return None;
        }
        let broken = self.broken;
        let mut next = state.clone();
        let State { database, broker, relays } = &mut next;
        match action {
            Action::Append => database.append(self.rows[database.rows.len()]),
            Action::Commit { id } => database.rows[id as usize - 1].committed = true,
            Action::LeaseRunsOut => database.owner = None,
            // `LeaseKeeper::tick`: what it holds is confirmed, what is free is taken, what is lost is forgotten.
            Action::KeeperTicks { relay } => {
                if database.owner.is_none() {
                    relays.iter_mut().for_each(Relay::overtaken);
                    database.owner = Some(relay);
                }
                relays[relay].held = (database.owner == Some(relay)).then_some(Term::Present);
            }
            Action::WorkerLooks { relay } => relays[relay].look(),
            Action::ReadAndSend { relay, above } => {
                relays[relay].read(database, above, broken);
                relays[relay].send(broker, broken);
            }
            Action::Arrives { id } => {
                broker.out_of_order |= database.before(id).is_some_and(|before| !broker.log.has(before));
                broker.on_the_way.remove(id);
                broker.log.add(id);
            }
            Action::Acknowledged { relay, id } => {
                let relay = &mut relays[relay];
                relay.memory.0.acknowledged(id)?;
                relay.sent.add(id);
                relay.send(broker, broken);
            }
            Action::ReportedWithoutPosition { relay, id } if broken == Some(Broken::NoPositionNeeded) => {
                let relay = &mut relays[relay];
                relay.memory.0.acknowledged(id)?;
                relay.sent.add(id);
                relay.send(broker, broken);
            }
            Action::Failed { relay, id } | Action::ReportedWithoutPosition { relay, id } => {
                let relay = &mut relays[relay];
                let key = relay.memory.0.in_flight_row(id)?.key.clone();
                relay.memory.0.evict(&key);
                relay.send(broker, broken);
            }
            Action::LateReport { relay, id } => {
                let relay = &mut relays[relay];
                assert!(relay.memory.0.acknowledged(id).is_none(), "a late report is one of a row in flight");
                if broken == Some(Broken::LateReportsCount) && relay.followed.is_some() {
                    relay.sent.add(id);
                }
            }
            Action::ProducerReplaced { relay } => relays[relay].memory.0.evict_unsent(),
            Action::Archive { relay, answer_lost } => {
                let owner = &mut relays[relay];
                let moved = database.finish(relay, owner.followed, owner.sent, broken);
                if !answer_lost {
                    if moved != owner.sent {
                        // `Ownership::forget`: whose the lane is, the keeper has to ask.
                        owner.held = None;
                    }
                    owner.memory.0.archived(owner.sent.ids());
                    owner.sent = Rows::default();
                }
            }
            Action::Crash { relay } => {
                relays[relay] = Relay::default();
                // A dead owner's lease only has to run out; until then nobody can do anything.
                database.owner = database.owner.filter(|&owner| owner != relay);
            }
        }
        if broken.is_none() {
            next.number_relays();
        }
        Some(next)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("first occurrences of a key are in order, without a gap", |_, state: &State| {
                !state.broker.out_of_order
            }),
            Property::always("only what is committed is sent", |_, state: &State| {
                let sent = |id| state.broker.log.has(id) || state.broker.on_the_way.has(id);
                state.database.ids().all(|id| state.database.row(id).committed || !sent(id))
            }),
            Property::always("what left the outbox is in the log", |_, state: &State| {
                state.database.ids().all(|id| state.database.row(id).archived == 0 || state.broker.log.has(id))
            }),
            Property::always("only the owner archives", |_, state: &State| !state.database.archived_by_another),
            Property::always("a row is archived once", |_, state: &State| {
                state.database.rows.iter().all(|row| row.archived <= 1)
            }),
            Property::always("no gap stands a second look", |_, state: &State| {
                (0..KEYS.len()).all(|key| !state.database.has_gap(key))
            }),
            Property::always("with luck from now on, everything gets out", |model: &Self, state: &State| {
                let all_out = |state: &State| state.database.rows.iter().all(|row| row.archived > 0);
                model.proven.ends_well(state, |state| model.lucky(state), all_out)
            }),
            Property::sometimes("a row of an owner before arrives late", |_, state: &State| {
                state.owner_at_work().is_some_and(|owner| {
                    state.broker.on_the_way.ids().any(|id| owner.memory.0.in_flight_row(id).is_none())
                })
            }),
            Property::sometimes("what is in the log is sent again", |_, state: &State| {
                state
                    .owner_at_work()
                    .is_some_and(|owner| state.broker.log.ids().any(|id| owner.memory.0.in_flight_row(id).is_some()))
            }),
            Property::sometimes("a relay comes back for what its successor has archived", |_, state: &State| {
                let archived = |id| state.database.row(id).archived > 0;
                state.relays.iter().any(|relay| relay.followed == Some(Term::Past) && relay.sent.ids().any(archived))
            }),
            Property::sometimes("a row with a lower id becomes visible late", |_, state: &State| {
                let read_beyond =
                    |id| state.relays.iter().any(|relay| relay.memory.0.row_ids().iter().any(|&read| read > id));
                state.database.ids().any(|id| !state.database.row(id).committed && read_beyond(id))
            }),
            Property::sometimes("everything is out", |model: &Self, state: &State| {
                state.database.rows.len() == model.rows.len() && state.database.rows.iter().all(|row| row.archived > 0)
            }),
        ]
    }
}

impl State {
    /// Whether an action can happen here; whether anything comes of it is another matter.
    fn allows(&self, action: &Action, rows: &[usize]) -> bool {
        let State { database, broker, relays } = self;
        let in_flight = |relay: usize, id| relays[relay].memory.0.in_flight_row(id).is_some();
        match *action {
            Action::Append => rows.get(database.rows.len()).is_some_and(|&key| !database.is_locked(key)),
            Action::Commit { id } => !database.row(id).committed,
            Action::LeaseRunsOut => database.owner.is_some(),
            Action::KeeperTicks { relay } => {
                let owns = database.owner == Some(relay);
                database.owner.is_none() || relays[relay].held != owns.then_some(Term::Present)
            }
            Action::WorkerLooks { relay } => relays[relay].held != relays[relay].followed,
            Action::ReadAndSend { relay, .. } => relays[relay].followed.is_some(),
            Action::Arrives { id } => broker.on_the_way.has(id),
            Action::Acknowledged { relay, id } => broker.log.has(id) && in_flight(relay, id),
            Action::Failed { relay, id } | Action::ReportedWithoutPosition { relay, id } => in_flight(relay, id),
            // Of a row that was sent once and is not in flight any more: whatever it says, nothing may come of it.
            Action::LateReport { relay, id } => {
                (broker.log.has(id) || broker.on_the_way.has(id)) && !in_flight(relay, id)
            }
            Action::ProducerReplaced { relay } => relays[relay].memory.0.in_flight() > 0,
            Action::Archive { relay, .. } => relays[relay].sent != Rows::default(),
            Action::Crash { relay } => relays[relay] != Relay::default(),
        }
    }

    /// Relays differ by nothing but what they know: states that differ by their numbers are one.
    fn number_relays(&mut self) {
        for relay in &mut self.relays {
            if relay.held != Some(Term::Past) {
                relay.followed = relay.followed.map(|term| if term == Term::LongPast { Term::Past } else { term });
            }
        }
        let [first, second] = &self.relays;
        let by_terms = (first.held, first.followed, first.sent).cmp(&(second.held, second.followed, second.sent));
        if by_terms.then_with(|| first.memory.0.snapshot().cmp(&second.memory.0.snapshot())).is_gt() {
            self.relays.swap(0, 1);
            self.database.owner = self.database.owner.map(|owner| 1 - owner);
        }
    }

    fn owner_at_work(&self) -> Option<&Relay> {
        let owner = &self.relays[self.database.owner?];
        (owner.followed == Some(Term::Present)).then_some(owner)
    }
}

#[test]
fn every_order_of_events_keeps_the_promises() {
    let checked = Takeover::new(None).checker().spawn_bfs().join();
    eprintln!("take-over: {} states, {} deep", checked.unique_state_count(), checked.max_depth());
    checked.assert_properties();
    assert!(checked.unique_state_count() > 10_000, "{} states are too few", checked.unique_state_count());
}

/// What falls when a rule is taken out.
fn falls(broken: Broken, property: &'static str) {
    let model = Takeover::new(Some(broken));
    let checked = model.checker().finish_when(HasDiscoveries::AnyFailures).spawn_bfs().join();
    let path = checked.assert_any_discovery(property);
    eprintln!("{broken:?}: {:?}", path.into_actions());
}

#[test]
fn two_of_a_key_in_flight_lose_their_order() {
    falls(Broken::TwoOfAKeyInFlight, "first occurrences of a key are in order, without a gap");
}

#[test]
fn a_row_that_is_done_when_enqueued_is_lost() {
    falls(Broken::DoneWhenEnqueued, "what left the outbox is in the log");
}

#[test]
fn without_the_term_a_relay_archives_in_anothers_lane() {
    falls(Broken::NoTermGuard, "only the owner archives");
}

#[test]
fn a_row_archived_unseen_is_archived_twice() {
    falls(Broken::ArchivedUnseen, "a row is archived once");
}

#[test]
fn a_cursor_steps_over_a_late_commit() {
    falls(Broken::Cursor, "with luck from now on, everything gets out");
}

#[test]
fn without_the_sequence_check_a_read_above_a_late_row_loses_the_order() {
    falls(Broken::NoSequenceCheck, "first occurrences of a key are in order, without a gap");
}

#[test]
fn a_report_that_counts_without_a_position_loses_a_row() {
    falls(Broken::NoPositionNeeded, "what left the outbox is in the log");
}

#[test]
fn a_late_report_that_counts_loses_a_row() {
    falls(Broken::LateReportsCount, "what left the outbox is in the log");
}

//! Models in which every order of events is tried, not some: what two relays, a database, a broker
//! and the network between them can do to each other, exhaustively, by breadth-first search.
//!
//! - [`takeover`]: lease, delivery and take-over, around the real [`Window`](crate::window::Window).
//!   That is why the models stand in here and not in `tests/`: what decides about order is run
//!   itself, not a copy of it that could stay right while the original goes wrong.
//! - [`fencing`]: what a transactional producer adds, and the one order of steps in which it does.
//!
//! A property that holds proves little before it is known what would break it. So each model can be
//! built with one rule taken out ([`takeover::Broken`], [`fencing::Broken`]), and then a named
//! property has to fall. And each counts its states and has to reach the situations it is about, so
//! that a model in which nothing happens is noticed.
//!
//! Liveness is checked as *with luck from now on, it ends well*: from every state that misfortune
//! can bring about, the fixed course in which nothing more goes wrong has to end with everything
//! out. That is more than being able to: it says that no relay needs a restart or a person.

mod fencing;
mod takeover;

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::{Mutex, PoisonError},
};

/// States from which the lucky course is known to end well.
#[derive(Debug, Default)]
struct Proven(Mutex<HashSet<u64>>);

impl Proven {
    /// Follows `lucky` from `state` until it has no next, and asks whether that end is a good one. A
    /// course that does not end is no good one. What is proven on the way need not be walked again.
    fn ends_well<S: Clone + Hash>(
        &self,
        state: &S,
        lucky: impl Fn(&S) -> Option<S>,
        good_end: impl Fn(&S) -> bool,
    ) -> bool {
        let mut proven = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut course = vec![];
        let mut at = state.clone();
        loop {
            let here = fingerprint(&at);
            if proven.contains(&here) {
                break;
            }
            if course.contains(&here) {
                return false;
            }
            course.push(here);
            match lucky(&at) {
                Some(next) => at = next,
                None if good_end(&at) => break,
                None => return false,
            }
        }
        proven.extend(course);
        true
    }
}

fn fingerprint(state: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    state.hash(&mut hasher);
    hasher.finish()
}

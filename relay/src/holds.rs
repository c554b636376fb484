//! What has to wait for its next attempt: keys after a broker fault, topics after a topic fault.
//! Pure: time comes in as a value.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(10);

/// Names on hold, each with a wait that doubles from 200 ms to 10 s for as long as it keeps failing.
#[derive(Debug, Default)]
pub(crate) struct Holds(HashMap<String, Hold>);

#[derive(Debug)]
struct Hold {
    until: Instant,
    wait: Duration,
    over: bool,
}

impl Holds {
    /// Puts a name on hold. `true` when it was not on hold before.
    pub(crate) fn hold(&mut self, name: &str, now: Instant) -> bool {
        match self.0.get_mut(name) {
            Some(hold) => {
                hold.wait = (hold.wait * 2).min(LONGEST);
                (hold.until, hold.over) = (now + hold.wait, false);
                false
            }
            None => {
                self.0.insert(name.to_owned(), Hold { until: now + FIRST, wait: FIRST, over: false });
                true
            }
        }
    }

    /// Whether it is on hold, or was a moment ago.
    pub(crate) fn remembers(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A message got through: forget that there was trouble. `true` when it ends a wait.
    pub(crate) fn release(&mut self, name: &str) -> bool {
        !self.0.is_empty() && self.0.remove(name).is_some_and(|hold| !hold.over)
    }

    /// Lets go what has waited long enough, and returns its names. It is remembered for the length of
    /// the next wait, in case it fails again.
    pub(crate) fn expire(&mut self, now: Instant) -> Vec<String> {
        let mut over = Vec::new();
        self.0.retain(|name, hold| {
            if !hold.over && now >= hold.until {
                hold.over = true;
                over.push(name.clone());
            }
            now < hold.until + LONGEST * 2
        });
        over
    }

    /// Whether something is on hold now.
    pub(crate) fn any(&self) -> bool {
        self.0.values().any(|hold| !hold.over)
    }

    /// What is on hold now.
    pub(crate) fn names(&self) -> Vec<String> {
        self.0.iter().filter(|(_, hold)| !hold.over).map(|(name, _)| name.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_while_it_keeps_failing_and_end_with_success() {
        let start = Instant::now();
        let mut holds = Holds::default();
        assert!(holds.hold("t", start));
        assert_eq!(holds.names(), ["t"]);
        assert!(holds.expire(start + FIRST / 2).is_empty());
        assert_eq!(holds.expire(start + FIRST), ["t"]);
        assert!(holds.names().is_empty());
        assert!(!holds.hold("t", start + FIRST), "it is remembered");
        assert!(holds.expire(start + FIRST * 2).is_empty());
        assert_eq!(holds.expire(start + FIRST * 3), ["t"], "the second wait is twice the first");
        holds.release("t");
        assert!(holds.hold("t", start));
    }
}

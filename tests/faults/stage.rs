//! What a scenario is given: its name, its seed, and how long things may take.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::StdRng};

/// One playing of one scenario.
pub struct Stage {
    pub name: &'static str,
    pub seed: u64,
    /// The long form.
    pub full: bool,
    pub dice: StdRng,
}

impl Stage {
    pub fn new(name: &'static str, seed: u64, full: bool) -> Self {
        // Scenarios of one round differ, whatever runs beside them.
        let mixed = name.bytes().fold(seed, |mixed, byte| mixed.wrapping_mul(0x0100_0000_01b3) ^ u64::from(byte));
        Self { name, seed, full, dice: StdRng::seed_from_u64(mixed) }
    }

    /// Whether the relays fence each other off at the broker.
    pub fn fenced(&self) -> bool {
        self.name.starts_with("fenced: ")
    }

    /// `short` seconds, or `long` ones in the full form.
    pub fn seconds(&self, short: u64, long: u64) -> Duration {
        Duration::from_secs(if self.full { long } else { short })
    }

    /// So many, or ten times as many in the full form.
    pub fn many(&self, few: usize) -> usize {
        if self.full { few * 10 } else { few }
    }

    /// A number in `low..=high`.
    pub fn roll(&mut self, low: u64, high: u64) -> u64 {
        self.dice.random_range(low..=high)
    }

    /// Milliseconds in `low..=high`.
    pub fn millis(&mut self, low: u64, high: u64) -> Duration {
        Duration::from_millis(self.roll(low, high))
    }
}

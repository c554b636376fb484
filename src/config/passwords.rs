use std::time::Duration;

use secrecy::ExposeSecret;

use super::Profile;
use super::vars::Vars;
use crate::crypto::{HasherSettings, MAX_COST};

/// A pepper that can be guessed protects nothing.
const MIN_PEPPER_BYTES: usize = 16;

/// How passwords are chosen and stored.
#[derive(Debug, Clone)]
pub struct PasswordConfig {
    /// How they are hashed.
    pub hasher: HasherSettings,
    /// The fewest characters a new one may have.
    pub min_length: usize,
}

impl PasswordConfig {
    pub(super) fn read(vars: &mut Vars) -> Self {
        let seconds = Duration::from_secs;
        let min_cost = match vars.profile {
            Profile::Production => 10,
            Profile::Dev => 4,
        };
        let cost = vars.number("SALT_ROUNDS", 12, min_cost..=MAX_COST);
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = vars.number("HASH_THREADS", cores, 1..=1024);
        let queue = vars.number("HASH_QUEUE", 256, 0..=100_000);
        let max_wait = vars.duration("HASH_MAX_WAIT", seconds(10), seconds(0)..=seconds(120));
        let min_length = vars.number("PASSWORD_MIN_LENGTH", 8, 8..=128);
        let pepper = vars.secret("PASSWORD_PEPPER");
        if pepper.as_ref().is_some_and(|pepper| pepper.expose_secret().len() < MIN_PEPPER_BYTES) {
            vars.reject(
                "PASSWORD_PEPPER",
                format!("is shorter than {MIN_PEPPER_BYTES} bytes"),
                "Make one with: openssl rand -base64 32. Keep it: without it no password made with it can be checked",
            );
        }
        Self { hasher: HasherSettings { cost, pepper, threads, queue, max_wait }, min_length }
    }
}

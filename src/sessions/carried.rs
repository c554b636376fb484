use std::time::Instant;

use secrecy::{ExposeSecret, SecretString};

/// When the head of a request had come. Time that it waits in this process from then on is not held
/// against its tokens.
#[derive(Debug, Clone, Copy)]
pub struct Arrived(pub Instant);

/// The tokens that a request carries, as they came.
///
/// A browser may send several cookies of one name: a page of a sibling domain can set one, and so
/// could an earlier front end under another path. One that is good counts, whatever stands beside
/// it. They are read in the order in which they came.
///
/// # Which one counts
///
/// A forged, stale or foreign cookie must not hide the good one, nor take its place:
///
/// - What is not signed by us names nobody and is passed over. So is a token whose time has passed or
///   whose session is over, and an earlier refresh token beside a later one of its session.
/// - Good tokens of one user do not contradict each other; the first counts.
/// - Good tokens of two users do. A sibling domain can set a cookie with its owner's own good token
///   ("cookie tossing"), so that somebody else acts in that owner's account, and its cookie may come
///   first or last. Nothing in the request tells which one is meant: it is refused
///   ([`Over::TwoUsers`](super::Over::TwoUsers)). Cookies with the `__Host-` prefix can't be set like
///   that.
/// - A logout grants nothing, so it ends the session of every good token there is: afterwards nothing
///   that the browser still holds is good.
#[derive(Debug, Clone)]
pub struct Carried {
    pub(super) access: Vec<SecretString>,
    pub(super) refresh: Vec<SecretString>,
    pub(super) arrived: Instant,
}

/// More tokens of one kind than this are not looked at: each costs the check of a signature, some 30 µs.
/// Browsers keep fewer cookies for a whole site, so that a sibling domain can't fill this with its own.
const MOST: usize = 200;

impl Carried {
    /// A request that has arrived and carries nothing yet.
    pub fn new(Arrived(arrived): Arrived) -> Self {
        Self { access: vec![], refresh: vec![], arrived }
    }

    /// With an access token more.
    pub fn with_access(mut self, token: impl Into<SecretString>) -> Self {
        push(&mut self.access, token.into());
        self
    }

    /// With a refresh token more.
    pub fn with_refresh(mut self, token: impl Into<SecretString>) -> Self {
        push(&mut self.refresh, token.into());
        self
    }

    /// As they came, for tests of what reads them.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn exposed(&self) -> (impl Iterator<Item = &str>, impl Iterator<Item = &str>) {
        (self.access.iter().map(|token| token.expose_secret()), self.refresh.iter().map(|token| token.expose_secret()))
    }
}

fn push(tokens: &mut Vec<SecretString>, token: SecretString) {
    let known = tokens.iter().any(|known| known.expose_secret() == token.expose_secret());
    if !known && tokens.len() < MOST {
        tokens.push(token);
    }
}

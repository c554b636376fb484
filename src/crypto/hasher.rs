use std::hint::black_box;
use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use aws_lc_rs::hmac;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bcrypt::HashParts;
use metrics::{gauge, histogram};
use secrecy::{ExposeSecret, SecretString};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use unicode_normalization::UnicodeNormalization;

use crate::domain::Password;

/// A stored hash above this cost is not computed: one row could hold a core for minutes.
pub const MAX_COST: u32 = 15;
const MIN_COST: u32 = 4;
/// Stands in for the pepper where there is none, so that the scheme is the same.
const NO_PEPPER: &[u8] = b"auth-service password, no pepper";
const NO_PEPPER_ID: &str = "-";

/// How passwords are hashed, and how much of the machine that may take.
#[derive(Debug, Clone)]
pub struct HasherSettings {
    /// bcrypt's cost: every step doubles the work.
    pub cost: u32,
    /// A secret outside the database, without which its hashes can't be guessed at.
    pub pepper: Option<SecretString>,
    /// How many hashes are computed at once.
    pub threads: usize,
    /// How many more may wait.
    pub queue: usize,
    /// For how long.
    pub max_wait: Duration,
}

/// Hashes and verifies passwords on a bounded number of threads. Cheap to clone.
///
/// Stored form: `v1$<pepper id or ->$2b$12$…`, where bcrypt is given
/// base64(HMAC-SHA-384(pepper, NFKC(password))): 64 characters, so that nothing is cut off at
/// bcrypt's 72 bytes and a NUL is a character like any other. Bare bcrypt hashes, as bcryptjs made
/// them for the replaced service, are verified too.
#[derive(Clone)]
pub struct Hasher(Arc<Inner>);

struct Inner {
    cost: u32,
    pepper: Option<Pepper>,
    slots: Arc<Semaphore>,
    threads: usize,
    queue: usize,
    max_wait: Duration,
    waiting: AtomicUsize,
    last_micros: AtomicU64,
}

struct Pepper {
    id: String,
    key: hmac::Key,
}

/// The outcome of [`Hasher::verify`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// It is the password.
    pub matches: bool,
    /// It is, and the stored hash is not what we would make today.
    pub needs_rehash: bool,
}

impl Verdict {
    const NO: Self = Self { matches: false, needs_rehash: false };
}

/// Why there is no hash or no verdict.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum HashError {
    /// More logins than this machine can check; none of them was looked at.
    #[error("too many passwords are being checked; try again in {} s", .retry_after.as_secs())]
    Busy {
        /// When the queue should be short again.
        retry_after: Duration,
    },
    /// Out of randomness, or a bug.
    #[error("the password could not be hashed")]
    Failed,
}

impl Hasher {
    /// The settings come from the configuration, which has checked their ranges; a cost that is
    /// out of bcrypt's is still refused here.
    pub fn new(settings: HasherSettings) -> Result<Self, HashError> {
        if !(MIN_COST..=MAX_COST).contains(&settings.cost) {
            return Err(HashError::Failed);
        }
        let threads = settings.threads.max(1);
        Ok(Self(Arc::new(Inner {
            cost: settings.cost,
            pepper: settings.pepper.as_ref().map(Pepper::new),
            slots: Arc::new(Semaphore::new(threads)),
            threads,
            queue: settings.queue,
            max_wait: settings.max_wait,
            waiting: AtomicUsize::new(0),
            last_micros: AtomicU64::new(0),
        })))
    }

    /// The form in which `password` is stored.
    pub async fn hash(&self, password: &Password) -> Result<String, HashError> {
        let password = password.as_secret().clone();
        self.run(move |inner| inner.hash(&password)).await?
    }

    /// Whether `presented` is the password behind `stored`. `None` stands for an unknown user: the
    /// same work is done for nobody, and never matches.
    pub async fn verify(&self, presented: &SecretString, stored: Option<&str>) -> Result<Verdict, HashError> {
        let (presented, stored) = (presented.clone(), stored.map(str::to_owned));
        self.run(move |inner| inner.verify(&presented, stored.as_deref())).await
    }

    /// Waits for a slot, then works on a blocking thread. Whoever stops waiting leaves the queue;
    /// work that has begun keeps its slot to the end, since nothing can stop it.
    async fn run<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> T + Send + 'static) -> Result<T, HashError> {
        let asked = Instant::now();
        let slot = self.slot().await?;
        histogram!("auth_hash_wait_seconds").record(asked.elapsed());
        let hasher = self.clone();
        tokio::task::spawn_blocking(move || {
            let _slot = slot;
            let begun = Instant::now();
            let result = work(&hasher.0);
            let took = begun.elapsed();
            histogram!("auth_hash_seconds").record(took);
            hasher.0.last_micros.store(took.as_micros() as u64, Ordering::Relaxed);
            result
        })
        .await
        .map_err(|_| HashError::Failed)
    }

    async fn slot(&self) -> Result<OwnedSemaphorePermit, HashError> {
        if let Ok(slot) = Arc::clone(&self.0.slots).try_acquire_owned() {
            return Ok(slot);
        }
        let _place = Place::take(&self.0).ok_or_else(|| self.busy())?;
        match tokio::time::timeout(self.0.max_wait, Arc::clone(&self.0.slots).acquire_owned()).await {
            Ok(slot) => slot.map_err(|_| HashError::Failed),
            Err(_) => Err(self.busy()),
        }
    }

    fn busy(&self) -> HashError {
        let ahead = self.0.waiting.load(Ordering::Relaxed).div_ceil(self.0.threads) as u64;
        let micros = self.0.last_micros.load(Ordering::Relaxed).saturating_mul(ahead + 1);
        HashError::Busy { retry_after: Duration::from_secs(micros.div_ceil(1_000_000).clamp(1, 60)) }
    }
}

/// One place in the queue, given back when dropped.
struct Place<'a>(&'a Inner);

impl<'a> Place<'a> {
    fn take(inner: &'a Inner) -> Option<Self> {
        let free = |waiting| (waiting < inner.queue).then_some(waiting + 1);
        inner.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, free).ok()?;
        gauge!("auth_hash_queue_depth").increment(1);
        Some(Self(inner))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.waiting.fetch_sub(1, Ordering::Relaxed);
        gauge!("auth_hash_queue_depth").decrement(1);
    }
}

impl Inner {
    fn hash(&self, password: &SecretString) -> Result<String, HashError> {
        let input = prehash(self.pepper.as_ref(), password);
        let hash = bcrypt::non_truncating_hash(input, self.cost).map_err(|_| HashError::Failed)?;
        let id = self.pepper.as_ref().map_or(NO_PEPPER_ID, |pepper| &pepper.id);
        Ok(format!("v1${id}{hash}"))
    }

    fn verify(&self, presented: &SecretString, stored: Option<&str>) -> Verdict {
        let known = stored.and_then(|stored| self.read(stored, presented));
        let Some((input, hash, cost, current)) = known else {
            spend(self.cost);
            return Verdict::NO;
        };
        let matches = bcrypt::verify(input.expose_secret(), hash).unwrap_or(false);
        if !matches {
            // The steps from this hash's cost up to ours add up to the one hash that is computed
            // for nobody: a user with an old, cheap hash does not stand out.
            (cost..self.cost).for_each(spend);
            return Verdict::NO;
        }
        Verdict { matches, needs_rehash: !current || cost != self.cost }
    }

    /// What to give bcrypt for a stored hash, the bare hash, its cost, and whether it was made as
    /// we would make it today. `None` where it can't be computed.
    fn read<'a>(&self, stored: &'a str, presented: &SecretString) -> Option<(SecretString, &'a str, u32, bool)> {
        let (input, bare, current) = match stored.strip_prefix("v1$") {
            Some(rest) => {
                let (id, _) = rest.split_once('$')?;
                let pepper = match (id, &self.pepper) {
                    (NO_PEPPER_ID, _) => None,
                    (_, Some(pepper)) if pepper.id == id => Some(pepper),
                    _ => {
                        tracing::error!(
                            "A stored password hash was made with another PASSWORD_PEPPER; it can't match."
                        );
                        return None;
                    }
                };
                let current = pepper.is_some() == self.pepper.is_some();
                (prehash(pepper, presented).into(), &rest[id.len()..], current)
            }
            // bcrypt would take "ab" for "ab\0ab".
            None if presented.expose_secret().contains('\0') => return None,
            None => (presented.clone(), stored, false),
        };
        let variant = ["$2a$", "$2b$", "$2y$"].iter().any(|prefix| bare.starts_with(prefix));
        let cost = variant.then(|| HashParts::from_str(bare).ok()).flatten().map(|parts| parts.get_cost());
        match cost {
            Some(MIN_COST..=MAX_COST) => cost.map(|cost| (input, bare, cost, current)),
            Some(cost) => {
                tracing::error!(cost, "A stored password hash has a cost that is not computed; it can't match.");
                None
            }
            None => {
                tracing::error!("A stored password hash can't be read; it can't match.");
                None
            }
        }
    }
}

impl Pepper {
    fn new(secret: &SecretString) -> Self {
        let key = hmac::Key::new(hmac::HMAC_SHA384, secret.expose_secret().as_bytes());
        let tag = hmac::sign(&key, b"auth-service pepper id");
        let id = tag.as_ref()[..4].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { id, key }
    }
}

/// The work of one hash of that cost.
fn spend(cost: u32) {
    black_box(bcrypt::bcrypt(cost, black_box([7; 16]), black_box(&[7; 65])));
}

/// 64 characters that stand for the whole password.
fn prehash(pepper: Option<&Pepper>, password: &SecretString) -> String {
    let unpeppered;
    let key = match pepper {
        Some(pepper) => &pepper.key,
        None => {
            unpeppered = hmac::Key::new(hmac::HMAC_SHA384, NO_PEPPER);
            &unpeppered
        }
    };
    let normalised = SecretString::from(password.expose_secret().nfkc().collect::<String>());
    STANDARD.encode(hmac::sign(key, normalised.expose_secret().as_bytes()))
}

#[cfg(test)]
mod tests;

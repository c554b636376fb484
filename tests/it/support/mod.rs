//! What tests stand on.

pub mod browser;
pub mod gate;
pub mod kafka;
pub mod original;
pub mod outage;
pub mod outbox;
pub mod parts;
pub mod pgbouncer;
pub mod process;
pub mod raw_kafka;
pub mod service;

use std::time::{Duration, Instant};

pub use futures_util::future::join_all;
pub use service::TestService;

/// Looks again and again until `look` finds something. Fails the test, saying what was awaited, when
/// it never comes.
#[track_caller]
pub fn eventually<T, F>(what: &str, mut look: impl FnMut() -> F) -> impl Future<Output = T>
where
    F: Future<Output = Option<T>>,
{
    const PATIENCE: Duration = Duration::from_secs(30);
    let caller = std::panic::Location::caller();
    let what = what.to_owned();
    async move {
        let since = Instant::now();
        loop {
            if let Some(found) = look().await {
                return found;
            }
            assert!(since.elapsed() < PATIENCE, "{caller}: waited {PATIENCE:?} in vain for: {what}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

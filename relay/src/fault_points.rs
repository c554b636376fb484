//! Named places between two steps whose gap a crash must survive. With the feature `fault-points` the
//! fault suite arms them through the environment variable `FAILPOINTS`, in the notation of the crate
//! `fail`: `relay::acknowledged=3*off->return` ends the process, as `kill -9` would, the fourth time
//! it gets there; `return(SIGSTOP)` holds the whole process there until it is sent SIGCONT, `sleep(5000)`
//! one thread of it for so many milliseconds, `panic` kills the task. Without the feature nothing of this
//! is in the binary.

/// Every place, in the order an event passes them.
pub const PLACES: [&str; 16] = [
    "registration::prepared",
    "registration::committed",
    "relay::lanes_taken",
    "relay::claimed",
    "relay::sending",
    "relay::enqueued",
    "relay::acknowledged",
    "relay::settled",
    "relay::archived",
    "sagas::received",
    "sagas::in_inbox",
    "sagas::decided",
    "sagas::committed",
    "sagas::offset_stored",
    "sagas::resolving",
    "sagas::asked",
];

/// Arms the places `FAILPOINTS` names, and says so; they stay armed until the process ends.
#[cfg(feature = "fault-points")]
pub fn arm() {
    if let Ok(armed) = std::env::var("FAILPOINTS") {
        tracing::warn!(armed, "FAILPOINTS is set: this process will fail where it says");
        std::mem::forget(fail::FailScenario::setup());
    }
}

/// The process has come to this place with this key: `…=return(KEY)` strikes for that key alone.
#[inline]
pub fn reached_with(place: &'static str, key: &str) {
    #[cfg(feature = "fault-points")]
    {
        debug_assert!(PLACES.contains(&place), "{place} is not in PLACES");
        fail::fail_point!(place, |wanted| if wanted.is_none_or(|wanted| wanted == key) {
            std::process::abort()
        });
    }
    #[cfg(not(feature = "fault-points"))]
    let _ = (place, key);
}

/// The process has come to this place.
#[inline]
pub fn reached(place: &'static str) {
    #[cfg(feature = "fault-points")]
    {
        debug_assert!(PLACES.contains(&place), "{place} is not in PLACES");
        fail::fail_point!(place, |how| if how.as_deref() == Some("SIGSTOP") {
            nix::sys::signal::raise(nix::sys::signal::Signal::SIGSTOP).expect("it may stop itself");
        } else {
            // Nothing runs after an abort: no destructor, no flush, no farewell to any server.
            std::process::abort()
        });
    }
    #[cfg(not(feature = "fault-points"))]
    let _ = place;
}

/// A supervised task has been started; its place is `task::NAME`.
#[inline]
pub(crate) fn task_started(place: &str) {
    #[cfg(feature = "fault-points")]
    fail::fail_point!(place, |_| std::process::abort());
    #[cfg(not(feature = "fault-points"))]
    let _ = place;
}

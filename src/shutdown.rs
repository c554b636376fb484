//! Stopping in order: first say that no more is wanted, then take no more, then finish.

use std::time::Duration;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// The two moments of a stop.
#[derive(Debug, Clone, Default)]
pub struct Shutdown {
    /// Readiness says no from here on; requests are still served.
    pub draining: CancellationToken,
    /// Nothing new is taken; what is under way is finished.
    pub stopping: CancellationToken,
}

impl Shutdown {
    /// Begins the stop: `drain` passes between the two moments, for load balancers to look away.
    pub async fn begin(&self, drain: Duration) {
        self.draining.cancel();
        tokio::time::sleep(drain).await;
        self.stopping.cancel();
    }
}

/// Returns at the first SIGINT or SIGTERM. A second one ends the process on the spot: whoever sends
/// it has waited long enough, and everything that was promised is in the database.
pub async fn requested() -> std::io::Result<()> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        eprintln!("second signal: stopping at once");
        std::process::exit(130);
    });
    Ok(())
}

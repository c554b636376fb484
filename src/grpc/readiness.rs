//! Keeps the health service telling the truth.

use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tonic_health::{ServingStatus, server::HealthReporter};

use crate::{app::App, health};

/// How often it is looked. A balancer looks about as often.
const EVERY: Duration = Duration::from_secs(1);

/// What the health service says, about the server as a whole and each of its services.
pub struct Readiness {
    reporter: HealthReporter,
    names: Vec<&'static str>,
}

impl Readiness {
    /// Begins with NOT_SERVING: the reporter's own beginning would be SERVING.
    pub async fn new(reporter: HealthReporter, names: Vec<&'static str>) -> Self {
        let readiness = Self { reporter, names };
        readiness.say(ServingStatus::NotServing).await;
        readiness
    }

    /// Follows the app's own view until `stop`; says NOT_SERVING from the moment it drains. At the
    /// end the streams of those who watch are ended.
    pub async fn follow(mut self, app: &App, stop: &CancellationToken) {
        let draining = &app.shutdown.draining;
        let mut said = ServingStatus::NotServing;
        while !draining.is_cancelled() && !stop.is_cancelled() {
            let status = match app.health.check(app).await {
                health::Readiness::Ready => ServingStatus::Serving,
                _ => ServingStatus::NotServing,
            };
            // Said again, it would be sent again to everyone who watches.
            if status != said {
                self.say(status).await;
                said = status;
            }
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = draining.cancelled() => {}
                () = stop.cancelled() => {}
            }
        }
        self.say(ServingStatus::NotServing).await;
        stop.cancelled().await;
        for name in &self.names {
            self.reporter.clear_service_status(name).await;
        }
    }

    async fn say(&self, status: ServingStatus) {
        for name in &self.names {
            self.reporter.set_service_status(name, status).await;
        }
    }
}

//! `/metrics`: what this process has counted, and what the database knows.
//!
//! The second part is read at scrape time, at most every few seconds whoever scrapes, and left out
//! when the database does not answer: an old figure would look like a good one. `auth_database_up`
//! says so.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use axum::{
    extract::{Extension, State},
    http::{HeaderMap, header},
    response::{IntoResponse, Response},
};
use metrics::gauge;
use metrics_exporter_prometheus::PrometheusBuilder;
use outbox_relay::{
    admin::{self as outbox, Figures},
    inbox::{self, Attention},
};
use saga_orchestrator::{
    Status,
    admin::{self as sagas, SagaCount},
};
use tokio::{sync::Mutex, time::timeout};

use super::{auth::Operator, error::AdminError};
use crate::{
    app::{App, SAGAS},
    config::Scope,
};

/// How long what was read answers other scrapes.
const FRESH: Duration = Duration::from_secs(2);
/// Prometheus gives up after ten seconds by default, and then has nothing at all.
const PATIENCE: Duration = Duration::from_secs(3);

/// The last look at the database. Scrapes that come at once share one look.
#[derive(Debug, Clone, Default)]
pub struct Scrapes(Arc<Mutex<Option<(Instant, String)>>>);

/// `GET /metrics`
pub async fn show(
    State(app): State<App>,
    Extension(scrapes): Extension<Scrapes>,
    headers: HeaderMap,
) -> Result<Response, AdminError> {
    if !app.config.admin.open_metrics && !Operator::identify(&headers, &app.config.admin.tokens)?.may(Scope::Read) {
        return Err(AdminError::ScopeTooSmall(Scope::Read));
    }
    let known = {
        let mut last = scrapes.0.lock().await;
        match &*last {
            Some((at, text)) if at.elapsed() < FRESH => text.clone(),
            _ => {
                // Where nobody probes, the look behind auth_database_problems is this one.
                app.health.check(&app).await;
                let text = rendered(&look(&app).await);
                *last = Some((Instant::now(), text.clone()));
                text
            }
        }
    };
    let text = format!("{}{}{known}", app.metrics.render(), own(&app));
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response())
}

/// What the database knows.
struct Known {
    outbox: Figures,
    sagas: Vec<SagaCount>,
    attention: Vec<Attention>,
}

async fn look(app: &App) -> Option<Known> {
    let looked = app.db.run(|conn| {
        Box::pin(async move {
            Ok::<_, sqlx::Error>(Known {
                outbox: outbox::figures(conn).await?,
                sagas: sagas::open_counts(conn).await?,
                attention: inbox::attention(conn).await?,
            })
        })
    });
    match timeout(PATIENCE, looked).await {
        Ok(Ok(known)) => Some(known),
        Ok(Err(error)) => {
            tracing::warn!(%error, "metrics of the database are missing: it does not answer");
            None
        }
        Err(_) => {
            tracing::warn!("metrics of the database are missing: it did not answer in time");
            None
        }
    }
}

/// A recorder of its own, so that a figure that was not read is absent.
fn rendered(known: &Option<Known>) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        metrics::describe_gauge!("auth_database_up", "1 when the database answered this scrape");
        gauge!("auth_database_up").set(f64::from(u8::from(known.is_some())));
        if let Some(known) = known {
            known.record();
        }
    });
    recorder.handle().render()
}

impl Known {
    fn record(&self) {
        use metrics::describe_gauge as says;
        says!("auth_outbox_pending", "Events that are not out yet");
        says!("auth_outbox_parked", "Events set aside until an operator replays them");
        says!("auth_outbox_parked_keys", "Users whose events are set aside");
        says!("auth_outbox_oldest_unsent_seconds", "Age of the oldest event that is neither out nor parked");
        says!("auth_outbox_bytes", "Disk that pending events take, indexes and room for more included");
        gauge!("auth_outbox_bytes").set(self.outbox.outbox_bytes as f64);
        gauge!("auth_outbox_pending").set(self.outbox.pending as f64);
        gauge!("auth_outbox_parked").set(self.outbox.parked as f64);
        gauge!("auth_outbox_parked_keys").set(self.outbox.parked_keys as f64);
        gauge!("auth_outbox_oldest_unsent_seconds").set(self.outbox.oldest_unsent_seconds.max(0.0));

        says!("auth_sagas", "Sagas that are not closed, by kind and status");
        says!("auth_sagas_oldest_seconds", "Age of the oldest of them");
        // A status without sagas is a zero, not a gap.
        for definition in SAGAS {
            for status in [Status::Running, Status::Resolving, Status::Stuck] {
                gauge!("auth_sagas", "name" => definition.name, "status" => status.as_str()).set(0.0);
            }
        }
        for saga in &self.sagas {
            let labels = [("name", saga.name.clone()), ("status", saga.status.clone())];
            let age = (chrono::Utc::now() - saga.oldest_at).num_milliseconds() as f64 / 1000.0;
            gauge!("auth_sagas", &labels).set(saga.count as f64);
            gauge!("auth_sagas_oldest_seconds", &labels).set(age.max(0.0));
        }

        says!("auth_inbox_attention", "Messages of other services that had no effect and should be looked at");
        for outcome in ["unknown", "unexpected", "rejected"] {
            let found = self.attention.iter().find(|attention| attention.outcome == outcome);
            gauge!("auth_inbox_attention", "outcome" => outcome).set(found.map_or(0.0, |found| found.count as f64));
        }
    }
}

/// What this process knows of itself without having counted it.
fn own(app: &App) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        use metrics::describe_gauge as says;
        says!("auth_build_info", "The version that runs");
        says!("auth_uptime_seconds", "How long it has been running");
        says!("auth_db_pool_connections", "Connections of the requests' pool, by state");
        says!("auth_db_pool_max_connections", "Most that it may have");
        gauge!("auth_build_info", "version" => env!("CARGO_PKG_VERSION")).set(1.0);
        gauge!("auth_uptime_seconds").set(app.started.elapsed().as_secs_f64());
        let (open, idle) = app.db.connections();
        gauge!("auth_db_pool_connections", "state" => "idle").set(idle as f64);
        gauge!("auth_db_pool_connections", "state" => "used").set(f64::from(open) - idle as f64);
        says!("auth_task_up", "1 while a task of this process runs, 0 while it waits to be started again");
        metrics::describe_counter!("auth_task_restarts_total", "How often a task of this process was started again");
        for (name, task) in app.supervisor.tasks() {
            gauge!("auth_task_up", "task" => name.clone()).set(f64::from(u8::from(task.up)));
            metrics::counter!("auth_task_restarts_total", "task" => name).absolute(task.restarts);
        }
        gauge!("auth_db_pool_max_connections").set(f64::from(app.config.database.pool_size));
    });
    recorder.handle().render()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_database_that_is_away_leaves_no_figure_but_that_one() {
        let text = rendered(&None);
        assert!(text.contains("auth_database_up 0\n"), "{text}");
        assert!(!text.contains("auth_outbox"), "{text}");
    }

    #[test]
    fn every_figure_an_alert_hangs_on_is_there_from_the_start() {
        let outbox = Figures { pending: 3, parked: 2, parked_keys: 1, oldest_unsent_seconds: 1.5, outbox_bytes: 8192 };
        let stuck = SagaCount {
            name: "create_user".to_owned(),
            status: "stuck".to_owned(),
            count: 4,
            oldest_at: chrono::Utc::now(),
        };
        let text = rendered(&Some(Known { outbox, sagas: vec![stuck], attention: vec![] }));
        for line in [
            "auth_database_up 1\n",
            "auth_outbox_pending 3\n",
            "auth_outbox_bytes 8192\n",
            "auth_outbox_parked 2\n",
            "auth_outbox_oldest_unsent_seconds 1.5\n",
            "auth_sagas{name=\"create_user\",status=\"stuck\"} 4\n",
            "auth_sagas{name=\"create_user\",status=\"running\"} 0\n",
            "auth_inbox_attention{outcome=\"rejected\"} 0\n",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}

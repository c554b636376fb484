//! The relays: lanes, owners, lag; pause and resume.

use axum::extract::State;
use outbox_relay::admin::{self as relay, RelayStatus};
use serde_json::{Value, json};
use sqlx::Connection;

use super::{Success, auth::Operator, change::Attempt, error::AdminError, params::Order};
use crate::{app::App, config::Scope, db::audit::Outcome};

/// `GET /admin/relay`
pub async fn show(State(app): State<App>) -> Result<Success<RelayStatus>, AdminError> {
    let status = app.db.run(|conn| Box::pin(relay::relay_status(conn))).await?;
    Ok(Success::of("Relays and lanes", status))
}

/// `POST /admin/relay/pause`
pub async fn pause(
    State(app): State<App>,
    operator: Operator,
    order: Result<Order, AdminError>,
) -> Result<Success<Value>, AdminError> {
    set(&app, operator, order, true).await
}

/// `POST /admin/relay/resume`
pub async fn resume(
    State(app): State<App>,
    operator: Operator,
    order: Result<Order, AdminError>,
) -> Result<Success<Value>, AdminError> {
    set(&app, operator, order, false).await
}

async fn set(
    app: &App,
    operator: Operator,
    order: Result<Order, AdminError>,
    paused: bool,
) -> Result<Success<Value>, AdminError> {
    let action = if paused { "relay.pause" } else { "relay.resume" };
    let reason = order.as_ref().map_or_else(|_| String::new(), |order| order.reason.clone());
    let attempt = Attempt { operator, action, target: "all relays".to_owned(), reason };
    attempt.require(app, Scope::Operate).await?;
    let order = order?;
    if order.force || !order.filter.is_empty() {
        return Err(AdminError::field("body", "takes a reason and dryRun only"));
    }
    let (dry_run, wake) = (order.dry_run, app.wake.clone());
    let changed = app.db.run(move |conn| {
        Box::pin(async move {
            let mut tx = conn.begin().await?;
            let changed = relay::set_paused(&mut tx, paused.then_some(attempt.operator.name())).await?;
            if dry_run {
                tx.rollback().await?;
            } else {
                let outcome = if changed { Outcome::Done } else { Outcome::Unchanged };
                attempt.note(&mut tx, outcome, &json!({})).await?;
                tx.commit().await?;
                if !paused {
                    wake.notify();
                }
            }
            Ok::<_, sqlx::Error>(changed)
        })
    });
    let changed = changed.await?;
    let message = match (paused, changed) {
        (true, true) => "The relays stop sending at their next lease renewal",
        (true, false) => "The relays were paused already",
        (false, true) => "The relays go on",
        (false, false) => "The relays were not paused",
    };
    Ok(Success::of(message, json!({ "paused": paused, "changed": changed, "dryRun": order.dry_run })))
}

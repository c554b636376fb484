//! The relays: lanes, owners, lag; pause and resume.

use axum::extract::State;
use outbox_relay::admin::{self as relay, RelayStatus};
use serde_json::{Value, json};
use sqlx::Acquire;

use super::{Success, auth::Operator, change::Attempt, error::AdminError, params::Order};
use crate::{
    app::App,
    config::Scope,
    db::{self, audit::Outcome},
};

/// `GET /admin/relay`
pub async fn show(State(app): State<App>) -> Result<Success<RelayStatus>, AdminError> {
    let status = db::on(&app.db, async |conn| relay::relay_status(conn).await).await?;
    Ok(Success::of("Relays and lanes", status))
}

/// `POST /admin/relay/pause`
pub async fn pause(
    State(app): State<App>,
    operator: Operator,
    order: Result<Order, AdminError>,
) -> Result<Success<Value>, AdminError> {
    set(&app, &operator, order, true).await
}

/// `POST /admin/relay/resume`
pub async fn resume(
    State(app): State<App>,
    operator: Operator,
    order: Result<Order, AdminError>,
) -> Result<Success<Value>, AdminError> {
    set(&app, &operator, order, false).await
}

async fn set(
    app: &App,
    operator: &Operator,
    order: Result<Order, AdminError>,
    paused: bool,
) -> Result<Success<Value>, AdminError> {
    let action = if paused { "relay.pause" } else { "relay.resume" };
    let reason = order.as_ref().map_or("", |order| order.reason.as_str());
    let attempt = Attempt { operator, action, target: "all relays", reason };
    attempt.require(app, Scope::Operate).await?;
    let order = order.as_ref().map_err(AdminError::clone)?;
    if order.force || !order.filter.is_empty() {
        return Err(AdminError::field("body", "takes a reason and dryRun only"));
    }
    let changed = db::on(&app.db, async |conn| {
        let mut tx = conn.begin().await?;
        let changed = relay::set_paused(&mut tx, paused.then_some(operator.name())).await?;
        if order.dry_run {
            tx.rollback().await?;
        } else {
            let outcome = if changed { Outcome::Done } else { Outcome::Unchanged };
            attempt.note(&mut tx, outcome, &json!({})).await?;
            tx.commit().await?;
        }
        Ok(changed)
    })
    .await?;
    if !paused && !order.dry_run {
        app.wake.notify();
    }
    let message = match (paused, changed) {
        (true, true) => "The relays stop sending at their next lease renewal",
        (true, false) => "The relays were paused already",
        (false, true) => "The relays go on",
        (false, false) => "The relays were not paused",
    };
    Ok(Success::of(message, json!({ "paused": paused, "changed": changed, "dryRun": order.dry_run })))
}

//! Sending again: one row, or all rows of a filter.
//!
//! Each call is one transaction with its line in the audit log. A dry run is the same transaction,
//! rolled back: it tells what would happen, not what somebody thinks would.

use axum::extract::State;
use outbox_relay::{
    ReplayError, Replayed,
    admin::{self as outbox, OutboxFilter, RowStatus},
    replay,
};
use serde::Serialize;
use serde_json::{Value, json};
use sqlx::{Connection, PgConnection};

use super::{
    Success,
    auth::Operator,
    change::Attempt,
    error::AdminError,
    outbox::{filter, row_id, unknown},
    params::{Id, Order, Params},
};
use crate::{app::App, config::Scope, db::audit::Outcome};

const ACTION: &str = "outbox.replay";

/// `POST /admin/outbox/{id}/replay`
pub async fn one(
    State(app): State<App>,
    operator: Operator,
    Id(id): Id,
    order: Result<Order, AdminError>,
) -> Result<Success<Value>, AdminError> {
    let number = row_id(&id)?;
    let reason = order.as_ref().map_or_else(|_| String::new(), |order| order.reason.clone());
    let attempt = Attempt { operator, action: ACTION, target: format!("row {number}"), reason };
    attempt.require(&app, Scope::Operate).await?;
    let order = order?;
    if order.force {
        attempt.require(&app, Scope::Admin).await?;
    }
    if !order.filter.is_empty() {
        return Err(AdminError::field("filter", "belongs to POST /admin/outbox/replay"));
    }
    let (Order { force, dry_run, .. }, wake) = (order, app.wake.clone());
    let replayed = app.db.run(move |conn| {
        Box::pin(async move {
            let mut tx = conn.begin().await?;
            let replayed = match replay(&mut tx, number, force).await {
                Err(ReplayError::Database(error)) => return Err(error),
                replayed => replayed,
            };
            let (outcome, detail) = match &replayed {
                Ok(replayed) => (Outcome::Done, json!({ "forced": force, "did": replayed })),
                Err(why) => (Outcome::Refused, json!({ "why": why.to_string() })),
            };
            if dry_run || matches!(replayed, Err(ReplayError::NotFound(_))) {
                tx.rollback().await?;
            } else {
                attempt.note(&mut tx, outcome, &detail).await?;
                tx.commit().await?;
                wake.notify();
            }
            Ok(replayed)
        })
    });
    match replayed.await? {
        Ok(replayed) => {
            let message = if dry_run { "Would be sent again" } else { "Is being sent again" };
            let mut data = json!(replayed);
            data["dryRun"] = dry_run.into();
            Ok(Success::of(message, data))
        }
        Err(ReplayError::NotFound(_)) => Err(unknown(&id)),
        Err(why) => Err(AdminError::Refused(why.to_string())),
    }
}

/// `POST /admin/outbox/replay`: the filter in the query, as for the list, or as `filter` in the body.
/// Without a status it is about parked rows.
pub async fn many(
    State(app): State<App>,
    operator: Operator,
    params: Params,
    order: Result<Order, AdminError>,
) -> Result<Success<Many>, AdminError> {
    let reason = order.as_ref().map_or_else(|_| String::new(), |order| order.reason.clone());
    let attempt = Attempt { operator, action: ACTION, target: "filter".to_owned(), reason };
    attempt.require(&app, Scope::Operate).await?;
    let order = order?;
    if order.force {
        attempt.require(&app, Scope::Admin).await?;
    }
    let filter = chosen(params, &order)?;
    let (dry_run, wake) = (order.dry_run, app.wake.clone());
    let many = app.db.run(move |conn| {
        Box::pin(async move {
            let mut tx = conn.begin().await?;
            let many = replay_all(&mut tx, &filter, &order).await?;
            if dry_run {
                tx.rollback().await?;
                return Ok::<_, sqlx::Error>(many);
            }
            let outcome = match (many.replayed.is_empty(), many.refused.is_empty()) {
                (false, _) => Outcome::Done,
                (true, false) => Outcome::Refused,
                (true, true) => Outcome::Unchanged,
            };
            attempt.note(&mut tx, outcome, &many.detail(&filter, order.force)).await?;
            tx.commit().await?;
            wake.notify();
            Ok(many)
        })
    });
    let many = many.await?;
    let message = match (many.replayed.is_empty(), dry_run) {
        (true, _) => "Nothing to send again",
        (false, true) => "Would be sent again",
        (false, false) => "Are being sent again",
    };
    Ok(Success::of(message, many))
}

/// What a replay by filter did, or would do.
#[derive(Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Many {
    dry_run: bool,
    replayed: Vec<Replayed>,
    refused: Vec<NotReplayed>,
    /// As many rows as the limit allows were looked at; pass this as `cursor` for older ones.
    next_cursor: Option<i64>,
}

#[derive(Debug, Serialize)]
struct NotReplayed {
    id: i64,
    why: String,
}

impl Many {
    fn detail(&self, filter: &OutboxFilter, forced: bool) -> Value {
        json!({
            "filter": {
                "status": filter.status,
                "topic": filter.topic,
                "key": filter.key,
                "sagaId": filter.saga_id,
                "cursor": filter.cursor,
                "limit": filter.limit,
            },
            "forced": forced,
            "did": self.replayed,
            "refused": self.refused,
        })
    }
}

fn chosen(mut params: Params, order: &Order) -> Result<OutboxFilter, AdminError> {
    params.add_object(order.filter.clone());
    let mut filter = filter(params)?;
    match filter.status {
        None => filter.status = Some(RowStatus::Parked),
        Some(RowStatus::Pending) => {
            return Err(AdminError::field("status", "can't be pending: those rows go out by themselves"));
        }
        // All of history at once is nobody's intention.
        Some(RowStatus::Published) if filter.topic.is_none() && filter.key.is_none() && filter.saga_id.is_none() => {
            return Err(AdminError::field("filter", "for published rows name a topic, key or sagaId too"));
        }
        Some(_) => {}
    }
    Ok(filter)
}

async fn replay_all(conn: &mut PgConnection, filter: &OutboxFilter, order: &Order) -> Result<Many, sqlx::Error> {
    let mut rows = outbox::list(&mut *conn, filter).await?;
    let next_cursor = rows.last().map(|row| row.id).filter(|_| i64::try_from(rows.len()) == Ok(filter.limit));
    // Key by key, which is what gets locked: two operators at once can't deadlock. Oldest first within a key: what
    // is sent again keeps its order.
    rows.sort_unstable_by(|one, other| (&one.key, one.id).cmp(&(&other.key, other.id)));
    let mut many = Many { dry_run: order.dry_run, replayed: vec![], refused: vec![], next_cursor };
    let mut freed: Vec<i64> = vec![];
    for id in rows.into_iter().map(|row| row.id) {
        // It went along with an earlier row of its key.
        if freed.contains(&id) {
            continue;
        }
        match replay(conn, id, order.force).await {
            Ok(replayed) => {
                if let Replayed::Parked { rows, .. } = &replayed {
                    freed.extend(rows);
                }
                many.replayed.push(replayed);
            }
            Err(ReplayError::Database(error)) => return Err(error),
            Err(why) => many.refused.push(NotReplayed { id, why: why.to_string() }),
        }
    }
    Ok(many)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen_by(filter: Value) -> Result<OutboxFilter, AdminError> {
        let filter = filter.as_object().cloned().expect("an object");
        chosen(Params::default(), &Order { reason: "r".into(), filter, ..Order::default() })
    }

    #[test]
    fn without_a_status_parked_rows_are_meant() {
        let filter = chosen_by(json!({ "topic": "user.create" })).expect("good");
        assert_eq!((filter.status, filter.topic.as_deref()), (Some(RowStatus::Parked), Some("user.create")));
        assert_eq!(chosen_by(json!({})).expect("good").status, Some(RowStatus::Parked));
    }

    #[test]
    fn neither_what_goes_out_by_itself_nor_all_of_history_is_replayed() {
        assert!(chosen_by(json!({ "status": "pending" })).is_err());
        assert!(chosen_by(json!({ "status": "published" })).is_err());
        assert!(chosen_by(json!({ "status": "published", "key": 42 })).is_ok());
        assert!(chosen_by(json!({ "stattus": "parked" })).is_err());
        assert!(chosen_by(json!({ "sagaId": "x" })).is_err());
    }
}

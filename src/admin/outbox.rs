//! Looking at the outbox.

use axum::extract::State;
use base64::{Engine, engine::general_purpose::STANDARD};
use outbox_relay::admin::{self as outbox, OutboxFilter, OutboxRow, RowStatus};
use serde_json::{Value, json};

use super::{
    Success,
    error::AdminError,
    params::{Id, Params},
};
use crate::app::App;

/// `GET /admin/outbox`
pub async fn list(State(app): State<App>, params: Params) -> Result<Success<Vec<Value>>, AdminError> {
    let filter = filter(params)?;
    let limit = filter.limit;
    let rows = app.db.run(move |conn| Box::pin(async move { outbox::list(conn, &filter).await })).await?;
    let shown = rows.iter().map(shown).collect();
    Ok(Success::page("Outbox rows, newest first", shown, limit, |row: &Value| row["id"].to_string()))
}

/// `GET /admin/outbox/{id}`
pub async fn show(State(app): State<App>, Id(id): Id) -> Result<Success<Value>, AdminError> {
    let number = row_id(&id)?;
    let row = app.db.run(move |conn| Box::pin(outbox::show(conn, number))).await?;
    match row {
        Some(row) => Ok(Success::of("Outbox row", shown(&row))),
        None => Err(unknown(&id)),
    }
}

/// The rows a query, or a change by filter, is about.
pub fn filter(mut params: Params) -> Result<OutboxFilter, AdminError> {
    let filter = OutboxFilter {
        status: params.take("status", "pending, parked or published", RowStatus::parse),
        topic: params.text("topic"),
        key: params.text("key"),
        saga_id: params.take("sagaId", "a UUID", |text| text.parse().ok()),
        cursor: params.cursor(),
        limit: params.limit(),
    };
    params.finish()?;
    Ok(filter)
}

/// A row's number. What is none names no row.
pub fn row_id(text: &str) -> Result<i64, AdminError> {
    text.parse().map_err(|_| unknown(text))
}

/// There is no such row.
pub fn unknown(id: &str) -> AdminError {
    AdminError::Unknown(format!("There is no outbox row {id:?} (rows that are out are kept for ARCHIVE_RETENTION)"))
}

/// The row with its value, as JSON where it is JSON.
fn shown(row: &OutboxRow) -> Value {
    let mut shown = json!(row);
    match serde_json::from_slice::<Value>(&row.payload) {
        Ok(payload) => shown["payload"] = payload,
        Err(_) => shown["payloadBase64"] = STANDARD.encode(&row.payload).into(),
    }
    shown
}

#[cfg(test)]
mod tests {
    use chrono::DateTime;
    use uuid::Uuid;

    use super::*;

    fn row(payload: &[u8]) -> OutboxRow {
        OutboxRow {
            id: 7,
            status: "parked".to_owned(),
            lane: 3,
            key: "42".to_owned(),
            seq: 1,
            message_id: Uuid::from_u128(1),
            topic: "user.create".to_owned(),
            payload: payload.to_vec(),
            headers: json!({}),
            saga_id: None,
            replay_of: None,
            created_at: DateTime::UNIX_EPOCH,
            parked_at: None,
            reason: Some("too large".to_owned()),
            published_at: None,
            partition: None,
            offset: None,
        }
    }

    #[test]
    fn a_value_is_shown_as_what_it_is() {
        let json = shown(&row(br#"{"id":42}"#));
        assert_eq!((&json["payload"], &json["messageId"]), (&json!({ "id": 42 }), &json!(Uuid::from_u128(1))));
        let bytes = shown(&row(b"\xff\x00"));
        assert_eq!((bytes.get("payload"), &bytes["payloadBase64"]), (None, &json!("/wA=")));
    }

    #[test]
    fn an_id_that_is_no_number_names_no_row() {
        assert_eq!(row_id("12"), Ok(12));
        for id in ["", "x", "1.5", "99999999999999999999", "1;drop"] {
            assert!(matches!(row_id(id), Err(AdminError::Unknown(_))), "{id}");
        }
    }
}

//! Looking at sagas.

use axum::extract::State;
use saga_orchestrator::{
    Saga, Status,
    admin::{self as sagas, SagaFilter},
    store,
};
use serde_json::{Value, json};
use uuid::Uuid;

use super::{
    Success,
    error::AdminError,
    params::{Id, Params},
};
use crate::app::App;

/// `GET /admin/sagas`
pub async fn list(State(app): State<App>, mut params: Params) -> Result<Success<Vec<Saga>>, AdminError> {
    let filter = SagaFilter {
        status: params.take("status", "running, resolving, completed, compensated or stuck", Status::parse),
        name: params.text("name"),
        subject: params
            .take("userId", "a whole number", |text| text.parse::<i64>().ok())
            .map(|user_id| user_id.to_string()),
        cursor: params.cursor(),
        limit: params.limit(),
    };
    params.finish()?;
    let limit = filter.limit;
    let found = app.db.run(move |conn| Box::pin(async move { sagas::list(conn, &filter).await })).await?;
    Ok(Success::page("Sagas, newest first", found, limit, |saga| saga.saga_id.to_string()))
}

/// `GET /admin/sagas/{id}`: the saga, with everything that happened to it.
pub async fn show(State(app): State<App>, Id(id): Id) -> Result<Success<Value>, AdminError> {
    let unknown = || AdminError::Unknown(format!("There is no saga {id:?}"));
    let saga_id: Uuid = id.parse().map_err(|_| unknown())?;
    let found = app.db.run(move |conn| {
        Box::pin(async move {
            let Some(saga) = store::find(&mut *conn, saga_id).await? else { return Ok::<_, sqlx::Error>(None) };
            Ok(Some((saga, sagas::timeline(conn, saga_id).await?)))
        })
    });
    let (saga, timeline) = found.await?.ok_or_else(unknown)?;
    let mut shown = json!(saga);
    shown["timeline"] = json!(timeline);
    Ok(Success::of("Saga", shown))
}

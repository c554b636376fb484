//! Who did what.

use axum::extract::State;

use super::{Success, error::AdminError, params::Params};
use crate::{
    app::App,
    db::audit::{self, AuditFilter, Line},
};

/// `GET /admin/audit`
pub async fn list(State(app): State<App>, mut params: Params) -> Result<Success<Vec<Line>>, AdminError> {
    let filter = AuditFilter {
        actor: params.text("actor"),
        action: params.text("action"),
        cursor: params.cursor(),
        limit: params.limit(),
    };
    params.finish()?;
    let limit = filter.limit;
    let lines = app.db.run(move |conn| Box::pin(async move { audit::list(conn, &filter).await })).await?;
    Ok(Success::page("Changes by operators, newest first", lines, limit, |line| line.id.to_string()))
}

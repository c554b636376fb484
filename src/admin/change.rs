//! An operator's attempt to change something, and its line in the audit log.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{auth::Operator, error::AdminError};
use crate::{
    app::App,
    config::Scope,
    db::audit::{self, NewLine, Outcome},
};

/// Who wants what done to what.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// Who.
    pub operator: Operator,
    /// What, for example `outbox.replay`.
    pub action: &'static str,
    /// To what.
    pub target: String,
    /// Why; empty when the attempt is refused before that is looked at.
    pub reason: String,
}

impl Attempt {
    /// Writes the line, in the transaction of the change.
    pub async fn note(&self, conn: &mut PgConnection, outcome: Outcome, detail: &Value) -> Result<(), sqlx::Error> {
        let line = NewLine {
            actor: self.operator.name(),
            action: self.action,
            target: &self.target,
            reason: Some(self.reason.as_str()).filter(|reason| !reason.is_empty()),
            outcome,
            detail,
        };
        audit::insert(conn, &line).await?;
        tracing::info!(
            actor = line.actor,
            action = line.action,
            target = line.target,
            outcome = outcome.as_str(),
            "an operator's change"
        );
        Ok(())
    }

    /// An error unless the operator may; the attempt is in the audit log all the same.
    pub async fn require(&self, app: &App, needed: Scope) -> Result<(), AdminError> {
        if self.operator.may(needed) {
            return Ok(());
        }
        metrics::counter!("auth_admin_refusals_total", "why" => "scope").increment(1);
        let detail = json!({ "needed": needed.as_str() });
        let attempt = self.clone();
        let noted =
            app.db.run(move |conn| Box::pin(async move { attempt.note(conn, Outcome::Forbidden, &detail).await }));
        if let Err(error) = noted.await {
            tracing::error!(
                actor = self.operator.name(), action = self.action, target = self.target.as_str(), %error,
                "a forbidden attempt could not be written to the audit log"
            );
        }
        Err(AdminError::ScopeTooSmall(needed))
    }
}

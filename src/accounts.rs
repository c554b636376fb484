//! Accounts: registered, signed in to, looked at, and taken back.

mod failures;
mod login;
mod outcome;
mod registration;

use serde_json::json;
use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    app::App,
    db::{
        audit::{self, NewLine, Outcome},
        users,
    },
    domain::{User, UserId},
};

pub use failures::FailedLogins;
pub use login::{LoggedIn, LoginError, login};
pub use registration::{NewAccount, RegisterError, Registered, register};

/// What a request says about itself.
#[derive(Debug, Clone, Default)]
pub struct RequestContext {
    /// Ties together everything that follows from the request.
    pub correlation_id: String,
    /// The client chose it.
    pub correlation_given: bool,
    /// W3C trace context, as it came.
    pub traceparent: Option<String>,
    /// What the client calls itself.
    pub user_agent: Option<String>,
    /// Makes a repeated registration get the first one's answer.
    pub idempotency_key: Option<String>,
}

/// The user with this id.
pub async fn get_account(app: &App, id: UserId) -> Result<Option<User>, sqlx::Error> {
    app.db.run(move |conn| Box::pin(users::find(conn, id))).await
}

/// Notes that the user's address is its own, on the word of `caller`, and leaves a line in the audit
/// log. Repeated, it changes nothing and leaves none.
///
/// A user that is still pending is marked like any other: whose an address is does not hang on the
/// profile, which may take as long as Kafka is away, and a link in an e-mail is followed once. If the
/// registration is taken back, the mark goes with it.
pub async fn mark_verified(app: &App, id: UserId, caller: &str) -> Result<Option<User>, sqlx::Error> {
    let caller = caller.to_owned();
    let marked = app.db.transaction(move |conn| {
        Box::pin(async move {
            let Some(user) = users::mark_verified(conn, id).await? else {
                return users::find(conn, id).await;
            };
            let line = NewLine {
                actor: &caller,
                action: "account.mark-verified",
                target: &format!("user {id}"),
                reason: None,
                outcome: Outcome::Done,
                detail: &json!({ "status": user.status.as_str() }),
            };
            audit::insert(conn, &line).await?;
            tracing::info!(caller, user.id = %id, "a caller marked an account as verified");
            Ok(Some(user))
        })
    });
    marked.await
}

/// The create saga has completed, in whose transaction this runs. `false` when the user is not
/// pending in it.
pub async fn activate(conn: &mut PgConnection, id: UserId, saga_id: Uuid) -> Result<bool, sqlx::Error> {
    users::activate(conn, id, saga_id).await
}

/// The create saga is taken back, in whose transaction this runs: the user, its sessions and its
/// identifiers go. `false` when the user is not pending in it, and then nothing has happened.
pub async fn take_back(conn: &mut PgConnection, id: UserId, saga_id: Uuid) -> Result<bool, sqlx::Error> {
    users::delete_pending(conn, id, saga_id).await
}

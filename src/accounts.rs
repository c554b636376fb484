//! Accounts: registered, signed in to, looked at, and taken back.

mod login;
mod outcome;
mod registration;

use sqlx::PgConnection;
use uuid::Uuid;

use crate::{
    app::App,
    db::users,
    domain::{User, UserId},
};

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

/// Notes that the user's address is its own. Repeated, it changes nothing.
pub async fn mark_verified(app: &App, id: UserId) -> Result<Option<User>, sqlx::Error> {
    app.db.run(move |conn| Box::pin(users::mark_verified(conn, id))).await
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

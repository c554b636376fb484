use std::{error::Error, time::Duration};

use secrecy::SecretString;
use uuid::Uuid;

use super::{
    RequestContext,
    failures::{self, Failure},
};
use crate::{
    app::App,
    crypto::HashError,
    db::{
        self,
        users::{self, Credentials},
    },
    domain::{Identifier, Password, User},
    sessions::{self, Carried, TokenPair},
};

/// A login that succeeded.
#[derive(Debug)]
pub struct LoggedIn {
    /// Who.
    pub user: User,
    /// The new session's tokens.
    pub tokens: TokenPair,
}

/// Why a login did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum LoginError {
    /// Unknown, wrong or no longer let in: the same to everyone outside.
    #[error("unknown user or wrong password")]
    Refused,
    /// More passwords to check than this machine can.
    #[error("too many passwords are being checked")]
    Busy {
        /// When to come again.
        retry_after: Duration,
    },
    /// The database is away.
    #[error("the database did not answer")]
    Unavailable(#[source] sqlx::Error),
    /// What nobody foresaw.
    #[error("the login failed")]
    Unforeseen(#[source] Box<dyn Error + Send + Sync>),
}

/// Signs a user in. A session of which the client still holds a refresh token is replaced by the new
/// one (`held`).
///
/// An unknown name costs the same work as a wrong password, and no connection is held while a
/// password is hashed.
pub async fn login(
    app: &App,
    identifier: Option<Identifier>,
    password: SecretString,
    held: &Carried,
    context: &RequestContext,
) -> Result<LoggedIn, LoginError> {
    let named = match identifier {
        Some(identifier) => {
            app.db.run(move |conn| Box::pin(async move { users::credentials(conn, &identifier).await })).await?
        }
        None => None,
    };
    let user_id = named.as_ref().map(|named| named.user.id);
    let known = named.filter(|named| sessions::may_sign_in(&named.user));
    let stored = known.as_ref().map(|known| known.password_hash.as_str());
    let verdict = app.hasher.verify(&password, stored).await?;
    let why = match (user_id, &known) {
        (None, _) => Failure::UnknownUser,
        (Some(_), None) => Failure::MayNotSignIn,
        (Some(_), Some(_)) => Failure::WrongPassword,
    };
    let Some(known) = known.filter(|_| verdict.matches) else {
        failures::note(app, user_id, why);
        metrics::counter!("auth_logins_total", "outcome" => "refused").increment(1);
        return Err(LoginError::Refused);
    };
    let opened = {
        let (known, signer, agent) = (known.clone(), app.signer.clone(), context.user_agent.clone());
        let held = held.clone();
        app.db.transaction(move |conn| {
            Box::pin(async move {
                let Some(user) = users::hold(conn, &known).await? else {
                    return Ok::<_, sqlx::Error>(None);
                };
                sessions::replace_held(conn, &signer, &held).await?;
                let session = sessions::open(conn, &signer, Uuid::now_v7(), user.id, agent.as_deref()).await?;
                Ok(Some((user, session)))
            })
        })
    };
    // Deleted, or given another password, while this one was being checked.
    let Some((user, session)) = opened.await? else {
        failures::note(app, user_id, Failure::ChangedMeanwhile);
        return Err(LoginError::Refused);
    };
    if verdict.needs_rehash {
        rehash(app, known, password).await;
    }
    let tokens = sessions::tokens(&app.signer, &user, &session, session.issued_at)
        .map_err(|error| LoginError::Unforeseen(error.into()))?;
    metrics::counter!("auth_logins_total", "outcome" => "accepted").increment(1);
    Ok(LoggedIn { user, tokens })
}

/// Stores the password in today's form. A login never fails over it: the next one tries again.
async fn rehash(app: &App, known: Credentials, password: SecretString) {
    // Its length was another day's business.
    let Ok(password) = Password::parse(password, 0, None) else {
        return;
    };
    let user_id = known.user.id;
    let rehashed = async {
        let hash = app.hasher.hash(&password).await?;
        app.db.run(move |conn| Box::pin(async move { users::replace_hash(conn, &known, &hash).await })).await?;
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    };
    if let Err(error) = rehashed.await {
        tracing::info!(user.id = %user_id, error, "a password was not rehashed; the next login tries again");
    }
}

impl From<sqlx::Error> for LoginError {
    fn from(error: sqlx::Error) -> Self {
        match db::is_away(&error) {
            true => LoginError::Unavailable(error),
            false => LoginError::Unforeseen(error.into()),
        }
    }
}

impl From<HashError> for LoginError {
    fn from(error: HashError) -> Self {
        match error {
            HashError::Busy { retry_after } => LoginError::Busy { retry_after },
            HashError::Failed => LoginError::Unforeseen(error.into()),
        }
    }
}

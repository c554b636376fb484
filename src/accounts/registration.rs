use std::{error::Error, sync::Arc, time::Duration};

use outbox_relay::{WorkError, fault_points};
use saga_orchestrator::{NewSaga, SagaError, flows::create_user, store};
use secrecy::SecretString;
use sqlx::{Connection, PgConnection};
use tokio::time::timeout;
use uuid::Uuid;

use super::{
    RequestContext,
    failures::{self, Failure},
    outcome::outcome,
};
use crate::{
    app::App,
    crypto::HashError,
    db::{
        self,
        users::{self, NewUser},
    },
    domain::{Email, FieldError, Password, User, Username},
    sessions::{self, TokenPair},
};

/// Saga ids made from idempotency keys live in this namespace.
const IDEMPOTENCY: Uuid = Uuid::from_u128(0x8f0f_6d0e_6f0b_4c57_9b1d_0d0a_37c1_5e2b);
/// How long the statements before the COMMIT may take.
const PREPARE_TIMEOUT: Duration = Duration::from_secs(8);
/// How long a COMMIT may take before its answer counts as lost.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(5);

/// A registration as it came in; nothing is checked yet.
#[derive(Debug)]
pub struct NewAccount {
    /// The name wanted.
    pub username: String,
    /// The address.
    pub email: String,
    /// The password wanted.
    pub password: SecretString,
}

/// A registration that is in the database.
#[derive(Debug)]
pub struct Registered {
    /// The user.
    pub user: User,
    /// The saga that makes the profile.
    pub saga_id: Uuid,
    /// Signed in at once.
    pub tokens: TokenPair,
}

/// Why there is no registration.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    /// These fields.
    #[error("the registration is not valid")]
    Invalid(Vec<FieldError>),
    /// Somebody has the address.
    #[error("the e-mail address is taken")]
    EmailTaken,
    /// Somebody has the name.
    #[error("the username is taken")]
    UsernameTaken,
    /// The registration under this idempotency key was taken back meanwhile.
    #[error("the registration under this idempotency key was taken back")]
    TakenBack,
    /// More passwords to hash than this machine can.
    #[error("too many passwords are being hashed")]
    Busy {
        /// When to come again.
        retry_after: Duration,
    },
    /// The database is away; nothing was written.
    #[error("the database did not answer; nothing was written")]
    Unavailable(#[source] sqlx::Error),
    /// The answer to COMMIT was lost, and what became of it could not be learnt.
    #[error("whether the registration was written is not known")]
    OutcomeUnknown,
    /// What nobody foresaw; nothing was written.
    #[error("the registration failed; nothing was written")]
    Unforeseen(#[source] Box<dyn Error + Send + Sync>),
}

/// Registers a user: user, session, saga and outbox row in one transaction.
///
/// The saga's id is chosen beforehand, so that a lost COMMIT can be looked up; made from the
/// idempotency key, it is also what a repeated request is known by.
pub async fn register(app: &App, new: NewAccount, context: &RequestContext) -> Result<Registered, RegisterError> {
    let valid = Arc::new(Valid::check(new, app.config.passwords.min_length)?);
    let keyed = context.idempotency_key.as_deref().map(|key| valid.saga_id(key));
    if let Some(saga_id) = keyed
        && let Some(again) = repeat(app, &valid, saga_id, context).await?
    {
        return Ok(again);
    }
    let password_hash = app.hasher.hash(&valid.password).await?;
    let saga_id = keyed.unwrap_or_else(Uuid::now_v7);
    match write(app, valid.clone(), password_hash, saga_id, context).await {
        Ok(registered) => Ok(registered),
        // Two requests under one key at once: the other one was faster.
        Err(conflict @ (RegisterError::EmailTaken | RegisterError::UsernameTaken)) if keyed.is_some() => {
            repeat(app, &valid, saga_id, context).await?.ok_or(conflict)
        }
        Err(error) => Err(error),
    }
}

/// A registration whose fields are good.
struct Valid {
    username: Username,
    email: Email,
    password: Password,
}

impl Valid {
    fn check(new: NewAccount, min_password: usize) -> Result<Self, RegisterError> {
        let username = Username::parse(&new.username);
        let email = Email::parse(&new.email);
        let owner = username.as_ref().ok().zip(email.as_ref().ok());
        let password = Password::parse(new.password, min_password, owner);
        match (username, email, password) {
            (Ok(username), Ok(email), Ok(password)) => Ok(Self { username, email, password }),
            (username, email, password) => Err(RegisterError::Invalid(
                [username.err(), email.err(), password.err()].into_iter().flatten().collect(),
            )),
        }
    }

    /// The names are part of it: one key with other data is another registration.
    fn saga_id(&self, key: &str) -> Uuid {
        let name = format!("{key}\0{}\0{}", self.username.canonical(), self.email.canonical());
        Uuid::new_v5(&IDEMPOTENCY, name.as_bytes())
    }
}

/// The session a registration opens has an id that follows from the saga's, so that a repeated
/// request finds it again.
fn first_session_id(saga_id: Uuid) -> Uuid {
    Uuid::new_v5(&saga_id, b"first session")
}

/// The answer to a request whose registration exists already: the first one's, to whoever knows the
/// password. `None` when there is no such registration.
async fn repeat(
    app: &App,
    valid: &Valid,
    saga_id: Uuid,
    context: &RequestContext,
) -> Result<Option<Registered>, RegisterError> {
    let looked = app.db.run(move |conn| {
        Box::pin(async move {
            Ok::<_, sqlx::Error>((store::find(conn, saga_id).await?, users::created_by(conn, saga_id).await?))
        })
    });
    let (saga, created) = looked.await?;
    let created = match (saga, created) {
        (_, Some(created)) => created,
        (None, None) => return Ok(None),
        // Compensated, or deleted since by its owner.
        (Some(_), None) => return Err(RegisterError::TakenBack),
    };
    let verdict = app.hasher.verify(valid.password.as_secret(), Some(&created.password_hash)).await?;
    if !verdict.matches {
        failures::note(app, Some(created.user.id), Failure::WrongPassword);
        return Err(RegisterError::EmailTaken);
    }
    let (signer, agent) = (app.signer.clone(), context.user_agent.clone());
    let session = app.db.transaction(move |conn| {
        Box::pin(async move {
            let Some(user) = users::hold(conn, &created).await? else {
                return Ok::<_, sqlx::Error>(None);
            };
            let (session, now) = match sessions::live(conn, first_session_id(saga_id)).await? {
                Some(found) => (found.session, found.now),
                None => {
                    let opened = sessions::open(conn, &signer, Uuid::now_v7(), user.id, agent.as_deref()).await?;
                    let now = opened.issued_at;
                    (opened, now)
                }
            };
            Ok(Some((user, session, now)))
        })
    });
    let Some((user, session, now)) = session.await? else {
        return Err(RegisterError::TakenBack);
    };
    let tokens = sessions::tokens(&app.signer, &user, &session, now).map_err(unforeseen)?;
    Ok(Some(Registered { user, saga_id, tokens }))
}

/// Why a registration was not committed, as far as is known.
enum NotWritten {
    /// It surely was not.
    Surely(RegisterError),
    /// COMMIT was not answered.
    InDoubt { registered: Box<Registered>, transaction: String, error: sqlx::Error },
}

/// Writes a registration, also when its client has gone meanwhile.
async fn write(
    app: &App,
    valid: Arc<Valid>,
    password_hash: String,
    saga_id: Uuid,
    context: &RequestContext,
) -> Result<Registered, RegisterError> {
    let written = {
        let (owned, context) = (app.clone(), context.clone());
        app.db.run_within(PREPARE_TIMEOUT + COMMIT_TIMEOUT, move |conn| {
            Box::pin(async move {
                let registered = commit(conn, &owned, &valid, &password_hash, saga_id, &context).await?;
                owned.wake.notify();
                tracing::info!(user.id = %registered.user.id, saga.id = %saga_id, "user registered");
                Ok(registered)
            })
        })
    };
    let (registered, transaction, error) = match written.await {
        Ok(registered) => return Ok(registered),
        Err(NotWritten::Surely(error)) => return Err(error),
        Err(NotWritten::InDoubt { registered, transaction, error }) => (registered, transaction, error),
    };
    tracing::warn!(saga.id = %saga_id, %error, "COMMIT of a registration was not answered; looking up what became of it");
    match outcome(app, saga_id, &transaction).await {
        Some(true) => {
            app.wake.notify();
            tracing::info!(user.id = %registered.user.id, saga.id = %saga_id, "user registered");
            Ok(*registered)
        }
        Some(false) => Err(away()),
        None => Err(RegisterError::OutcomeUnknown),
    }
}

async fn commit(
    conn: &mut PgConnection,
    app: &App,
    valid: &Valid,
    password_hash: &str,
    saga_id: Uuid,
    context: &RequestContext,
) -> Result<Registered, NotWritten> {
    // What is dropped here with the transaction is closed with the connection: a timeout condemns it.
    let prepared = timeout(PREPARE_TIMEOUT, async {
        let mut tx = conn.begin().await?;
        let new = NewUser { username: &valid.username, email: &valid.email, password_hash, create_saga_id: saga_id };
        let (user, transaction) = users::insert(&mut tx, &new).await?;
        let agent = context.user_agent.as_deref();
        let session = sessions::open(&mut tx, &app.signer, first_session_id(saga_id), user.id, agent).await?;
        // Before the commit, so that a key that refuses to sign leaves nothing behind.
        let tokens = sessions::tokens(&app.signer, &user, &session, session.issued_at).map_err(unforeseen)?;
        let new = NewSaga {
            saga_id,
            subject: user.id.to_string(),
            data: create_user::data(i64::from(user.id.0), &user.username, &user.email),
            correlation_id: context.correlation_id.clone(),
            correlation_given: context.correlation_given,
            traceparent: context.traceparent.clone(),
        };
        app.sagas.start(&mut tx, &create_user::DEFINITION, new).await?;
        Ok::<_, RegisterError>((tx, Registered { user, saga_id, tokens }, transaction))
    });
    let (tx, registered, transaction) = prepared.await.unwrap_or_else(|_| Err(away())).map_err(NotWritten::Surely)?;
    fault_points::reached("registration::prepared");
    match timeout(COMMIT_TIMEOUT, tx.commit()).await.unwrap_or_else(|_| Err(timed_out())) {
        Ok(()) => {
            fault_points::reached("registration::committed");
            Ok(registered)
        }
        Err(error) if !db::leaves_doubt(&error) => Err(NotWritten::Surely(error.into())),
        Err(error) => Err(NotWritten::InDoubt { registered: Box::new(registered), transaction, error }),
    }
}

fn timed_out() -> sqlx::Error {
    std::io::Error::from(std::io::ErrorKind::TimedOut).into()
}

fn away() -> RegisterError {
    RegisterError::Unavailable(timed_out())
}

fn unforeseen(error: impl Error + Send + Sync + 'static) -> RegisterError {
    RegisterError::Unforeseen(error.into())
}

impl From<sqlx::Error> for RegisterError {
    fn from(error: sqlx::Error) -> Self {
        match db::violated(&error) {
            Some("auth_users_email_unique" | "auth_users_email_no_username") => RegisterError::EmailTaken,
            Some("auth_users_username_unique" | "auth_users_username_no_email") => RegisterError::UsernameTaken,
            // Raced by a request under the same key, whose user has been taken back already.
            Some("saga_state_pkey") => RegisterError::TakenBack,
            _ if db::is_away(&error) => RegisterError::Unavailable(error),
            _ => unforeseen(error),
        }
    }
}

impl From<sqlx::Error> for NotWritten {
    fn from(error: sqlx::Error) -> Self {
        NotWritten::Surely(error.into())
    }
}

impl WorkError for NotWritten {
    fn database_error(&self) -> Option<&sqlx::Error> {
        match self {
            NotWritten::InDoubt { error, .. } | NotWritten::Surely(RegisterError::Unavailable(error)) => Some(error),
            NotWritten::Surely(RegisterError::Unforeseen(error)) => error.downcast_ref(),
            NotWritten::Surely(_) => None,
        }
    }
}

impl From<SagaError> for RegisterError {
    fn from(error: SagaError) -> Self {
        match error {
            SagaError::Database(error) | SagaError::Append(outbox_relay::AppendError::Database(error)) => error.into(),
            error => unforeseen(error),
        }
    }
}

impl From<HashError> for RegisterError {
    fn from(error: HashError) -> Self {
        match error {
            HashError::Busy { retry_after } => RegisterError::Busy { retry_after },
            HashError::Failed => unforeseen(error),
        }
    }
}

//! Accounts: registered, signed in to, looked at, and taken back.

use std::{error::Error, time::Duration};

use saga_orchestrator::{NewSaga, SagaError, flows::create_user, store};
use secrecy::SecretString;
use sqlx::{Acquire, PgConnection};
use tokio::time::{Instant, sleep, timeout};
use uuid::Uuid;

use crate::{
    app::App,
    crypto::HashError,
    db::{
        self, Fate,
        users::{self, Credentials, NewUser},
    },
    domain::{Email, FieldError, Identifier, Password, User, UserId, Username},
    sessions::{self, SESSIONS_PER_USER, TokenPair},
};

/// Saga ids made from idempotency keys live in this namespace.
const IDEMPOTENCY: Uuid = Uuid::from_u128(0x8f0f_6d0e_6f0b_4c57_9b1d_0d0a_37c1_5e2b);
/// How long the statements before the COMMIT may take.
const PREPARE_PATIENCE: Duration = Duration::from_secs(8);
/// How long a COMMIT may take before its answer counts as lost.
const COMMIT_PATIENCE: Duration = Duration::from_secs(5);
/// How long the outcome of a COMMIT is looked for.
const LOOK_FOR: Duration = Duration::from_secs(5);
const LOOK_PAUSE: Duration = Duration::from_millis(100);

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

/// Registers a user: user, session, saga and outbox row in one transaction.
///
/// The saga's id is chosen beforehand, so that a lost COMMIT can be looked up; made from the
/// idempotency key, it is also what a repeated request is known by.
pub async fn register(app: &App, new: NewAccount, context: &RequestContext) -> Result<Registered, RegisterError> {
    let valid = Valid::check(new, app.config.passwords.min_length)?;
    let keyed = context.idempotency_key.as_deref().map(|key| valid.saga_id(key));
    if let Some(saga_id) = keyed
        && let Some(again) = repeat(app, &valid, saga_id, context).await?
    {
        return Ok(again);
    }
    let password_hash = app.hasher.hash(&valid.password).await?;
    let saga_id = keyed.unwrap_or_else(Uuid::now_v7);
    match write(app, &valid, &password_hash, saga_id, context).await {
        Ok(registered) => {
            app.wake.notify();
            tracing::info!(user.id = %registered.user.id, saga.id = %saga_id, "user registered");
            Ok(registered)
        }
        // Two requests under one key at once: the other one was faster.
        Err(conflict @ (RegisterError::EmailTaken | RegisterError::UsernameTaken)) if keyed.is_some() => {
            repeat(app, &valid, saga_id, context).await?.ok_or(conflict)
        }
        Err(error) => Err(error),
    }
}

/// Signs a user in. A valid refresh token that the client still holds loses its session to the new
/// one (`replaced`).
///
/// An unknown name costs the same work as a wrong password, and no connection is held while a
/// password is hashed.
pub async fn login(
    app: &App,
    identifier: Option<Identifier>,
    password: SecretString,
    replaced: Option<&str>,
    context: &RequestContext,
) -> Result<LoggedIn, LoginError> {
    let known = match &identifier {
        Some(identifier) => db::on(&app.db, async |conn| users::credentials(conn, identifier).await)
        .await?
        .filter(|known| sessions::may_sign_in(&known.user)),
        None => None,
    };
    let stored = known.as_ref().map(|known| known.password_hash.as_str());
    let verdict = app.hasher.verify(&password, stored).await?;
    let Some(known) = known.filter(|_| verdict.matches) else {
        metrics::counter!("auth_logins_total", "outcome" => "refused").increment(1);
        return Err(LoginError::Refused);
    };
    let opened = db::on(&app.db, async |conn| {
        let mut tx = conn.begin().await?;
        let Some(user) = users::hold(&mut tx, &known).await? else { return Ok(None) };
        if let Some(replaced) = replaced {
            sessions::replace_held(&mut tx, &app.signer, replaced).await?;
        }
        let agent = context.user_agent.as_deref();
        let session = sessions::open(&mut tx, &app.signer, Uuid::now_v7(), user.id, agent).await?;
        db::sessions::revoke_oldest(&mut tx, user.id, SESSIONS_PER_USER, "too many sessions").await?;
        tx.commit().await?;
        Ok(Some((user, session)))
    })
    .await?;
    // Deleted, or given another password, while this one was being checked.
    let Some((user, session)) = opened else { return Err(LoginError::Refused) };
    if verdict.needs_rehash {
        rehash(app, &known, password).await;
    }
    let tokens =
        sessions::tokens(&app.signer, &user, &session).map_err(|error| LoginError::Unforeseen(error.into()))?;
    metrics::counter!("auth_logins_total", "outcome" => "accepted").increment(1);
    Ok(LoggedIn { user, tokens })
}

/// The user with this id.
pub async fn get_account(app: &App, id: UserId) -> Result<Option<User>, sqlx::Error> {
    db::on(&app.db, async |conn| users::find(conn, id).await).await
}

/// Notes that the user's address is its own. Repeated, it changes nothing.
pub async fn mark_verified(app: &App, id: UserId) -> Result<Option<User>, sqlx::Error> {
    db::on(&app.db, async |conn| users::mark_verified(conn, id).await).await
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
    let (saga, created) = db::on(&app.db, async |conn| {
        Ok((store::find(conn, saga_id).await?, users::created_by(conn, saga_id).await?))
    })
    .await?;
    let created = match (saga, created) {
        (_, Some(created)) => created,
        (None, None) => return Ok(None),
        // Compensated, or deleted since by its owner.
        (Some(_), None) => return Err(RegisterError::TakenBack),
    };
    let verdict = app.hasher.verify(valid.password.as_secret(), Some(&created.password_hash)).await?;
    if !verdict.matches {
        return Err(RegisterError::EmailTaken);
    }
    let session = db::on(&app.db, async |conn| {
        let mut tx = conn.begin().await?;
        let Some(user) = users::hold(&mut tx, &created).await? else { return Ok(None) };
        let session = match sessions::live(&mut tx, first_session_id(saga_id)).await? {
            Some(session) => session,
            None => {
                let agent = context.user_agent.as_deref();
                sessions::open(&mut tx, &app.signer, Uuid::now_v7(), user.id, agent).await?
            }
        };
        tx.commit().await?;
        Ok(Some((user, session)))
    })
    .await?;
    let Some((user, session)) = session else { return Err(RegisterError::TakenBack) };
    let tokens = sessions::tokens(&app.signer, &user, &session).map_err(unforeseen)?;
    Ok(Some(Registered { user, saga_id, tokens }))
}

async fn write(
    app: &App,
    valid: &Valid,
    password_hash: &str,
    saga_id: Uuid,
    context: &RequestContext,
) -> Result<Registered, RegisterError> {
    let mut conn = app.db.acquire().await?;
    let prepared = timeout(PREPARE_PATIENCE, async {
        let mut tx = conn.begin().await?;
        let new = NewUser {
            username: &valid.username,
            email: &valid.email,
            password_hash,
            create_saga_id: saga_id,
        };
        let (user, transaction) = users::insert(&mut tx, &new).await?;
        let agent = context.user_agent.as_deref();
        let session = sessions::open(&mut tx, &app.signer, first_session_id(saga_id), user.id, agent).await?;
        // Before the commit, so that a key that refuses to sign leaves nothing behind.
        let tokens = sessions::tokens(&app.signer, &user, &session).map_err(unforeseen)?;
        let new = NewSaga {
            saga_id,
            subject: user.id.to_string(),
            data: create_user::data(i64::from(user.id.0), &user.username, &user.email),
            correlation_id: context.correlation_id.clone(),
            traceparent: context.traceparent.clone(),
        };
        app.sagas.start(&mut tx, &create_user::DEFINITION, new).await?;
        Ok::<_, RegisterError>((tx, Registered { user, saga_id, tokens }, transaction))
    });
    let Ok(prepared) = prepared.await else {
        conn.close_on_drop();
        return Err(away());
    };
    let (tx, registered, transaction) = prepared?;
    let doubt = match timeout(COMMIT_PATIENCE, tx.commit()).await {
        Ok(Ok(())) => return Ok(registered),
        Ok(Err(error)) if !db::leaves_doubt(&error) => return Err(error.into()),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".to_owned(),
    };
    // Not to be trusted any more, and never to be waited for.
    conn.close_on_drop();
    drop(conn);
    tracing::warn!(saga.id = %saga_id, doubt, "COMMIT of a registration was not answered; looking up what became of it");
    match outcome(app, saga_id, &transaction).await {
        Some(true) => Ok(registered),
        Some(false) => Err(away()),
        None => Err(RegisterError::OutcomeUnknown),
    }
}

/// What became of a registration whose COMMIT was not answered: written, or surely not. `None` when
/// that can't be learnt in reasonable time.
async fn outcome(app: &App, saga_id: Uuid, transaction: &str) -> Option<bool> {
    let until = Instant::now() + LOOK_FOR;
    loop {
        let look = async {
            let mut conn = app.db.acquire().await?;
            // In this order: a backend that is still committing between the two reads leaves the
            // first answer unsettled, and the question is asked again.
            let fate = db::fate_of(&mut conn, transaction).await?;
            let saga = store::find(&mut conn, saga_id).await?;
            Ok::<_, sqlx::Error>((saga.is_some(), fate))
        };
        let left = until.saturating_duration_since(Instant::now());
        match timeout(left, look).await {
            Ok(Ok((true, _))) => return Some(true),
            Ok(Ok((false, Fate::Aborted))) => return Some(false),
            // Committed, and yet not there: another server answers, which was behind the first one.
            Ok(Ok((false, Fate::Committed))) | Err(_) => return None,
            Ok(Ok((false, Fate::Unsettled)) | Err(_)) => sleep(LOOK_PAUSE).await,
        }
    }
}

/// Stores the password in today's form. A login never fails over it: the next one tries again.
async fn rehash(app: &App, known: &Credentials, password: SecretString) {
    // Its length was another day's business.
    let Ok(password) = Password::parse(password, 0, None) else { return };
    let rehashed = async {
        let hash = app.hasher.hash(&password).await?;
        db::on(&app.db, async |conn| users::replace_hash(conn, known, &hash).await).await?;
        Ok::<_, Box<dyn Error + Send + Sync>>(())
    };
    if let Err(error) = rehashed.await {
        tracing::info!(user.id = %known.user.id, error, "a password was not rehashed; the next login tries again");
    }
}

fn away() -> RegisterError {
    RegisterError::Unavailable(std::io::Error::from(std::io::ErrorKind::TimedOut).into())
}

fn unforeseen(error: impl Error + Send + Sync + 'static) -> RegisterError {
    RegisterError::Unforeseen(error.into())
}

impl From<sqlx::Error> for RegisterError {
    fn from(error: sqlx::Error) -> Self {
        match db::violated(&error) {
            Some("auth_users_email_unique") => RegisterError::EmailTaken,
            Some("auth_users_username_unique") => RegisterError::UsernameTaken,
            // Raced by a request under the same key, whose user has been taken back already.
            Some("saga_state_pkey") => RegisterError::TakenBack,
            _ if db::is_away(&error) => RegisterError::Unavailable(error),
            _ => unforeseen(error),
        }
    }
}

impl From<SagaError> for RegisterError {
    fn from(error: SagaError) -> Self {
        match error {
            SagaError::Database(error)
            | SagaError::Append(outbox_relay::AppendError::Database(error)) => error.into(),
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

//! `auth_users`.

use sqlx::{FromRow, PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use crate::domain::{Email, Identifier, User, UserId, UserStatus, Username};

/// A user about to be written, pending until its saga completes.
#[derive(Debug)]
pub struct NewUser<'a> {
    /// Checked name.
    pub username: &'a Username,
    /// Checked address.
    pub email: &'a Email,
    /// As the hasher made it.
    pub password_hash: &'a str,
    /// The one saga that may take the user back.
    pub create_saga_id: Uuid,
}

/// A user with what its password is checked against.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The user.
    pub user: User,
    /// As stored.
    pub password_hash: String,
}

/// Writes a user. Answers also with the transaction's id, by which [`super::fate_of`] can ask about
/// its COMMIT later.
///
/// Two registrations of one name wait for each other here: the second sees the first's outcome, as
/// a violation of `auth_users_username_unique` or `auth_users_email_unique` or not at all. A name
/// that is somebody's address, or the other way round, violates `auth_users_username_no_email` or
/// `auth_users_email_no_username`.
pub async fn insert(conn: &mut PgConnection, new: &NewUser<'_>) -> Result<(User, String), sqlx::Error> {
    let row = sqlx::query(
        r#"insert into auth_users
               (username, email, username_canonical, email_canonical, password_hash, status, create_saga_id)
           values ($1, $2, $3, $4, $5, 'pending', $6)
           returning id, username, email, is_verified, status, create_saga_id, "createdAt",
                     pg_current_xact_id()::text as transaction"#,
    )
    .bind(new.username.typed())
    .bind(new.email.typed())
    .bind(new.username.canonical())
    .bind(new.email.canonical())
    .bind(new.password_hash)
    .bind(new.create_saga_id)
    .fetch_one(conn)
    .await?;
    Ok((User::from_row(&row)?, row.try_get("transaction")?))
}

/// The user with this id.
pub async fn find(conn: &mut PgConnection, id: UserId) -> Result<Option<User>, sqlx::Error> {
    sqlx::query_as(
        r#"select id, username, email, is_verified, status, create_saga_id, "createdAt"
             from auth_users where id = $1"#,
    )
    .bind(id.0)
    .fetch_optional(conn)
    .await
}

/// Whom a login names. Names with an `@` can't be chosen any more, but adopted users may have one:
/// an address goes before such a name.
pub async fn credentials(conn: &mut PgConnection, of: &Identifier) -> Result<Option<Credentials>, sqlx::Error> {
    let (name, address) = match of {
        Identifier::Email(canonical) => (canonical, Some(canonical)),
        Identifier::Username(canonical) => (canonical, None),
    };
    sqlx::query_as(
        r#"select id, username, email, is_verified, status, create_saga_id, "createdAt", password_hash
             from auth_users
            where username_canonical = $1 or email_canonical = $2
            order by (email_canonical is not distinct from $2) desc
            limit 1"#,
    )
    .bind(name)
    .bind(address)
    .fetch_optional(conn)
    .await
}

/// The user a create saga made, if it is still there.
pub async fn created_by(conn: &mut PgConnection, saga_id: Uuid) -> Result<Option<Credentials>, sqlx::Error> {
    sqlx::query_as(
        r#"select id, username, email, is_verified, status, create_saga_id, "createdAt", password_hash
             from auth_users where create_saga_id = $1 order by id limit 1"#,
    )
    .bind(saga_id)
    .fetch_optional(conn)
    .await
}

/// Keeps the user from being deleted until the transaction ends, and sign-ins of one user apart, or
/// each would count the sessions without those of the others. Provided that it may still sign in with
/// the password that was checked: while hashing ran, either may have changed.
pub async fn hold(conn: &mut PgConnection, checked: &Credentials) -> Result<Option<User>, sqlx::Error> {
    sqlx::query_as(
        r#"select id, username, email, is_verified, status, create_saga_id, "createdAt"
             from auth_users
            where id = $1 and password_hash = $2 and status in ('pending', 'active')
              for no key update"#,
    )
    .bind(checked.user.id.0)
    .bind(&checked.password_hash)
    .fetch_optional(conn)
    .await
}

/// Stores a stronger hash of the same password. Compares with the old one first, so that a password
/// that was changed meanwhile is not put back: `false`.
pub async fn replace_hash(conn: &mut PgConnection, of: &Credentials, hash: &str) -> Result<bool, sqlx::Error> {
    let written = sqlx::query(
        r#"update auth_users set password_hash = $3, "updatedAt" = now() where id = $1 and password_hash = $2"#,
    )
    .bind(of.user.id.0)
    .bind(&of.password_hash)
    .bind(hash)
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Notes that the address is the user's own. `None` when that was known, or there is no such user.
pub async fn mark_verified(conn: &mut PgConnection, id: UserId) -> Result<Option<User>, sqlx::Error> {
    sqlx::query_as(
        r#"update auth_users set is_verified = true, "updatedAt" = now()
            where id = $1 and not is_verified
        returning id, username, email, is_verified, status, create_saga_id, "createdAt""#,
    )
    .bind(id.0)
    .fetch_optional(conn)
    .await
}

/// Sign-in names that two users had before names and addresses became one namespace: the username of
/// the one is the address of the other.
pub async fn shared_names(conn: &mut PgConnection) -> Result<Vec<SharedName>, sqlx::Error> {
    sqlx::query_as(
        r#"select named.username_canonical as name, named.id as username_of, addressed.id as email_of
             from auth_users named join auth_users addressed on addressed.email_canonical = named.username_canonical
            where named.id <> addressed.id
            order by named.username_canonical collate "C""#,
    )
    .fetch_all(conn)
    .await
}

/// See [`shared_names`].
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub struct SharedName {
    /// As both are found by.
    pub name: String,
    /// Whose username it is. This user can't sign in by it.
    pub username_of: i32,
    /// Whose address it is.
    pub email_of: i32,
}

/// The user's create saga has completed. `false` when the user is not pending in that saga.
pub async fn activate(conn: &mut PgConnection, id: UserId, saga_id: Uuid) -> Result<bool, sqlx::Error> {
    let written = sqlx::query(
        r#"update auth_users set status = 'active', "updatedAt" = now()
            where id = $1 and create_saga_id = $2 and status = 'pending'"#,
    )
    .bind(id.0)
    .bind(saga_id)
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Takes a registration back, sessions and identifiers with it. Only a user that is still pending,
/// and in this very saga: a close that is forged, late or meant for an earlier holder of the id
/// finds no row. `false` then.
pub async fn delete_pending(conn: &mut PgConnection, id: UserId, saga_id: Uuid) -> Result<bool, sqlx::Error> {
    let written = sqlx::query("delete from auth_users where id = $1 and create_saga_id = $2 and status = 'pending'")
        .bind(id.0)
        .bind(saga_id)
        .execute(conn)
        .await?;
    Ok(written.rows_affected() == 1)
}

impl FromRow<'_, PgRow> for User {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        let status: String = row.try_get("status")?;
        Ok(Self {
            id: UserId(row.try_get("id")?),
            username: row.try_get("username")?,
            email: row.try_get("email")?,
            is_verified: row.try_get("is_verified")?,
            status: UserStatus::parse(&status)
                .ok_or_else(|| sqlx::Error::Decode(format!("unknown user status {status:?}").into()))?,
            create_saga_id: row.try_get("create_saga_id")?,
            created_at: row.try_get("createdAt")?,
        })
    }
}

impl FromRow<'_, PgRow> for Credentials {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self { user: User::from_row(row)?, password_hash: row.try_get("password_hash")? })
    }
}

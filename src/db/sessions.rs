//! `refresh_tokens`: one row is one session. Nothing in it can be presented as a token.

use chrono::{DateTime, Utc};
use sqlx::{FromRow, PgConnection, Row, postgres::PgRow};
use uuid::Uuid;

use crate::domain::{Session, User, UserId};

/// A session about to be opened.
#[derive(Debug)]
pub struct NewSession<'a> {
    /// Its id, in every token of it.
    pub session_id: Uuid,
    /// Whose it is.
    pub user_id: UserId,
    /// What its first refresh token is made of.
    pub token: NewToken<'a>,
    /// No token of it is good beyond this.
    pub absolute_expires_at: DateTime<Utc>,
    /// What the client calls itself.
    pub user_agent: Option<&'a str>,
}

/// What a refresh token is made of, beside its session and generation.
#[derive(Debug)]
pub struct NewToken<'a> {
    /// Its id.
    pub jti: Uuid,
    /// The key it is signed with.
    pub kid: &'a str,
    /// When.
    pub issued_at: DateTime<Utc>,
    /// Cut to the session's absolute end.
    pub expires_at: DateTime<Utc>,
}

/// A session with its user, and when the database was asked: `rotated_at` is by its clock too, so
/// that replicas whose clocks differ agree on the reuse window.
#[derive(Debug)]
pub struct Found {
    /// The session.
    pub session: Session,
    /// Its user.
    pub user: User,
    /// The database's clock.
    pub now: DateTime<Utc>,
}

macro_rules! session_columns {
    () => {
        "s.id as session_row, s.session_id, s.user_id, s.generation, s.jti, s.kid, s.issued_at, s.expires_at,
         s.absolute_expires_at, s.rotated_at, s.revoked_at, s.revoked_reason"
    };
}

macro_rules! found_columns {
    () => {
        concat!(
            session_columns!(),
            r#", u.id, u.username, u.email, u.is_verified, u.status, u.create_saga_id, u."createdAt",
                 clock_timestamp() as now"#
        )
    };
}

/// Opens a session.
pub async fn insert(conn: &mut PgConnection, new: &NewSession<'_>) -> Result<Session, sqlx::Error> {
    sqlx::query_as(concat!(
        "insert into refresh_tokens as s
             (session_id, user_id, jti, kid, issued_at, expires_at, absolute_expires_at, user_agent)
         values ($1, $2, $3, $4, $5, least($6, $7), $7, $8)
         returning ",
        session_columns!()
    ))
    .bind(new.session_id)
    .bind(new.user_id.0)
    .bind(new.token.jti)
    .bind(new.token.kid)
    .bind(new.token.issued_at)
    .bind(new.token.expires_at)
    .bind(new.absolute_expires_at)
    .bind(new.user_agent)
    .fetch_one(conn)
    .await
}

/// Replaces the session's refresh token, if the presented one (its generation and id) is the
/// current one. `None` when it is not, or the session or its user is past refreshing.
///
/// However many present one token at once, the generation in the guard lets one of them through:
/// the others wait for its row lock, look again and find the next generation.
pub async fn rotate(
    conn: &mut PgConnection,
    session_id: Uuid,
    generation: i32,
    jti: Uuid,
    next: &NewToken<'_>,
) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        r#"update refresh_tokens s
              set generation = s.generation + 1, jti = $4, kid = $5, issued_at = $6,
                  expires_at = least($7, s.absolute_expires_at),
                  rotated_at = clock_timestamp(), "updatedAt" = clock_timestamp()
             from auth_users u
            where s.session_id = $1 and s.generation = $2 and s.jti = $3
              and s.revoked_at is null and s.expires_at > $6 and s.absolute_expires_at > $6
              and u.id = s.user_id and u.status in ('pending', 'active')
           returning "#,
        found_columns!()
    ))
    .bind(session_id)
    .bind(generation)
    .bind(jti)
    .bind(next.jti)
    .bind(next.kid)
    .bind(next.issued_at)
    .bind(next.expires_at)
    .fetch_optional(conn)
    .await
}

/// Exchanges a token of the replaced service, by its hash. From here on the row is a session like
/// any other, of which that token was generation 0. Its own expiry was the token's, so the row's
/// dates (set when it was adopted) don't count; its absolute end begins to run now.
pub async fn exchange(
    conn: &mut PgConnection,
    legacy_hash: &[u8],
    user_id: UserId,
    next: &NewToken<'_>,
    absolute_expires_at: DateTime<Utc>,
) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        r#"update refresh_tokens s
              set generation = 1, jti = $3, kid = $4, issued_at = $5,
                  expires_at = least($6, $7), absolute_expires_at = $7,
                  rotated_at = clock_timestamp(), "updatedAt" = clock_timestamp()
             from auth_users u
            where s.legacy_token_hash = $1 and s.user_id = $2 and s.generation = 0 and s.revoked_at is null
              and u.id = s.user_id and u.status in ('pending', 'active')
           returning "#,
        found_columns!()
    ))
    .bind(legacy_hash)
    .bind(user_id.0)
    .bind(next.jti)
    .bind(next.kid)
    .bind(next.issued_at)
    .bind(next.expires_at)
    .bind(absolute_expires_at)
    .fetch_optional(conn)
    .await
}

/// The session with this id.
pub async fn find(conn: &mut PgConnection, session_id: Uuid) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        found_columns!(),
        " from refresh_tokens s join auth_users u on u.id = s.user_id where s.session_id = $1"
    ))
    .bind(session_id)
    .fetch_optional(conn)
    .await
}

/// The session that a token of the replaced service belongs to.
pub async fn find_legacy(conn: &mut PgConnection, legacy_hash: &[u8]) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        found_columns!(),
        " from refresh_tokens s join auth_users u on u.id = s.user_id where s.legacy_token_hash = $1"
    ))
    .bind(legacy_hash)
    .fetch_optional(conn)
    .await
}

/// Ends a session. `false` when it had ended before, or never was: the first reason stands.
pub async fn revoke(conn: &mut PgConnection, session_id: Uuid, reason: &str) -> Result<bool, sqlx::Error> {
    let written = sqlx::query(
        r#"update refresh_tokens
              set revoked_at = clock_timestamp(), revoked_reason = $2, "updatedAt" = clock_timestamp()
            where session_id = $1 and revoked_at is null"#,
    )
    .bind(session_id)
    .bind(reason)
    .execute(conn)
    .await?;
    Ok(written.rows_affected() == 1)
}

/// Ends all sessions of a user but `except`. Answers how many ended.
pub async fn revoke_all(
    conn: &mut PgConnection,
    user_id: UserId,
    except: Option<Uuid>,
    reason: &str,
) -> Result<u64, sqlx::Error> {
    let written = sqlx::query(
        r#"update refresh_tokens
              set revoked_at = clock_timestamp(), revoked_reason = $3, "updatedAt" = clock_timestamp()
            where user_id = $1 and session_id is distinct from $2 and revoked_at is null"#,
    )
    .bind(user_id.0)
    .bind(except)
    .bind(reason)
    .execute(conn)
    .await?;
    Ok(written.rows_affected())
}

/// Ends a user's oldest sessions beyond `most`. Answers how many ended.
pub async fn revoke_oldest(
    conn: &mut PgConnection,
    user_id: UserId,
    most: i64,
    reason: &str,
) -> Result<u64, sqlx::Error> {
    let written = sqlx::query(
        r#"update refresh_tokens
              set revoked_at = clock_timestamp(), revoked_reason = $3, "updatedAt" = clock_timestamp()
            where revoked_at is null and id in (
                  select id from refresh_tokens
                   where user_id = $1 and revoked_at is null
                   order by issued_at desc, id desc offset $2)"#,
    )
    .bind(user_id.0)
    .bind(most)
    .bind(reason)
    .execute(conn)
    .await?;
    Ok(written.rows_affected())
}

/// Deletes sessions that have been over for a month, at most `most` at once. Until then they tell an
/// operator what became of them.
///
/// A token of the replaced service that was never exchanged carries its own expiry, which only the
/// token tells: its row stays until the absolute end it was adopted with.
pub async fn purge_ended(conn: &mut PgConnection, most: i64) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query(
        "delete from refresh_tokens where id in (
             select id from refresh_tokens
              where expires_at < now() - interval '30 days'
                and (generation > 0 or legacy_token_hash is null
                     or absolute_expires_at < now() - interval '30 days')
              order by expires_at limit $1 for update skip locked)",
    )
    .bind(most)
    .execute(conn)
    .await?;
    Ok(deleted.rows_affected())
}

impl FromRow<'_, PgRow> for Session {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            id: row.try_get("session_row")?,
            session_id: row.try_get("session_id")?,
            user_id: UserId(row.try_get("user_id")?),
            generation: row.try_get("generation")?,
            jti: row.try_get("jti")?,
            kid: row.try_get("kid")?,
            issued_at: row.try_get("issued_at")?,
            expires_at: row.try_get("expires_at")?,
            absolute_expires_at: row.try_get("absolute_expires_at")?,
            rotated_at: row.try_get("rotated_at")?,
            revoked_at: row.try_get("revoked_at")?,
            revoked_reason: row.try_get("revoked_reason")?,
        })
    }
}

impl FromRow<'_, PgRow> for Found {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self { session: Session::from_row(row)?, user: User::from_row(row)?, now: row.try_get("now")? })
    }
}

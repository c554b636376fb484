//! `refresh_tokens`: one row is one session. Nothing in it can be presented as a token.

//!
//! Every time in a row is by the database's clock, however far the clocks of the replicas are apart.

use std::time::Duration;

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
    /// No token of it is good for longer than this from now on.
    pub life: Duration,
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
    /// How long it is good; cut to the session's absolute end.
    pub life: Duration,
}

/// A session with its user, and the database's time: replicas whose clocks differ agree on what is
/// over.
#[derive(Debug, Clone)]
pub struct Found {
    /// The session.
    pub session: Session,
    /// Its user.
    pub user: User,
    /// The hash of the token of the replaced service that the session was adopted with.
    pub legacy_hash: Option<Vec<u8>>,
    /// When the statement reached the database.
    pub asked_at: DateTime<Utc>,
    /// When the database answered it.
    pub now: DateTime<Utc>,
}

macro_rules! session_columns {
    () => {
        "s.id as session_row, s.session_id, s.user_id, s.generation, s.jti, s.kid, s.issued_at, s.expires_at,
         s.absolute_expires_at, s.rotated_at, s.earlier_rotations, s.revoked_at, s.revoked_reason"
    };
}

macro_rules! found_columns {
    () => {
        concat!(
            session_columns!(),
            r#", s.legacy_token_hash, u.id, u.username, u.email, u.is_verified, u.status, u.create_saga_id, u."createdAt",
                 statement_timestamp() as asked_at, clock_timestamp() as now"#
        )
    };
}

/// Opens a session.
pub async fn insert(conn: &mut PgConnection, new: &NewSession<'_>) -> Result<Session, sqlx::Error> {
    sqlx::query_as(concat!(
        "insert into refresh_tokens as s
             (session_id, user_id, jti, kid, user_agent, issued_at, expires_at, absolute_expires_at)
         values ($1, $2, $3, $4, $5, statement_timestamp(),
                 statement_timestamp() + make_interval(secs => least($6, $7)),
                 statement_timestamp() + make_interval(secs => $7))
         returning ",
        session_columns!()
    ))
    .bind(new.session_id)
    .bind(new.user_id.0)
    .bind(new.token.jti)
    .bind(new.token.kid)
    .bind(new.user_agent)
    .bind(new.token.life.as_secs_f64())
    .bind(new.life.as_secs_f64())
    .fetch_one(conn)
    .await
}

/// Replaces the session's refresh token, if the presented one (its generation and id) is the
/// current one. `None` when it is not, or the session or its user is past refreshing. The request
/// has `waited` in this process: a token that was good when it arrived is good.
///
/// However many present one token at once, the generation in the guard lets one of them through:
/// the others wait for its row lock, look again and find the next generation.
///
/// Since when the new generation can be seen is left open. See [`mark_seen`].
pub async fn rotate(
    conn: &mut PgConnection,
    session_id: Uuid,
    generation: i32,
    jti: Uuid,
    next: &NewToken<'_>,
    waited: Duration,
) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        r#"update refresh_tokens s
              set generation = s.generation + 1, jti = $4, kid = $5, issued_at = statement_timestamp(),
                  expires_at = least(statement_timestamp() + make_interval(secs => $6), s.absolute_expires_at),
                  earlier_rotations = case when s.generation = 0 then '{}' else
                      (array_prepend(coalesce(s.rotated_at, clock_timestamp()), s.earlier_rotations))[1:7] end,
                  rotated_at = null, "updatedAt" = clock_timestamp()
             from auth_users u
            where s.session_id = $1 and s.generation = $2 and s.jti = $3 and s.revoked_at is null
              and s.expires_at > statement_timestamp() - make_interval(secs => $7)
              and s.absolute_expires_at > clock_timestamp()
              and u.id = s.user_id and u.status in ('pending', 'active')
           returning "#,
        found_columns!()
    ))
    .bind(session_id)
    .bind(generation)
    .bind(jti)
    .bind(next.jti)
    .bind(next.kid)
    .bind(next.life.as_secs_f64())
    .bind(waited.as_secs_f64())
    .fetch_optional(conn)
    .await
}

/// A token of the replaced service.
#[derive(Debug, Clone, Copy)]
pub struct LegacyToken<'a> {
    /// Its SHA-256.
    pub hash: &'a [u8],
    /// Whose it says it is.
    pub user_id: UserId,
    /// When it says it ends.
    pub expires_at: DateTime<Utc>,
}

/// Exchanges a token of the replaced service. From here on the row is a session like any other, of
/// which that token was generation 0. Its own expiry was the token's, so the row's dates (set when
/// it was adopted) don't count; the session's `life` begins now.
pub async fn exchange(
    conn: &mut PgConnection,
    token: LegacyToken<'_>,
    next: &NewToken<'_>,
    life: Duration,
    waited: Duration,
) -> Result<Option<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        r#"update refresh_tokens s
              set generation = 1, jti = $3, kid = $4, issued_at = statement_timestamp(),
                  expires_at = statement_timestamp() + make_interval(secs => least($5, $6)),
                  absolute_expires_at = statement_timestamp() + make_interval(secs => $6),
                  earlier_rotations = '{}', rotated_at = null, "updatedAt" = clock_timestamp()
             from auth_users u
            where s.legacy_token_hash = $1 and s.user_id = $2 and s.generation = 0 and s.revoked_at is null
              and $7 > statement_timestamp() - make_interval(secs => $8)
              and u.id = s.user_id and u.status in ('pending', 'active')
           returning "#,
        found_columns!()
    ))
    .bind(token.hash)
    .bind(token.user_id.0)
    .bind(next.jti)
    .bind(next.kid)
    .bind(next.life.as_secs_f64())
    .bind(life.as_secs_f64())
    .bind(token.expires_at)
    .bind(waited.as_secs_f64())
    .fetch_optional(conn)
    .await
}

/// Says that the generation with this `jti` can be seen by others now, if nobody has said so before.
/// For those who know: its COMMIT was answered to them, or they have read it.
///
/// Not durable on purpose. What a crash takes back is said again by the next who reads the row, and
/// a standby that is away must not hold up an answer twice.
pub async fn mark_seen(conn: &mut PgConnection, session_id: Uuid, jti: Uuid) -> Result<(), sqlx::Error> {
    sqlx::query(
        "with quick as materialized (select set_config('synchronous_commit', 'off', true))
         update refresh_tokens s set rotated_at = clock_timestamp()
           from quick where s.session_id = $1 and s.jti = $2 and s.rotated_at is null",
    )
    .bind(session_id)
    .bind(jti)
    .execute(conn)
    .await?;
    Ok(())
}

/// The session with this id.
pub async fn find(conn: &mut PgConnection, session_id: Uuid) -> Result<Option<Found>, sqlx::Error> {
    Ok(find_all(conn, &[session_id], &[]).await?.pop())
}

/// The sessions with these ids, and those that tokens of the replaced service with these hashes
/// belong to.
pub async fn find_all(
    conn: &mut PgConnection,
    session_ids: &[Uuid],
    legacy_hashes: &[&[u8]],
) -> Result<Vec<Found>, sqlx::Error> {
    sqlx::query_as(concat!(
        "select ",
        found_columns!(),
        " from refresh_tokens s join auth_users u on u.id = s.user_id
         where s.session_id = any($1) or s.legacy_token_hash = any($2)"
    ))
    .bind(session_ids)
    .bind(legacy_hashes)
    .fetch_all(conn)
    .await
}

/// Ends sessions. Answers how many ended: of one that had ended before, the first reason stands.
pub async fn revoke(conn: &mut PgConnection, session_ids: &[Uuid], reason: &str) -> Result<u64, sqlx::Error> {
    let written = sqlx::query(
        r#"update refresh_tokens
              set revoked_at = clock_timestamp(), revoked_reason = $2, "updatedAt" = clock_timestamp()
            where session_id = any($1) and revoked_at is null"#,
    )
    .bind(session_ids)
    .bind(reason)
    .execute(conn)
    .await?;
    Ok(written.rows_affected())
}

/// Ends all sessions of these users but `except`. Answers how many ended.
pub async fn revoke_all(
    conn: &mut PgConnection,
    users: &[UserId],
    except: &[Uuid],
    reason: &str,
) -> Result<u64, sqlx::Error> {
    let users: Vec<i32> = users.iter().map(|user| user.0).collect();
    let written = sqlx::query(
        r#"update refresh_tokens
              set revoked_at = clock_timestamp(), revoked_reason = $3, "updatedAt" = clock_timestamp()
            where user_id = any($1) and session_id <> all($2) and revoked_at is null"#,
    )
    .bind(users)
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
/// token tells: its row stays for the longest life that such a token can have been given here.
pub async fn purge_ended(conn: &mut PgConnection, most: i64) -> Result<u64, sqlx::Error> {
    let deleted = sqlx::query(
        "delete from refresh_tokens where id in (
             select id from refresh_tokens
              where expires_at < now() - interval '30 days'
                and (generation > 0 or legacy_token_hash is null or issued_at < now() - interval '430 days')
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
            earlier_rotations: row.try_get("earlier_rotations")?,
            revoked_at: row.try_get("revoked_at")?,
            revoked_reason: row.try_get("revoked_reason")?,
        })
    }
}

impl FromRow<'_, PgRow> for Found {
    fn from_row(row: &PgRow) -> Result<Self, sqlx::Error> {
        Ok(Self {
            session: Session::from_row(row)?,
            user: User::from_row(row)?,
            legacy_hash: row.try_get("legacy_token_hash")?,
            asked_at: row.try_get("asked_at")?,
            now: row.try_get("now")?,
        })
    }
}

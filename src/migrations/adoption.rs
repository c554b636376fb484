//! The accounts a replaced service left behind get the names they will be found under.
//!
//! SQL alone can't do it: `lower()` goes by the database's locale, and an address is stored under the
//! ASCII form of its domain.

use sqlx::{Connection, Executor, PgConnection};

use super::SchemaError;
use crate::domain::Identifier;

/// The tables' ids must be what this program takes them for.
pub(super) async fn unfit_ids(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        "select format('%s.%s is %s, and has to be integer', t.name, a.attname, format_type(a.atttypid, a.atttypmod))
           from (values ('auth_users', 'id'), ('refresh_tokens', 'id'), ('refresh_tokens', 'user_id')) t (name, id)
           join pg_attribute a on a.attrelid = to_regclass(t.name) and a.attname = t.id
          where not a.attisdropped and a.atttypid <> 'integer'::regtype",
    )
    .fetch_all(conn)
    .await
}

/// Fills `username_canonical` and `email_canonical` of a table that has not got them yet, all or
/// nothing: where two accounts would share one, both are told and the table stays as it was.
pub(super) async fn name_accounts(conn: &mut PgConnection) -> Result<(), SchemaError> {
    // A start that died half way has left the columns, but not yet made them mandatory.
    let to_adopt: bool = sqlx::query_scalar(
        "select to_regclass('auth_users') is not null
            and (select count(*) from pg_attribute
                  where attrelid = to_regclass('auth_users') and attnotnull and not attisdropped
                    and attname in ('username_canonical', 'email_canonical')) < 2",
    )
    .fetch_one(&mut *conn)
    .await?;
    if !to_adopt {
        return Ok(());
    }
    let mut tx = conn.begin().await?;
    tx.execute(
        "alter table auth_users add column if not exists username_canonical text,
                                add column if not exists email_canonical text",
    )
    .await?;
    // What two accounts share already they keep: see migrations/0009_sign_in.sql.
    tx.execute("select set_config('auth_service.adopting', 'on', true)").await?;
    tx.execute(
        r#"update auth_users set username_canonical = lower(username collate "C"),
                                 email_canonical = lower(email collate "C")"#,
    )
    .await?;
    name_beyond_ascii(&mut tx).await?;
    let duplicates = duplicates(&mut tx).await?;
    if !duplicates.is_empty() {
        tx.rollback().await?;
        return Err(SchemaError::CaseDuplicates(duplicates));
    }
    tx.commit().await?;
    Ok(())
}

/// White space included, which may stand around a name.
async fn name_beyond_ascii(conn: &mut PgConnection) -> Result<(), sqlx::Error> {
    let accounts: Vec<(i32, String, String)> =
        sqlx::query_as("select id, username, email from auth_users where username ~ '[^!-~]' or email ~ '[^!-~]'")
            .fetch_all(&mut *conn)
            .await?;
    let mut ids = vec![];
    let (mut usernames, mut emails) = (vec![], vec![]);
    for (id, username, email) in accounts {
        ids.push(id);
        usernames.push(canonical(&username));
        emails.push(canonical(&email));
    }
    sqlx::query(
        "update auth_users u set username_canonical = n.username, email_canonical = n.email
           from unnest($1::int[], $2::text[], $3::text[]) as n (id, username, email) where n.id = u.id",
    )
    .bind(ids)
    .bind(usernames)
    .bind(emails)
    .execute(conn)
    .await?;
    Ok(())
}

/// As a login spells what was typed.
fn canonical(name: &str) -> String {
    match Identifier::parse(name) {
        Some(Identifier::Email(canonical) | Identifier::Username(canonical)) => canonical,
        None => String::new(),
    }
}

async fn duplicates(conn: &mut PgConnection) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(
        r#"select format('%s %s: %s', field, name, string_agg('id ' || id, ', ' order by id))
             from auth_users, lateral (values ('username', username_canonical), ('email', email_canonical)) as n (field, name)
            group by field, name having count(*) > 1 order by field desc, name collate "C""#,
    )
    .fetch_all(conn)
    .await
}

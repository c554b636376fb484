//! A look at the schema of a live database, and at what keeps this role from using it.

use sqlx::{AssertSqlSafe, PgConnection};

use super::{
    MIGRATOR,
    comparison::{Difference, compare},
    schema::{EXPECTED, Kind, Schema},
};

/// Rows are added there and never changed: an operator may well have taken the other rights away.
const ONLY_ADDED_TO: &str = "admin_audit";

/// Where the highest number of a column stands. Numbers of published events are no longer in the outbox itself, and a
/// look for the highest one there would walk over everything that waits.
const OUTBOX_NUMBERS: &str = "greatest((select max(id) from outbox_archive), (select max(id) from outbox_parked))";

/// What was found.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Inspection {
    /// Migrations of this program that the database has not got.
    pub unapplied: usize,
    /// Whether it has some that this program does not know.
    pub is_newer: bool,
    /// What is not as the migrations made it.
    pub differences: Vec<Difference>,
    /// Columns that would be given a number that is taken.
    pub spent: Vec<SpentNumbers>,
    /// What this role may not do, or does not see.
    pub access: Vec<String>,
}

/// A column whose next number is taken already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpentNumbers {
    /// The table.
    pub table: String,
    /// The column.
    pub column: String,
    /// Its sequence.
    pub sequence: String,
    /// The number it would give out.
    pub next: i64,
    /// The highest that is in use.
    pub highest: i64,
}

impl Inspection {
    /// Everything that keeps this program from working as it should, a sentence each.
    pub fn problems(&self) -> Vec<String> {
        if self.unapplied > 0 {
            return vec!["the database's schema is behind this program: run `auth-service migrate`".to_owned()];
        }
        let differences = self.differences.iter().map(|difference| difference.what.clone());
        let spent = self.spent.iter().map(ToString::to_string);
        differences.chain(spent).chain(self.access.iter().cloned()).collect()
    }
}

impl std::fmt::Display for SpentNumbers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { table, column, next, highest, .. } = self;
        write!(f, "the next {column} of {table} would be {next}, and {highest} is in use")
    }
}

/// Looks. Some ten milliseconds: for the start and now and then, not for every request.
///
/// # Errors
///
/// The database's.
pub async fn inspect(conn: &mut PgConnection) -> Result<Inspection, sqlx::Error> {
    let mut found = Inspection::default();
    let known: Vec<i64> = MIGRATOR.iter().map(|migration| migration.version).collect();
    let applied = applied(conn).await?;
    found.unapplied = known.iter().filter(|version| !applied.contains(version)).count();
    found.is_newer = applied.iter().any(|version| !known.contains(version));
    if found.unapplied > 0 {
        return Ok(found);
    }
    let tables = EXPECTED.tables();
    let live = Schema::read(conn, &tables, &EXPECTED).await?;
    found.differences = compare(&EXPECTED, &live, found.is_newer);
    found.access = access(conn, &tables).await?;
    numbers(conn, &live, &mut found).await?;
    Ok(found)
}

/// The versions that were applied; none where nothing has ever been migrated.
pub(super) async fn applied(conn: &mut PgConnection) -> Result<Vec<i64>, sqlx::Error> {
    let known: bool =
        sqlx::query_scalar("select to_regclass('_sqlx_migrations') is not null").fetch_one(&mut *conn).await?;
    if !known {
        return Ok(vec![]);
    }
    sqlx::query_scalar("select version from _sqlx_migrations where success").fetch_all(conn).await
}

#[derive(sqlx::FromRow)]
struct Access {
    table: String,
    schema: String,
    missing_rights: Vec<String>,
    rows_are_hidden: bool,
    is_replicated_to: bool,
}

async fn access(conn: &mut PgConnection, tables: &[&str]) -> Result<Vec<String>, sqlx::Error> {
    let (role, home): (String, Option<String>) = sqlx::query_as(
        "select current_user::text, (select n.nspname::text from pg_class c join pg_namespace n on n.oid = c.relnamespace
                                where c.oid = to_regclass('_sqlx_migrations'))",
    )
    .fetch_one(&mut *conn)
    .await?;
    let found: Vec<Access> = sqlx::query_as(include_str!("access.sql")).bind(tables).fetch_all(conn).await?;
    let mut problems = vec![];
    for Access { table, schema, mut missing_rights, rows_are_hidden, is_replicated_to } in found {
        if table == ONLY_ADDED_TO {
            missing_rights.retain(|right| matches!(right.as_str(), "select" | "insert"));
        }
        if home.as_ref().is_some_and(|home| *home != schema) {
            let home = home.as_deref().unwrap_or_default();
            problems.push(format!(
                "search_path leads to {schema}.{table}, and the migrations were applied in the schema {home}"
            ));
        }
        if !missing_rights.is_empty() {
            let rights = missing_rights.join(", ");
            problems.push(format!("the role {role} lacks rights: grant {rights} on {table} to {role}"));
        }
        if rows_are_hidden {
            problems.push(format!("row level security hides rows of {table} from the role {role}"));
        }
        if is_replicated_to {
            problems.push(format!("a subscription to another server writes to {table}: this is a replica"));
        }
    }
    Ok(problems)
}

#[derive(sqlx::FromRow)]
struct Sequence {
    sequence: String,
    readable: bool,
    usable: bool,
}

async fn numbers(conn: &mut PgConnection, live: &Schema, found: &mut Inspection) -> Result<(), sqlx::Error> {
    for fact in live.0.iter().filter(|fact| fact.is_numbered()) {
        let (table, column) = (&fact.table, &fact.name);
        let sequence: Option<Sequence> = sqlx::query_as(
            "select s.oid::regclass::text as sequence, has_sequence_privilege(s.oid, 'select') as readable,
                    a.attidentity <> '' or has_sequence_privilege(s.oid, 'usage') as usable
               from pg_attribute a
               left join pg_attrdef d on d.adrelid = a.attrelid and d.adnum = a.attnum
               join pg_depend p on (p.classid = 'pg_attrdef'::regclass and p.objid = d.oid
                                    and p.refclassid = 'pg_class'::regclass)
                                or (p.classid = 'pg_class'::regclass and p.refobjid = a.attrelid
                                    and p.refobjsubid = a.attnum and p.deptype = 'i')
               join pg_class s on s.relkind = 'S'
                              and s.oid = case when p.classid = 'pg_class'::regclass then p.objid else p.refobjid end
              where a.attrelid = to_regclass(quote_ident($1)) and quote_ident(a.attname) = $2 limit 1",
        )
        .bind(table)
        .bind(column)
        .fetch_optional(&mut *conn)
        .await?;
        let Some(Sequence { sequence, readable, usable }) = sequence else { continue };
        if !usable {
            found.access.push(format!("this role may not take numbers: grant usage on sequence {sequence} to it"));
        }
        let whole =
            live.0.iter().any(|fact| fact.kind == Kind::Table && fact.table == *table && fact.definition.is_empty());
        if !readable || !whole {
            continue;
        }
        let highest = highest_sql(table, column);
        let sql = format!(
            "select case when is_called then last_value + 1 else last_value end, ({highest})::bigint from {sequence}"
        );
        let (next, highest): (i64, Option<i64>) = match sqlx::query_as(AssertSqlSafe(sql)).fetch_one(&mut *conn).await {
            Ok(numbers) => numbers,
            // Another finding says already that the table, or the right to it, is missing.
            Err(sqlx::Error::Database(error)) if error.code().is_some_and(|code| code.starts_with("42")) => continue,
            Err(error) => return Err(error),
        };
        if let Some(highest) = highest.filter(|highest| *highest >= next) {
            let (table, column) = (table.clone(), column.clone());
            found.spent.push(SpentNumbers { table, column, sequence, next, highest });
        }
    }
    Ok(())
}

/// The names come from the catalog by way of `schema.sql`, quoted.
pub(super) fn highest_sql(table: &str, column: &str) -> String {
    match table {
        "outbox" => OUTBOX_NUMBERS.to_owned(),
        _ => format!("select max({column}) from {table}"),
    }
}

//! A schema as a list of facts: what `migrations/schema.sql` says, and what a database has.
//!
//! `schema.sql` is rendered from a freshly migrated database, and a test holds it to the migrations. It is both for
//! people to read and what a live database is compared with: each line of it is one fact.

use std::{collections::BTreeSet, fmt::Write, sync::LazyLock};

use sqlx::{AssertSqlSafe, PgConnection};

/// What this program needs, rendered by the test `the_rendered_schema_is_what_the_migrations_make`.
pub static EXPECTED: LazyLock<Schema> = LazyLock::new(|| Schema::parse(include_str!("../../migrations/schema.sql")));

const HEAD: &str = "\
-- The schema that all migrations make. Rendered from a database, not written: RENDER_SCHEMA=1 cargo test --test it
-- rendered_schema renders it anew after a new migration. The program compares the database it runs on with this file
-- (src/migrations/comparison.rs), line by line.
";

/// One thing of a schema.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Fact {
    /// What it is.
    pub kind: Kind,
    /// The table it belongs to.
    pub table: String,
    /// Its own name, quoted where SQL needs that; empty for a table. Of a row: the value of the column that tells it
    /// from others.
    pub name: String,
    /// What follows the name in DDL. Of a row: the column.
    pub definition: String,
}

/// What a fact is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// The table itself.
    Table,
    /// A column.
    Column,
    /// A primary key, a unique, check or foreign key constraint.
    Constraint,
    /// An index that no constraint has made.
    Index,
    /// The function of a trigger.
    Function,
    /// A trigger.
    Trigger,
    /// A row that the migrations put in.
    Row,
}

/// Facts in an order in which they can be made.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Schema(pub Vec<Fact>);

impl Schema {
    /// Reads what a database has of the tables with these names, and of the rows that `seeds` has.
    ///
    /// # Errors
    ///
    /// The database's.
    pub async fn read(conn: &mut PgConnection, tables: &[&str], seeds: &Schema) -> Result<Self, sqlx::Error> {
        let rows: Vec<(String, String, String, String)> =
            sqlx::query_as(include_str!("live_schema.sql")).bind(tables).fetch_all(&mut *conn).await?;
        let mut facts = vec![];
        for (kind, table, name, definition) in rows {
            let kind = match kind.as_str() {
                "table" => Kind::Table,
                "column" => Kind::Column,
                "constraint" => Kind::Constraint,
                "index" => Kind::Index,
                "function" => Kind::Function,
                _ => Kind::Trigger,
            };
            facts.push(Fact { kind, table, name, definition });
        }
        for (table, column) in seeds.seeded() {
            let readable: bool = sqlx::query_scalar(
                "select exists (select from pg_class where oid = to_regclass(quote_ident($1)) and relkind in ('r', 'p')
                                  and has_table_privilege(oid, 'select')
                                  and exists (select from pg_attribute where attrelid = oid and attname = $2
                                                 and not attisdropped))",
            )
            .bind(table)
            .bind(column)
            .fetch_one(&mut *conn)
            .await?;
            if readable {
                let values = rows_of(conn, table, column).await?;
                facts.extend(values.into_iter().map(|name| Fact::row(table, name, column)));
            }
        }
        Ok(Self(facts))
    }

    /// The names of its tables, in order.
    pub fn tables(&self) -> Vec<&str> {
        self.0.iter().filter(|fact| fact.kind == Kind::Table).map(|fact| fact.table.as_str()).collect()
    }

    /// Tables that have rows from the beginning, and the column that tells them apart.
    pub fn seeded(&self) -> BTreeSet<(&str, &str)> {
        let rows = self.0.iter().filter(|fact| fact.kind == Kind::Row);
        rows.map(|fact| (fact.table.as_str(), fact.definition.as_str())).collect()
    }

    /// As SQL that makes it in an empty database, one fact a line.
    pub fn render(&self) -> String {
        let mut sql = HEAD.to_owned();
        for table in self.tables() {
            let facts: Vec<&Fact> = self.0.iter().filter(|fact| fact.table == table).collect();
            let of = |kind: Kind| facts.iter().filter(move |fact| fact.kind == kind);
            let made_as = of(Kind::Table).next().map_or("", |fact| fact.definition.as_str());
            let columns = of(Kind::Column).map(|fact| format!("    {} {}", fact.name, fact.definition));
            let constraints =
                of(Kind::Constraint).map(|fact| format!("    constraint {} {}", fact.name, fact.definition));
            let body = columns.chain(constraints).collect::<Vec<_>>().join(",\n");
            // Writing to a String can't fail.
            let _ = match (body.is_empty(), made_as.is_empty()) {
                (true, _) => writeln!(sql, "\ncreate table {table} {made_as};"),
                (false, true) => writeln!(sql, "\ncreate table {table} (\n{body}\n);"),
                (false, false) => writeln!(sql, "\ncreate table {table} (\n{body}\n) {made_as};"),
            };
            for fact in of(Kind::Index).chain(of(Kind::Function)).chain(of(Kind::Trigger)) {
                let _ = writeln!(sql, "{};", fact.definition);
            }
            for fact in of(Kind::Row) {
                let _ = writeln!(sql, "insert into {table} ({}) values ('{}');", fact.definition, fact.name);
            }
        }
        sql
    }

    /// Reads what [`render`](Self::render) has written.
    pub fn parse(sql: &str) -> Self {
        let mut facts = vec![];
        let mut table = String::new();
        let mut lines = sql.lines().filter(|line| !line.starts_with("--"));
        while let Some(line) = lines.next() {
            let text = line.trim_end_matches([',', ';']);
            if let Some(made) = text.strip_prefix("create table ") {
                let (name, made_as) = made.split_once(' ').unwrap_or((made, ""));
                table = name.to_owned();
                facts.push(Fact::table(name, made_as.trim_end_matches([' ', '('])));
            } else if let Some(made_as) = text.strip_prefix(") ") {
                if let Some(fact) = facts.iter_mut().rfind(|fact: &&mut Fact| fact.kind == Kind::Table) {
                    fact.definition = made_as.to_owned();
                }
            } else if let Some(constraint) = text.strip_prefix("    constraint ") {
                facts.extend(Fact::named(Kind::Constraint, &table, constraint));
            } else if let Some(column) = text.strip_prefix("    ") {
                facts.extend(Fact::named(Kind::Column, &table, column));
            } else if let Some(row) = text.strip_prefix("insert into ") {
                let mut parts = row.split(['(', ')', '\'']);
                let (column, value) = (parts.nth(1).unwrap_or_default(), parts.nth(2).unwrap_or_default());
                facts.push(Fact::row(&table, value.to_owned(), column));
            } else if let Some(function) = text.strip_prefix("CREATE OR REPLACE FUNCTION ") {
                let name = function.split('(').next().unwrap_or_default().to_owned();
                let body = lines.by_ref().take_while(|line| *line != "$body$;");
                let definition = [&[text], &*body.collect::<Vec<_>>(), &["$body$"]].concat().join("\n");
                facts.push(Fact { kind: Kind::Function, table: table.clone(), name, definition });
            } else if text.starts_with("CREATE ") {
                let kind = if text.contains("INDEX ") { Kind::Index } else { Kind::Trigger };
                let name = text.split(' ').skip_while(|word| !matches!(*word, "INDEX" | "TRIGGER")).nth(1);
                let name = name.unwrap_or_default().to_owned();
                facts.push(Fact { kind, table: table.clone(), name, definition: text.to_owned() });
            }
        }
        Self(facts)
    }
}

impl Fact {
    fn table(name: &str, definition: &str) -> Self {
        Self { kind: Kind::Table, table: name.to_owned(), name: String::new(), definition: definition.to_owned() }
    }

    fn row(table: &str, value: String, column: &str) -> Self {
        Self { kind: Kind::Row, table: table.to_owned(), name: value, definition: column.to_owned() }
    }

    fn named(kind: Kind, table: &str, text: &str) -> Option<Self> {
        let (name, definition) = text.split_once(' ')?;
        Some(Self { kind, table: table.to_owned(), name: name.to_owned(), definition: definition.to_owned() })
    }

    /// Whether this column gets a number of its own: as our migrations make such columns, or as Sequelize did.
    pub fn is_numbered(&self) -> bool {
        self.kind == Kind::Column
            && (self.definition.ends_with(" as identity") || self.definition.contains(" default nextval("))
    }
}

/// The values of a column, as text. The names come from `schema.sql`.
pub(super) async fn rows_of(conn: &mut PgConnection, table: &str, column: &str) -> Result<Vec<String>, sqlx::Error> {
    sqlx::query_scalar(AssertSqlSafe(format!("select {column}::text from {table} order by {column}")))
        .fetch_all(conn)
        .await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_rendered_is_read_back() {
        assert!(EXPECTED.0.len() > 100, "{}", EXPECTED.0.len());
        for kind in [Kind::Table, Kind::Column, Kind::Constraint, Kind::Index, Kind::Row] {
            assert!(EXPECTED.0.iter().any(|fact| fact.kind == kind), "{kind:?}");
        }
        assert_eq!(EXPECTED.render(), include_str!("../../migrations/schema.sql"));
    }
}

//! What a live schema lacks of the one that this program needs, and how that is put back. Pure.

use std::{
    collections::{HashMap, HashSet},
    fmt,
};

use super::schema::{Fact, Kind, Schema};

/// Something about the database that isn't as this program needs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// One sentence, without a full stop.
    pub what: String,
    /// What the program needs here.
    pub needed: Fact,
    /// How it is put back, where nothing has to be guessed for that.
    pub mend: Mend,
}

/// How a difference is mended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Mend {
    /// By these statements, whatever the table holds. One that the rows contradict fails, and nothing is changed.
    Always(Vec<String>),
    /// By these statements while the table is empty: what stood in the column is gone.
    WhereEmpty(Vec<String>),
    /// Not by a program.
    Never,
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

/// Compares. Where a newer program has migrated the database, only what is missing altogether counts: what it has
/// changed it has changed for a reason.
pub fn compare(needed: &Schema, live: &Schema, migrated_by_newer: bool) -> Vec<Difference> {
    let found: HashMap<_, &Fact> = live.0.iter().map(|fact| (identity(fact), fact)).collect();
    let tables: HashSet<&str> =
        live.0.iter().filter(|fact| fact.kind == Kind::Table).map(|fact| fact.table.as_str()).collect();
    let mut differences = vec![];
    for fact in &needed.0 {
        // The table's own line says it all.
        if fact.kind != Kind::Table && !tables.contains(fact.table.as_str()) {
            continue;
        }
        let difference = match found.get(&identity(fact)) {
            None if migrated_by_newer && !matches!(fact.kind, Kind::Table | Kind::Column) => None,
            None => Some(missing(fact)),
            Some(_) if migrated_by_newer => None,
            Some(live) => (normal(live) != normal(fact)).then(|| other(fact, live)),
        };
        differences.extend(difference);
    }
    let known: HashSet<_> = needed.0.iter().map(identity).collect();
    let unknown = live.0.iter().filter(|fact| tables.contains(fact.table.as_str()) && !known.contains(&identity(fact)));
    differences.extend(unknown.filter_map(in_the_way));
    differences
}

/// What makes two facts speak of the same thing. Violations are told by the name of a constraint, but nobody asks for
/// a foreign key by its name, and Sequelize names its own.
fn identity(fact: &Fact) -> (Kind, &str, String) {
    let name = match fact.kind {
        Kind::Constraint if fact.definition.starts_with("FOREIGN KEY") => {
            normal(fact).replace(NOT_IN_FORCE, "").replace(NOT_VALID, "")
        }
        _ => fact.name.clone(),
    };
    (fact.kind, &fact.table, name)
}

const NOT_IN_FORCE: &str = " /* its triggers are disabled */";
const NOT_VALID: &str = " NOT VALID";

/// Without what makes no difference to the program: how a numbered column comes by its number, what happens when an id
/// is changed, which never is, and whether a check holds for old rows too. A check that is not valid is in force for new
/// ones; a migration adds it so where an earlier release may have left rows that contradict it.
fn normal(fact: &Fact) -> String {
    let definition = fact.definition.as_str();
    if fact.is_numbered() {
        let end = [" generated ", " default nextval("].iter().filter_map(|tail| definition.find(tail)).min();
        return format!("{} numbered", &definition[..end.unwrap_or(definition.len())]);
    }
    let mut text = definition.to_owned();
    if text.starts_with("CHECK") {
        text = text.replace(NOT_VALID, "");
    }
    if text.starts_with("FOREIGN KEY") {
        for action in ["CASCADE", "RESTRICT", "SET NULL", "SET DEFAULT"] {
            text = text.replace(&format!(" ON UPDATE {action}"), "");
        }
    }
    text
}

fn missing(fact: &Fact) -> Difference {
    let Fact { kind, table, name, definition } = fact;
    let what = match kind {
        Kind::Table => format!("the table {table} is missing"),
        Kind::Column => format!("the column {table}.{name} is missing"),
        Kind::Constraint => format!("the constraint {name} of {table} is missing: {definition}"),
        Kind::Index => format!("the index {name} of {table} is missing"),
        Kind::Function => format!("the function {name} of {table}'s trigger is missing"),
        Kind::Trigger => format!("the trigger {name} of {table} is missing"),
        Kind::Row => format!("the row {definition} = {name} of {table} is missing"),
    };
    let mend = match kind {
        // Without its rows it was worth nothing; the archive's default partition is there for rows to come.
        Kind::Table if definition.starts_with("partition of ") => {
            Mend::Always(vec![format!("create table {table} {definition}")])
        }
        Kind::Table => Mend::Never,
        Kind::Column => Mend::WhereEmpty(vec![format!("alter table {table} add column {name} {definition}")]),
        Kind::Constraint => Mend::Always(vec![add_constraint(fact)]),
        Kind::Index | Kind::Function | Kind::Trigger => Mend::Always(vec![definition.clone()]),
        Kind::Row => {
            Mend::Always(vec![format!("insert into {table} ({definition}) values ('{name}') on conflict do nothing")])
        }
    };
    Difference { what, needed: fact.clone(), mend }
}

fn other(fact: &Fact, live: &Fact) -> Difference {
    let Fact { kind, table, name, definition } = fact;
    let what = match kind {
        Kind::Table if live.definition.contains("unlogged") => {
            format!("the table {table} is unlogged: a crash of the server empties it")
        }
        Kind::Table if definition.is_empty() => format!("{table} is {}, and has to be a table", live.definition),
        Kind::Table => format!("{table} is {:?}, and has to be {definition:?}", live.definition),
        Kind::Column => format!("the column {table}.{name} is {}, and has to be {definition}", live.definition),
        Kind::Constraint => {
            format!("the constraint {name} of {table} is {}, and has to be {definition}", live.definition)
        }
        Kind::Index => format!("the index {name} is {}, and has to be {definition}", live.definition),
        Kind::Function => format!("the function {name} of {table}'s trigger isn't the one that was made"),
        Kind::Trigger => format!("the trigger {name} of {table} is {}, and has to be {definition}", live.definition),
        Kind::Row => format!("the row {name} of {table} differs"),
    };
    let mend = match kind {
        Kind::Table if live.definition.trim() == format!("{definition} unlogged").trim() => {
            Mend::Always(vec![format!("alter table {table} set logged")])
        }
        Kind::Table | Kind::Row => Mend::Never,
        Kind::Function => Mend::Always(vec![definition.clone()]),
        Kind::Trigger => Mend::Always(vec![format!("drop trigger {name} on {table}"), definition.clone()]),
        Kind::Column => column(fact, live),
        Kind::Constraint if live.definition.contains(NOT_IN_FORCE) => {
            // They are triggers of the system: only a superuser may switch them on again.
            Mend::Always(vec![format!("alter table {table} enable trigger all")])
        }
        Kind::Constraint if normal(live) == format!("{}{NOT_VALID}", normal(fact)) => {
            Mend::Always(vec![format!("alter table {table} validate constraint {}", live.name)])
        }
        Kind::Constraint => {
            Mend::Always(vec![format!("alter table {table} drop constraint {}", live.name), add_constraint(fact)])
        }
        Kind::Index => Mend::Always(vec![format!("drop index {name}"), definition.clone()]),
    };
    Difference { what, needed: fact.clone(), mend }
}

fn add_constraint(fact: &Fact) -> String {
    let Fact { table, name, definition, .. } = fact;
    format!("alter table {table} add constraint {name} {definition}")
}

/// What of a column differs, and whether that can be changed without asking anybody.
fn column(fact: &Fact, live: &Fact) -> Mend {
    let (needed, found) = (Column::of(fact), Column::of(live));
    let change = |what: String| format!("alter table {} alter column {} {what}", fact.table, fact.name);
    let mut steps = vec![];
    if needed.of_type != found.of_type {
        // Every other change of type could change a value.
        if needed.of_type != "text" || !found.of_type.starts_with("character varying") {
            return Mend::Never;
        }
        steps.push(change("type text".to_owned()));
    }
    if needed.numbered && !found.numbered {
        if found.default.is_some() {
            return Mend::Never;
        }
        if !found.not_null {
            steps.push(change("set not null".to_owned()));
        }
        steps.push(change("add generated by default as identity".to_owned()));
        return Mend::Always(steps);
    }
    match &needed.default {
        Some(default) if needed.default != found.default => steps.push(change(format!("set default {default}"))),
        None if found.default.is_some() && !found.numbered => steps.push(change("drop default".to_owned())),
        _ => {}
    }
    match (needed.not_null, found.not_null) {
        (true, false) => steps.push(change("set not null".to_owned())),
        (false, true) => steps.push(change("drop not null".to_owned())),
        _ => {}
    }
    if steps.is_empty() { Mend::Never } else { Mend::Always(steps) }
}

/// A column's definition, taken apart.
#[derive(Debug, PartialEq, Eq)]
struct Column {
    of_type: String,
    not_null: bool,
    default: Option<String>,
    numbered: bool,
}

impl Column {
    fn of(fact: &Fact) -> Self {
        let definition = normal(fact);
        let (rest, numbered) = match definition.strip_suffix(" numbered") {
            Some(rest) => (rest, true),
            None => (definition.as_str(), false),
        };
        let (rest, default) = match rest.split_once(" default ") {
            Some((rest, default)) => (rest, Some(default.to_owned())),
            None => (rest, None),
        };
        let (of_type, not_null) = match rest.strip_suffix(" not null") {
            Some(of_type) => (of_type, true),
            None => (rest, false),
        };
        Self { of_type: of_type.to_owned(), not_null, default, numbered }
    }
}

/// Something that somebody else has added, where it makes our statements fail.
fn in_the_way(fact: &Fact) -> Option<Difference> {
    let Fact { kind, table, name, definition } = fact;
    let filled = definition.contains(" default ") || definition.contains(" generated ");
    if *kind != Kind::Column || !definition.contains(" not null") || filled {
        return None;
    }
    Some(Difference {
        what: format!(
            "the column {table}.{name} isn't ours, must not be null and has no default, so that no row can be added"
        ),
        needed: fact.clone(),
        // Whose it is knows what it is for; left there, it may be empty.
        mend: Mend::Always(vec![format!("alter table {table} alter column {name} drop not null")]),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const NEEDED: &str = "
create table users (
    id integer not null generated by default as identity,
    email text not null,
    status text not null default 'active'::text,
    constraint users_email_unique UNIQUE (email)
);
CREATE INDEX users_status ON users USING btree (status);
create table tokens (
    user_id integer not null,
    constraint tokens_user_id_fkey FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE
);
insert into tokens (user_id) values ('1');
";

    fn differences(from: &str, to: &str) -> Vec<Difference> {
        assert!(NEEDED.contains(from), "{from}");
        compare(&Schema::parse(NEEDED), &Schema::parse(&NEEDED.replace(from, to)), false)
    }

    fn one(from: &str, to: &str) -> Difference {
        let mut found = differences(from, to);
        assert_eq!(found.len(), 1, "{found:?}");
        found.remove(0)
    }

    #[test]
    fn what_sequelize_made_is_as_good() {
        assert_eq!(differences("", ""), []);
        assert_eq!(differences("generated by default as identity", "default nextval('users_id_seq'::regclass)"), []);
        let foreign_key = "tokens_user_id_fkey FOREIGN KEY (user_id) REFERENCES users(id) ON DELETE CASCADE";
        let named = "user_fk FOREIGN KEY (user_id) REFERENCES users(id) ON UPDATE CASCADE ON DELETE CASCADE";
        assert_eq!(differences(foreign_key, named), []);
        assert_eq!(differences("    email text not null,", "    email text not null,\n    phone text,"), []);
    }

    #[test]
    fn a_column_that_is_gone_comes_back_only_where_it_can_be_empty() {
        let gone = one("    email text not null,\n", "");
        assert_eq!(gone.what, "the column users.email is missing");
        assert_eq!(gone.mend, Mend::WhereEmpty(vec!["alter table users add column email text not null".to_owned()]));
    }

    #[test]
    fn a_type_is_widened_and_never_otherwise_changed() {
        let narrow = one("email text not null", "email character varying(255) not null");
        assert_eq!(narrow.mend, Mend::Always(vec!["alter table users alter column email type text".to_owned()]));
        assert!(narrow.what.contains("is character varying(255) not null, and has to be text not null"));
        assert_eq!(one("user_id integer", "user_id bigint").mend, Mend::Never);
        assert_eq!(one("id integer not null generated by default as identity", "id uuid not null").mend, Mend::Never);
    }

    #[test]
    fn defaults_and_numbers_are_put_back() {
        let change = |what: &str| Mend::Always(vec![format!("alter table users alter column {what}")]);
        assert_eq!(one(" default 'active'::text", "").mend, change("status set default 'active'::text"));
        let numbered = "id add generated by default as identity";
        assert_eq!(one(" generated by default as identity", "").mend, change(numbered));
        assert_eq!(one("email text not null", "email text").mend, change("email set not null"));
        assert_eq!(
            one("email text not null", "email text not null default ''::text").mend,
            change("email drop default")
        );
    }

    #[test]
    fn uniqueness_and_references_must_be_in_force() {
        let unique = "constraint users_email_unique UNIQUE (email)";
        let put_back = vec![format!("alter table users add {unique}")];
        let without = differences(&format!(",\n    {unique}"), "");
        assert_eq!(without[0].mend, Mend::Always(put_back));
        assert_ne!(one(unique, &format!("{unique} DEFERRABLE")).mend, Mend::Never);
        let invalid = one("(status);", "(status) /* invalid */;");
        assert!(invalid.what.contains("invalid"), "{invalid}");
        let cascade = "REFERENCES users(id) ON DELETE CASCADE";
        assert!(one(cascade, "REFERENCES users(id)").what.contains("is missing"));
        assert!(one(cascade, &format!("{cascade}{NOT_IN_FORCE}")).what.contains("triggers are disabled"));
        assert_eq!(
            one(cascade, &format!("{cascade} NOT VALID")).mend,
            Mend::Always(vec!["alter table tokens validate constraint tokens_user_id_fkey".to_owned()])
        );
    }

    #[test]
    fn a_check_need_not_hold_for_old_rows() {
        let check = "constraint users_status_known CHECK ((status <> ''::text))";
        let needed = NEEDED.replace("UNIQUE (email)", &format!("UNIQUE (email),\n    {check}"));
        let live = |to: &str| compare(&Schema::parse(&needed), &Schema::parse(&needed.replace(check, to)), false);
        assert_eq!(live(&format!("{check} NOT VALID")), []);
        assert_eq!(live("constraint users_status_known CHECK (true)").len(), 1);
    }

    #[test]
    fn a_table_must_be_a_table_and_survive_a_crash() {
        assert_eq!(one("create table tokens (", "create table tokens a view (").mend, Mend::Never);
    }

    #[test]
    fn what_others_add_matters_only_where_it_keeps_rows_out() {
        let added = |column: &str| {
            differences("    user_id integer not null,", &format!("    user_id integer not null,\n    {column},"))
        };
        assert_eq!(added("token text not null").len(), 1);
        for harmless in ["token text", "token text not null default ''::text"] {
            assert_eq!(added(harmless), [], "{harmless}");
        }
    }

    #[test]
    fn a_newer_program_may_have_changed_anything_but_what_is_read() {
        let newer = NEEDED
            .replace(" default 'active'::text", " default 'new'::text")
            .replace("    constraint users_email_unique UNIQUE (email)", "    other text")
            .replace("insert into tokens (user_id) values ('1');", "");
        let needed = Schema::parse(NEEDED);
        assert_eq!(compare(&needed, &Schema::parse(&newer), true), []);
        let without = newer.replace("    email text not null,\n", "");
        assert_eq!(compare(&needed, &Schema::parse(&without), true).len(), 1);
    }
}

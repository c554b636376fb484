//! The process's environment, and under it `.env`.

use std::{collections::BTreeMap, env, ffi::OsString, io, path::Path};

use super::error::ConfigError;

/// All variables, the real environment's before those of `.env`, and what is wrong with `.env`.
pub fn environment() -> (BTreeMap<String, String>, Vec<ConfigError>) {
    let (mut vars, errors) = match std::fs::read(Path::new(".env")) {
        Ok(bytes) => read_dotenv(&bytes),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Default::default(),
        Err(error) => (BTreeMap::new(), vec![wrong(".env".to_owned(), format!("can't be read: {error}"))]),
    };
    // A value that is not UTF-8 can't be one of ours.
    let ours = |(name, value): (OsString, OsString)| Some((name.into_string().ok()?, value.into_string().ok()?));
    vars.extend(env::vars_os().filter_map(ours));
    (vars, errors)
}

/// Values are taken as they stand: a `$` in a password is a `$`, as in the dotenv of the service this
/// one replaces, and not the beginning of a variable's name.
pub(crate) fn read_dotenv(bytes: &[u8]) -> (BTreeMap<String, String>, Vec<ConfigError>) {
    let (mut vars, mut errors) = (BTreeMap::new(), Vec::new());
    let Ok(text) = std::str::from_utf8(bytes) else {
        return (vars, vec![wrong(".env".to_owned(), "is not UTF-8".to_owned())]);
    };
    let text = text.trim_start_matches('\u{feff}');
    let literal: Vec<String> = text.lines().map(without_expansion).collect();
    for entry in dotenvy::from_read_iter(literal.join("\n").as_bytes()) {
        match entry {
            Ok((name, value)) => {
                vars.insert(name, value);
            }
            Err(dotenvy::Error::LineParse(line, _)) => {
                // The parser shows the line, or its value alone. It may hold a secret: only its
                // place and its name are passed on.
                let shown = line.lines().next().unwrap_or_default();
                let found = literal.iter().position(|other| !shown.is_empty() && other.ends_with(shown));
                let number = found.map_or_else(|| "?".to_owned(), |index| (index + 1).to_string());
                let name = found.and_then(|index| literal[index].split_once('=')).map(|(name, _)| name.trim());
                // What stands before the `=` is no name where a secret was broken into lines.
                let name = name.filter(|name| is_name(name)).map_or(String::new(), |name| format!("({name}) "));
                errors.push(wrong(format!(".env line {number}"), format!("{name}can't be read")));
            }
            Err(error) => errors.push(wrong(".env".to_owned(), format!("can't be read: {error}"))),
        }
    }
    (vars, errors)
}

fn without_expansion(line: &str) -> String {
    match line.split_once('=') {
        Some((_, value)) if value.trim_start().starts_with('\'') => line.to_owned(),
        _ => line.replace("\\$", "$").replace('$', "\\$"),
    }
}

fn is_name(text: &str) -> bool {
    let text = text.strip_prefix("export ").unwrap_or(text).trim_start();
    text.len() <= 64 && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

fn wrong(variable: String, problem: String) -> ConfigError {
    let way_out = "Write NAME=value, one a line; put a value with spaces, quotes or # between single quotes";
    ConfigError { variable, problem, way_out: way_out.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_what_it_looks_like() {
        let file = "A=pa$word\nB=$2y$10$abc\nC='x $HOME #y'\nD=\"p w$\"\nexport E=1\n# F=2\nG=\n";
        let (vars, errors) = read_dotenv(format!("\u{feff}{file}").as_bytes());
        assert!(errors.is_empty(), "{errors:?}");
        let value = |name: &str| vars[name].as_str();
        assert_eq!([value("A"), value("B"), value("C"), value("D")], ["pa$word", "$2y$10$abc", "x $HOME #y", "p w$"]);
        assert_eq!([value("E"), value("G")], ["1", ""]);
    }

    #[test]
    fn a_line_that_cannot_be_read_is_named_without_its_value_and_the_others_are_read() {
        let (vars, errors) = read_dotenv(b"A=1\nDB_PASSWORD=se cret word\nB=2\n");
        assert_eq!((vars["A"].as_str(), vars["B"].as_str()), ("1", "2"));
        assert_eq!(errors.len(), 1);
        assert_eq!(errors[0].variable, ".env line 2");
        assert!(errors[0].problem.contains("DB_PASSWORD") && !errors[0].to_string().contains("cret"));
        assert_eq!(read_dotenv(b"A=\xff").1.len(), 1);
    }

    #[test]
    fn what_stands_before_an_equals_sign_is_shown_only_if_it_is_a_name() {
        let pem = "KEY=-----BEGIN PRIVATE KEY-----\nMIIE/vQ+canary==\n-----END PRIVATE KEY-----\n";
        let (_, errors) = read_dotenv(pem.as_bytes());
        assert!(!errors.is_empty() && errors.iter().all(|error| !error.to_string().contains("canary")), "{errors:?}");
    }
}

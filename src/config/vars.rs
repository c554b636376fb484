//! Reading variables: each method takes one, remembers what was wrong with it, and goes on with
//! the default, so that one run finds every error.

use std::collections::HashMap;
use std::fmt::Display;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use secrecy::SecretString;

use super::{ConfigError, Profile};

pub(super) struct Vars {
    pub(super) profile: Profile,
    pub(super) errors: Vec<ConfigError>,
    pub(super) warnings: Vec<String>,
    pub(super) settings: Vec<Setting>,
    values: HashMap<String, String>,
}

/// One line of the summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Setting {
    pub(super) name: &'static str,
    pub(super) value: String,
    pub(super) is_default: bool,
}

impl Vars {
    pub(super) fn new(vars: impl IntoIterator<Item = (String, String)>, profile: Profile) -> Self {
        let values = vars.into_iter().filter(|(_, value)| !value.trim().is_empty()).collect();
        Self { profile, errors: Vec::new(), warnings: Vec::new(), settings: Vec::new(), values }
    }

    pub(super) fn is_set(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    pub(super) fn reject(&mut self, variable: &str, problem: impl Into<String>, way_out: impl Into<String>) {
        self.errors.push(ConfigError {
            variable: variable.to_owned(),
            problem: problem.into(),
            way_out: way_out.into(),
        });
    }

    pub(super) fn warn(&mut self, warning: impl Into<String>) {
        self.warnings.push(warning.into());
    }

    /// Parses a variable with `parse`, whose error says what it is not, as in "a port number".
    pub(super) fn parse<T>(
        &mut self,
        name: &'static str,
        default: T,
        show: impl Fn(&T) -> String,
        parse: impl Fn(&str) -> Option<T>,
        way_out: impl Into<String>,
    ) -> T {
        let Some(raw) = self.values.get(name).map(|raw| raw.trim().to_owned()) else {
            self.note(name, show(&default), true);
            return default;
        };
        match parse(&raw) {
            Some(value) => {
                self.note(name, show(&value), false);
                value
            }
            None => {
                self.reject(name, format!("has a value that can't be used {}", length(&raw)), way_out);
                default
            }
        }
    }

    pub(super) fn optional(&mut self, name: &'static str) -> Option<String> {
        let show = |value: &Option<String>| value.as_deref().map(without_credentials).unwrap_or_default();
        self.parse(name, None, show, |raw| Some(Some(raw.to_owned())), "")
    }

    /// As [`Vars::optional`], for a value that may hold credentials: the summary has what `show` leaves of it.
    pub(super) fn secret_in(&mut self, name: &'static str, show: impl Fn(&str) -> String) -> Option<String> {
        let show = |value: &Option<String>| value.as_deref().map(&show).unwrap_or_default();
        self.parse(name, None, show, |raw| Some(Some(raw.to_owned())), "")
    }

    pub(super) fn text(&mut self, name: &'static str, default: &str) -> String {
        self.parse(name, default.to_owned(), |text| without_credentials(text), |raw| Some(raw.to_owned()), "")
    }

    pub(super) fn number<T>(&mut self, name: &'static str, default: T, range: RangeInclusive<T>) -> T
    where
        T: FromStr + PartialOrd + Display,
    {
        let way_out =
            format!("Give a whole number from {} to {}, for example {name}={default}", range.start(), range.end());
        self.parse(name, default, T::to_string, |raw| raw.parse().ok().filter(|n| range.contains(n)), way_out)
    }

    /// A bare number means seconds.
    pub(super) fn duration(
        &mut self,
        name: &'static str,
        default: Duration,
        range: RangeInclusive<Duration>,
    ) -> Duration {
        let show = |value: &Duration| humantime::format_duration(*value).to_string();
        let way_out = format!(
            "Give a time from {} to {}, as seconds or like 90s, 15m, 2h, 7d; for example {name}={}",
            show(range.start()),
            show(range.end()),
            show(&default),
        );
        let parse = |raw: &str| {
            let value = match raw.parse() {
                Ok(seconds) => Duration::from_secs(seconds),
                Err(_) => humantime::parse_duration(raw).ok()?,
            };
            range.contains(&value).then_some(value)
        };
        self.parse(name, default, show, parse, way_out)
    }

    pub(super) fn flag(&mut self, name: &'static str, default: bool) -> bool {
        let parse = |raw: &str| match raw.to_ascii_lowercase().as_str() {
            "true" | "1" | "yes" | "on" => Some(true),
            "false" | "0" | "no" | "off" => Some(false),
            _ => None,
        };
        self.parse(name, default, bool::to_string, parse, format!("Give true or false, for example {name}={default}"))
    }

    /// One of some words, in any case; the first is the default.
    pub(super) fn choice<T: Copy + PartialEq>(&mut self, name: &'static str, words: &[(&'static str, T)]) -> T {
        let all: Vec<_> = words.iter().map(|(word, _)| *word).collect();
        let show = |value: &T| {
            words.iter().find(|(_, meaning)| meaning == value).map(|(word, _)| (*word).to_owned()).unwrap_or_default()
        };
        let parse =
            |raw: &str| words.iter().find(|(word, _)| word.eq_ignore_ascii_case(raw)).map(|(_, meaning)| *meaning);
        self.parse(name, words[0].1, show, parse, format!("Give one of: {}", all.join(", ")))
    }

    pub(super) fn host(&mut self, name: &'static str, default: Ipv4Addr) -> IpAddr {
        let parse = |raw: &str| match raw {
            "localhost" => Some(IpAddr::V4(Ipv4Addr::LOCALHOST)),
            _ => raw.trim_matches(['[', ']']).parse().ok(),
        };
        self.parse(
            name,
            default.into(),
            IpAddr::to_string,
            parse,
            "Give the IP address to listen on: 0.0.0.0 for every interface, 127.0.0.1 for this machine only",
        )
    }

    pub(super) fn port(&mut self, name: &'static str, default: u16) -> u16 {
        self.parse(
            name,
            default,
            u16::to_string,
            |raw| raw.parse().ok(),
            format!("Give a port from 1 to 65535, for example {name}={default}, or 0 for any free one"),
        )
    }

    /// Where to listen; `None` when one of the two variables was refused.
    pub(super) fn listen(
        &mut self,
        (host, default_host): (&'static str, Ipv4Addr),
        (port, default_port): (&'static str, u16),
    ) -> Option<SocketAddr> {
        let errors = self.errors.len();
        let listen = SocketAddr::new(self.host(host, default_host), self.port(port, default_port));
        (self.errors.len() == errors).then_some(listen)
    }

    /// A secret from the variable itself or from the file that `<name>_FILE` names.
    pub(super) fn secret(&mut self, name: &'static str) -> Option<SecretString> {
        self.env_or_file(name, Nature::Secret).map(SecretString::from)
    }

    /// As [`Vars::secret`], for a private key.
    pub(super) fn private_key(&mut self, name: &'static str) -> Option<SecretString> {
        self.env_or_file(name, Nature::PrivateKey).map(SecretString::from)
    }

    /// As [`Vars::secret`], for what is no secret but lies beside one.
    pub(super) fn text_or_file(&mut self, name: &'static str) -> Option<String> {
        self.env_or_file(name, Nature::Public)
    }

    /// PEM in whatever form it survived the environment, or the path of a file of it, here or in `<name>_FILE`.
    pub(super) fn pem(&mut self, name: &'static str, nature: Nature) -> Option<String> {
        let given = self.values.get(name).map(|raw| (raw.trim().to_owned(), pem_text(raw)));
        match given {
            Some((path, text)) if !text.contains("-----BEGIN") && !self.is_set(&format!("{name}_FILE")) => {
                let text = self.read_file(name, &path, nature)?;
                self.note(name, nature.shown(&path), false);
                Some(text)
            }
            _ => self.env_or_file(name, nature).map(|text| pem_text(&text)),
        }
    }

    fn env_or_file(&mut self, name: &'static str, nature: Nature) -> Option<String> {
        let file_name = format!("{name}_FILE");
        let path = self.values.get(&file_name).map(|path| path.trim().to_owned());
        let value = match (self.values.get(name).cloned(), path) {
            (Some(_), Some(_)) => {
                self.reject(name, format!("and {file_name} are both set"), "Keep one of them");
                return None;
            }
            (Some(value), None) => {
                self.note(name, nature.shown(""), false);
                value
            }
            (None, Some(path)) => {
                self.note(name, nature.shown(&path), false);
                self.read_file(&file_name, &path, nature)?
            }
            (None, None) => {
                self.note(name, String::new(), true);
                return None;
            }
        };
        Some(value.trim_end_matches(['\r', '\n']).to_owned())
    }

    /// The file a variable names.
    pub(super) fn read_file(&mut self, variable: &str, path: &str, nature: Nature) -> Option<String> {
        let way_out = "Give the path of a text file this process may read";
        let content = match std::fs::read_to_string(path) {
            Ok(content) => content,
            Err(error) => {
                // The value may be the secret itself, where its path was wanted.
                let problem = format!("names no readable file {}: {}", length(path), error.kind());
                self.reject(variable, problem, way_out);
                return None;
            }
        };
        let open = std::fs::metadata(path).is_ok_and(|meta| meta.mode() & 0o004 != 0);
        let problem = format!("names {path}, which every user of this machine may read");
        match nature {
            Nature::PrivateKey if open => {
                self.reject(
                    variable,
                    problem,
                    "Take that away: chmod o-r (Kubernetes: defaultMode 0440 and fsGroup; \
                     Docker secrets: mode 0400)",
                );
                return None;
            }
            Nature::Secret if open => self.warn(format!("{variable} {problem}.")),
            _ => {}
        }
        if content.trim().is_empty() {
            self.reject(variable, format!("names {path}, which is empty"), way_out);
            return None;
        }
        Some(content)
    }

    fn note(&mut self, name: &'static str, value: String, is_default: bool) {
        self.settings.push(Setting { name, value, is_default });
    }
}

/// How closely a value is kept.
#[derive(Clone, Copy)]
pub(super) enum Nature {
    Public,
    /// Never shown; a file of it that is open to everyone is warned of.
    Secret,
    /// Never shown; a file of it that is open to everyone is refused.
    PrivateKey,
}

impl Nature {
    fn shown(self, path: &str) -> String {
        match (self, path) {
            (Self::Public, "") => "(set)".to_owned(),
            (Self::Public, path) => format!("(from {path})"),
            (_, "") => "(hidden)".to_owned(),
            (_, path) => format!("(hidden, from {path})"),
        }
    }
}

/// All that an error says of a value: somebody may have put a secret where it does not belong.
pub(super) fn length(raw: &str) -> String {
    match raw.chars().count() {
        1 => "(1 character)".to_owned(),
        count => format!("({count} characters)"),
    }
}

/// An accepted value as the summary shows it: what stands before an `@` may be a password, and what has lines is
/// no name.
pub(super) fn without_credentials(text: &str) -> String {
    if text.chars().any(char::is_control) || text.contains("-----BEGIN") {
        return "(hidden)".to_owned();
    }
    match text.rsplit_once('@') {
        Some((_, rest)) => format!("(hidden)@{rest}"),
        None => text.to_owned(),
    }
}

/// PEM, however it survived the environment: as it is, with `\n` for its line breaks, in quotes, or as base64 of
/// the whole.
pub(super) fn pem_text(raw: &str) -> String {
    let raw = raw.trim().trim_matches(['"', '\'', '`']);
    if raw.contains("-----BEGIN") {
        return raw.replace("\\r", "").replace("\\n", "\n");
    }
    let compact: String = raw.split_whitespace().collect();
    let decoded = STANDARD.decode(compact).ok().and_then(|bytes| String::from_utf8(bytes).ok());
    decoded.unwrap_or_else(|| raw.to_owned())
}

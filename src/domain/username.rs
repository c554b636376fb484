use unicode_normalization::UnicodeNormalization;

use super::FieldError;

const LENGTH: std::ops::RangeInclusive<usize> = 3..=32;

/// A name to sign in with: ASCII letters, digits, `.`, `_` and `-`, never an `@`, so that it can't
/// be taken for an e-mail address, and no letter that only looks like another.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Username {
    typed: String,
    canonical: String,
}

impl Username {
    /// Takes what a user typed; width variants become the plain letters they stand for.
    pub fn parse(raw: &str) -> Result<Self, FieldError> {
        let typed: String = raw.trim().nfkc().collect();
        if typed.is_empty() {
            return Err(refused("is required"));
        }
        if !LENGTH.contains(&typed.chars().count()) {
            return Err(refused(format!("must be {} to {} characters long", LENGTH.start(), LENGTH.end())));
        }
        if !typed.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-')) {
            return Err(refused("may contain only the letters a to z, digits, '.', '_' and '-'"));
        }
        if !typed.starts_with(alphanumeric) || !typed.ends_with(alphanumeric) {
            return Err(refused("must begin and end with a letter or a digit"));
        }
        let canonical = typed.to_ascii_lowercase();
        Ok(Self { typed, canonical })
    }

    /// With the capitals the user typed.
    pub fn typed(&self) -> &str {
        &self.typed
    }

    /// The spelling that is unique among users.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }
}

fn alphanumeric(c: char) -> bool {
    c.is_ascii_alphanumeric()
}

fn refused(message: impl Into<String>) -> FieldError {
    FieldError::new("username", message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn variants_of_case_width_and_space_are_one_name() {
        for raw in ["alice", "Alice", " ALICE ", "Ａｌｉｃｅ"] {
            assert_eq!(Username::parse(raw).expect(raw).canonical(), "alice");
        }
        assert_eq!(Username::parse("Ａlice").expect("valid").typed(), "Alice");
    }

    #[test]
    fn names_outside_the_profile_are_refused() {
        for raw in [
            "",
            "  ",
            "ab",
            "a@b.c",
            "alice@example.com",
            "al ice",
            "-alice",
            "alice.",
            "_alice",
            "аlice",
            "ali\u{200d}ce",
            "ali\u{202e}ce",
            "alice\0",
            "älice",
            "alice!",
            "../etc",
        ] {
            assert!(Username::parse(raw).is_err(), "{raw:?} was accepted");
        }
    }

    #[test]
    fn the_length_is_3_to_32() {
        for (length, accepted) in [(2, false), (3, true), (32, true), (33, false)] {
            assert_eq!(Username::parse(&"a".repeat(length)).is_ok(), accepted, "{length}");
        }
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_its_own_canonical_form(raw in r"[a-zA-ZＡ-Ｚ0-9._\-]{1,40}") {
            if let Ok(name) = Username::parse(&raw) {
                let again = Username::parse(name.canonical()).expect("canonical names parse");
                prop_assert_eq!(again.canonical(), name.canonical());
                prop_assert!(!name.canonical().contains('@'));
            }
        }

        #[test]
        fn no_input_makes_it_panic(raw in any::<String>()) {
            let _ = Username::parse(&raw);
        }
    }
}

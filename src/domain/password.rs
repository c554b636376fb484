use secrecy::{ExposeSecret, SecretString};
use unicode_normalization::UnicodeNormalization;

use super::spelling::folded;
use super::{Email, FieldError, Username};

/// Bounds the work a request can ask for; far above what anyone types.
const MAX_BYTES: usize = 1024;

/// A password somebody may choose. Any Unicode, no rules of composition; shown by no `Debug`.
#[derive(Debug, Clone)]
pub struct Password(SecretString);

impl Password {
    /// Checks the length in characters and, where the owner is known, that the password is not
    /// one of the names that stand beside it.
    pub fn parse(raw: SecretString, min_chars: usize, owner: Option<(&Username, &Email)>) -> Result<Self, FieldError> {
        let text = raw.expose_secret();
        if text.is_empty() {
            return Err(refused("is required"));
        }
        if text.len() > MAX_BYTES {
            return Err(refused(format!("must be at most {MAX_BYTES} bytes long")));
        }
        // Normalising joins a letter and its accent, and takes one ligature apart into many
        // letters: neither may make a password look longer than what was typed.
        if text.chars().count().min(text.nfkc().count()) < min_chars {
            return Err(refused(format!("must be at least {min_chars} characters long")));
        }
        if let Some((username, email)) = owner {
            let text = folded(text);
            if [username.canonical(), email.canonical(), email.local_part(), &folded(email.typed())]
                .contains(&text.as_str())
            {
                return Err(refused("must not be the username or the e-mail address"));
            }
        }
        Ok(Self(raw))
    }

    /// The characters themselves.
    pub fn expose(&self) -> &str {
        self.0.expose_secret()
    }

    /// The password as a secret, to be compared with a stored one.
    pub fn as_secret(&self) -> &SecretString {
        &self.0
    }
}

fn refused(message: impl Into<String>) -> FieldError {
    FieldError::new("password", message)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(raw: &str) -> Result<Password, FieldError> {
        Password::parse(raw.into(), 8, None)
    }

    #[test]
    fn the_minimum_counts_characters_not_bytes() {
        for (raw, accepted) in [
            ("1234567", false),
            ("12345678", true),
            ("🔑🔑🔑🔑🔑🔑🔑", false),
            ("🔑🔑🔑🔑🔑🔑🔑🔑", true),
            // Four letters with four combining accents are four characters.
            ("e\u{301}e\u{301}e\u{301}e\u{301}", false),
            ("ü234567ü", true),
            // One character that normalises to eighteen is one character.
            ("\u{fdfa}", false),
        ] {
            assert_eq!(parse(raw).is_ok(), accepted, "{raw:?}");
        }
    }

    #[test]
    fn there_are_no_rules_of_composition() {
        for raw in ["aaaaaaaa", "        ", "пароль-пароль", "correct horse battery staple", "a\0bcdefg"] {
            assert!(parse(raw).is_ok(), "{raw:?}");
        }
    }

    #[test]
    fn a_kilobyte_is_accepted_and_one_byte_more_is_not() {
        assert!(parse(&"x".repeat(1024)).is_ok());
        let error = parse(&"x".repeat(1025)).expect_err("too long");
        assert_eq!(error.field, "password");
    }

    #[test]
    fn the_owners_own_names_are_no_password() {
        let username = Username::parse("anna.berg").expect("valid");
        let email = Email::parse("anna.berg.privat@bücher.example").expect("valid");
        for raw in [
            "Anna.Berg",
            " anna.berg",
            "ANNA.BERG.PRIVAT",
            "anna.berg.privat@bücher.example",
            "Anna.Berg.Privat@xn--bcher-kva.example",
        ] {
            let parsed = Password::parse(raw.into(), 8, Some((&username, &email)));
            assert!(parsed.is_err(), "{raw:?} was accepted");
        }
        assert!(Password::parse("anna.berg!".into(), 8, Some((&username, &email))).is_ok());
    }

    #[test]
    fn debug_does_not_show_it() {
        let password = parse("hunter2hunter2").expect("valid");
        assert!(!format!("{password:?}").contains("hunter2"));
    }
}

use email_address::{EmailAddress, Options};
use unicode_normalization::UnicodeNormalization;

use super::FieldError;
use super::spelling::{folded, is_invisible};

/// What RFC 5321 leaves of a path of 256 bytes between its angle brackets.
const MAX_BYTES: usize = 254;

/// An e-mail address somebody could receive mail under.
///
/// It keeps the spelling that was typed, for people, and one canonical spelling, for uniqueness
/// and login: the local part folded, the domain in its ASCII form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Email {
    typed: String,
    canonical: String,
}

impl Email {
    /// Takes what a user typed; white space around it is not part of the address.
    pub fn parse(raw: &str) -> Result<Self, FieldError> {
        let typed = raw.trim();
        if typed.is_empty() {
            return Err(refused("is required"));
        }
        if typed.len() > MAX_BYTES {
            return Err(refused(format!("must be at most {MAX_BYTES} bytes long")));
        }
        if typed.chars().any(is_invisible) {
            return Err(refused("must not contain invisible characters"));
        }
        let canonical =
            canonical(typed).ok_or_else(|| refused("must be an e-mail address such as name@example.com"))?;
        if canonical.len() > MAX_BYTES {
            return Err(refused(format!("must be at most {MAX_BYTES} bytes long in its normalised form")));
        }
        Ok(Self { typed: typed.to_owned(), canonical })
    }

    /// As the user typed it.
    pub fn typed(&self) -> &str {
        &self.typed
    }

    /// The spelling that is unique among users.
    pub fn canonical(&self) -> &str {
        &self.canonical
    }

    /// What stands before the `@`, in canonical spelling.
    pub fn local_part(&self) -> &str {
        self.canonical.split('@').next().unwrap_or_default()
    }
}

fn canonical(typed: &str) -> Option<String> {
    // Width variants of `@` and `.` fold to the real ones, so the parts are found afterwards.
    let compatible: String = typed.nfkc().collect();
    let (local, domain) = compatible.split_once('@')?;
    let domain = idna::domain_to_ascii_strict(domain).ok()?;
    let address = format!("{}@{domain}", folded(local));
    let options = Options::default().with_required_tld().without_domain_literal().without_display_text();
    EmailAddress::parse_with_options(&address, options).ok()?;
    let plain = !address.contains(|c: char| matches!(c, '"' | '\\') || c.is_whitespace() || is_invisible(c));
    // A domain whose last label is a number is an IP address that lost its brackets.
    let named = domain.rsplit('.').next()?.contains(|c: char| c.is_ascii_alphabetic());
    (plain && named).then_some(address)
}

fn refused(message: impl Into<String>) -> FieldError {
    FieldError::new("email", message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn canonical_of(raw: &str) -> String {
        Email::parse(raw).unwrap_or_else(|e| panic!("{raw:?}: {e}")).canonical
    }

    #[test]
    fn variants_of_case_width_and_space_are_one_address() {
        for raw in [
            "anna@example.com",
            "  Anna@Example.COM\n",
            "ANNA@EXAMPLE.COM",
            "ａｎｎａ@example.com",
            "anna＠example．com",
        ] {
            assert_eq!(canonical_of(raw), "anna@example.com");
        }
    }

    #[test]
    fn a_domain_has_one_spelling_in_any_script() {
        assert_eq!(canonical_of("a@bücher.example"), "a@xn--bcher-kva.example");
        assert_eq!(canonical_of("a@BÜCHER.example"), "a@xn--bcher-kva.example");
        assert_eq!(canonical_of("a@xn--bcher-kva.example"), "a@xn--bcher-kva.example");
    }

    #[test]
    fn the_typed_spelling_is_kept() {
        let email = Email::parse(" Anna.Berg@Example.com ").expect("valid");
        assert_eq!(email.typed(), "Anna.Berg@Example.com");
        assert_eq!(email.local_part(), "anna.berg");
    }

    #[test]
    fn what_could_not_receive_mail_is_refused() {
        for raw in [
            "",
            " ",
            "anna",
            "@example.com",
            "anna@",
            "a@b",
            "a@@example.com",
            "a@b@example.com",
            "a b@example.com",
            "a@exa mple.com",
            "a@example..com",
            "a@-example.com",
            "a@.com",
            ".a@example.com",
            "a.@example.com",
            "a..b@example.com",
            "a@[127.0.0.1]",
            "a@127.0.0.1",
            "\"a b\"@example.com",
            "Anna <a@example.com>",
            "a\u{200b}@example.com",
            "a\u{202e}@example.com",
            "a\0@example.com",
            "a@example.com\u{0007}x",
        ] {
            assert!(Email::parse(raw).is_err(), "{raw:?} was accepted");
        }
    }

    #[test]
    fn length_counts_in_bytes_and_in_the_canonical_form() {
        let domain = format!("{}.example", "d".repeat(60));
        let fits = format!("{}@{domain}", "a".repeat(64));
        assert!(Email::parse(&fits).is_ok());
        assert!(Email::parse(&format!("{}@{domain}", "a".repeat(65))).is_err());
        let long = format!("a@{}example", "label.".repeat(42));
        assert!(long.len() > MAX_BYTES);
        assert!(Email::parse(&long).is_err());
    }

    proptest! {
        #[test]
        fn the_canonical_form_is_its_own_canonical_form(
            raw in r"[\PC]{1,12}@[a-zA-Zäöü0-9-]{1,12}\.(com|Example|ΣΑΣ)"
        ) {
            if let Ok(email) = Email::parse(&raw) {
                prop_assert_eq!(canonical_of(email.canonical()), email.canonical());
                prop_assert_eq!(email.canonical().matches('@').count(), 1);
            }
        }

        #[test]
        fn no_input_makes_it_panic(raw in any::<String>()) {
            let _ = Email::parse(&raw);
        }
    }
}

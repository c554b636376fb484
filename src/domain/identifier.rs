use super::Email;
use super::spelling::folded;

/// What a login names, in the canonical spelling under which users are stored.
///
/// Looser than [`Email`] and [`Username`](super::Username): users who were adopted from the
/// replaced service may have names these would refuse today, and must still get in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Identifier {
    /// An e-mail address: it has an `@`, which no username has.
    Email(String),
    /// A username.
    Username(String),
}

impl Identifier {
    /// `None` when there is nothing in it to look for.
    pub fn parse(raw: &str) -> Option<Self> {
        let folded = folded(raw);
        // PostgreSQL's text has no NUL: nobody is stored under such a name.
        if folded.is_empty() || folded.contains('\0') {
            return None;
        }
        Some(if folded.contains('@') {
            // An address that parses may be stored under the ASCII form of its domain.
            Self::Email(Email::parse(raw).map_or(folded, |email| email.canonical().to_owned()))
        } else {
            Self::Username(folded)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::Username;

    #[test]
    fn an_at_sign_makes_it_an_email() {
        assert_eq!(Identifier::parse(" Anna@Example.com "), Some(Identifier::Email("anna@example.com".into())));
        assert_eq!(Identifier::parse("Anna"), Some(Identifier::Username("anna".into())));
        assert_eq!(Identifier::parse("anna＠example.com"), Some(Identifier::Email("anna@example.com".into())));
    }

    #[test]
    fn what_was_registered_is_found_again_however_it_is_typed() {
        let email = Email::parse("Anna@Bücher.example").expect("valid");
        for typed in ["anna@bücher.example", "ANNA@BÜCHER.EXAMPLE", "anna@xn--bcher-kva.example"] {
            assert_eq!(Identifier::parse(typed), Some(Identifier::Email(email.canonical().into())));
        }
        let name = Username::parse("Ａnna").expect("valid");
        assert_eq!(Identifier::parse("ANNA"), Some(Identifier::Username(name.canonical().into())));
    }

    #[test]
    fn names_of_adopted_users_need_not_follow_our_rules() {
        assert_eq!(Identifier::parse("Jörg Müller"), Some(Identifier::Username("jörg müller".into())));
        assert_eq!(Identifier::parse("root@localhost"), Some(Identifier::Email("root@localhost".into())));
    }

    #[test]
    fn nothing_is_nobody() {
        assert_eq!(Identifier::parse(" \t"), None);
        assert_eq!(Identifier::parse("an\0na"), None);
    }
}

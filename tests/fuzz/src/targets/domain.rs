//! Values a user types: username, e-mail address, password, what is signed in with.

use auth_service::domain::{Email, Identifier, Password, Username};

use super::Target;
use crate::parts::text;

/// The text itself.
pub const TARGET: Target = Target {
    name: "domain",
    seeds: &[
        b"Anna.Berg",
        b" \xef\xbc\xa1\xef\xbd\x8c\xef\xbd\x89\xef\xbd\x83\xef\xbd\x85 ",
        b"Anna.Berg+x@B\xc3\xbccher.example",
        b"a@xn--bcher-kva.example",
        b"\xe0\xa4\xb9\xe0\xa4\xbf\xe0\xa4\xa8\xe0\xa5\x8d\xe0\xa4\xa6\xe0\xa5\x80@example.in",
        b"\"a b\"@[127.0.0.1]",
        b"J\xc3\xb6rg M\xc3\xbcller\x00",
        b"correct horse battery staple",
        b"\xef\xb7\xba\xef\xb7\xba",
        b"\xce\xa3\xce\x91\xce\xa3@\xce\xa3\xce\x91\xce\xa3.example",
        b"root@localhost",
    ],
    run,
};

fn run(input: &[u8]) {
    let raw = text(input);
    let (username, email) = (Username::parse(&raw), Email::parse(&raw));
    let identifier = Identifier::parse(&raw);
    match &username {
        Ok(name) => {
            check_text(name.typed());
            check_text(name.canonical());
            assert!((3..=32).contains(&name.canonical().chars().count()) && !name.canonical().contains('@'));
            for again in [name.typed(), name.canonical()] {
                let parsed = Username::parse(again).expect("what was accepted is accepted again");
                assert_eq!(parsed.canonical(), name.canonical(), "{again:?}");
            }
            // Or the user could not sign in.
            assert_eq!(identifier, Some(Identifier::Username(name.canonical().to_owned())), "{raw:?}");
        }
        Err(error) => check_refusal(&error.to_string()),
    }
    match &email {
        Ok(email) => {
            check_text(email.typed());
            check_text(email.canonical());
            assert!(email.canonical().len() <= 254 && email.canonical().matches('@').count() == 1);
            assert!(!email.local_part().is_empty() && !email.canonical().contains(char::is_whitespace));
            for again in [email.typed(), email.canonical()] {
                let parsed = Email::parse(again).expect("what was accepted is accepted again");
                assert_eq!(parsed.canonical(), email.canonical(), "{again:?}");
            }
            assert_eq!(identifier, Some(Identifier::Email(email.canonical().to_owned())), "{raw:?}");
        }
        Err(error) => check_refusal(&error.to_string()),
    }
    if let Some(identifier) = &identifier {
        let (Identifier::Email(text) | Identifier::Username(text)) = identifier;
        assert!(!text.is_empty() && !text.contains('\0') && text.trim() == text, "{text:?}");
        assert_eq!(matches!(identifier, Identifier::Email(_)), text.contains('@'), "{text:?}");
        assert_eq!(Identifier::parse(text).as_ref(), Some(identifier), "{raw:?}");
    }
    match Password::parse(raw.as_str().into(), 8, None) {
        Ok(password) => {
            assert_eq!(password.expose(), raw, "a password is what was typed");
            assert!(raw.len() <= 1024 && raw.chars().count() >= 8);
        }
        Err(error) => check_refusal(&error.to_string()),
    }
    let owner = [Username::parse("anna"), username];
    if let [Ok(anna), Ok(name)] = &owner
        && let Ok(email) = email.or(Email::parse("anna@example.com"))
    {
        let own = Password::parse(raw.as_str().into(), 1, Some((name, &email)));
        assert!(own.is_err(), "the username as the password: {raw:?}");
        let _ = Password::parse(raw.as_str().into(), 8, Some((anna, &email)));
    }
}

/// It can stand in a text column, a JSON value, a line.
fn check_text(text: &str) {
    assert!(!text.is_empty() && text.trim() == text && !text.chars().any(char::is_control), "{text:?}");
}

fn check_refusal(error: &str) {
    assert!(error.len() < 200 && !error.contains(char::is_control), "{error:?}");
}

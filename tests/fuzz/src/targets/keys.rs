//! Keys in the environment: PEM, or what is given for it.

use auth_service::crypto::{KeyError, KeyRing, PrivateKeys, PublicKeys};
use secrecy::ExposeSecret;

use super::Target;
use crate::{
    parts::{parts, text},
    service::KEYS,
};

/// Private and public PEM; `{private}` and `{public}` stand for good ones.
pub const TARGET: Target = Target {
    name: "keys",
    seeds: &[
        b"{private}\x1e{public}",
        b"{public}\x1e{private}",
        b"{private}{private}\x1e{public}\n{public}",
        b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n-----END PRIVATE KEY-----\n\x1e-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA11qYAYKxCrfVS/7TyWQHOg7hcvPapiMlrwIaaPcHURo=\n-----END PUBLIC KEY-----",
        b"-----BEGIN ENCRYPTED PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\n\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\x1e-----BEGIN RSA PUBLIC KEY-----\nMAsCAwEAAQIEAAAAAQ==\n-----END RSA PUBLIC KEY-----",
        b"-----BEGIN PRIVATE KEY-----\n-----END RSA PRIVATE KEY-----\x1ec4nary",
    ],
    run,
};

fn run(input: &[u8]) {
    let [private, public] = parts(input).map(text);
    let filled_in = |text: String| {
        text.replace("{private}", KEYS.access.private.expose_secret()).replace("{public}", &KEYS.access.public)
    };
    let (private, public) = (filled_in(private), filled_in(public));
    let parsed = (PrivateKeys::parse(&private.as_str().into()), PublicKeys::parse(&public));
    for error in [parsed.0.as_ref().err(), parsed.1.as_ref().err()].into_iter().flatten() {
        check_error(error);
    }
    let (Ok(private), Ok(public)) = parsed else { return };
    match KeyRing::new("access", private, public) {
        Ok(ring) => assert_eq!(ring.kid().len(), 43),
        Err(error) => check_error(&error),
    }
}

fn check_error(error: &KeyError) {
    let said = error.to_string();
    assert!(said.len() <= 1000 && !said.contains(char::is_control), "{said:?}");
    assert!(!said.contains("c4nary"), "{said:?}");
}

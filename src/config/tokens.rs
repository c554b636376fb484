use std::time::Duration;

use secrecy::{ExposeSecret, SecretString};

use super::vars::{Vars, pem_text};
use crate::crypto::{KeyError, KeyRing, PrivateKeys, PublicKeys, TokenSettings, TokenSigner};

const DAY: Duration = Duration::from_secs(24 * 3600);

pub(super) fn settings(vars: &mut Vars) -> TokenSettings {
    let seconds = Duration::from_secs;
    let access_ttl = vars.duration("ACCESS_TOKEN_EXPIRES_IN", seconds(15 * 60), seconds(1)..=30 * DAY);
    let refresh_ttl = vars.duration("REFRESH_TOKEN_EXPIRES_IN", 7 * DAY, seconds(1)..=400 * DAY);
    // A fleet whose refresh tokens live longer than our default meant it.
    let session_ttl = vars.duration("SESSION_MAX_AGE", refresh_ttl.max(30 * DAY), seconds(1)..=3650 * DAY);
    let reuse_window = vars.duration("REFRESH_REUSE_WINDOW", seconds(30), Duration::ZERO..=seconds(300));
    let issuer = vars.text("TOKEN_ISSUER", "auth-service");
    let access_audience = vars.text("ACCESS_TOKEN_AUDIENCE", "fleet");
    let refresh_audience = format!("{issuer}/refresh");
    if access_audience == refresh_audience {
        vars.reject(
            "ACCESS_TOKEN_AUDIENCE",
            "is the audience of refresh tokens",
            "Name who accepts access tokens, for example ACCESS_TOKEN_AUDIENCE=fleet",
        );
    }
    TokenSettings { issuer, access_audience, refresh_audience, access_ttl, refresh_ttl, session_ttl, reuse_window }
}

pub(super) fn signer(vars: &mut Vars, settings: &TokenSettings) -> Option<TokenSigner> {
    let access = ring(vars, "access", "ACCESS_TOKEN_PRIVATE_KEY", "ACCESS_TOKEN_PUBLIC_KEY");
    let refresh = ring(vars, "refresh", "REFRESH_TOKEN_PRIVATE_KEY", "REFRESH_TOKEN_PUBLIC_KEY");
    let signer = TokenSigner::new(access?, refresh?, settings.clone());
    accepted(vars, "REFRESH_TOKEN_PUBLIC_KEY", signer)
}

fn ring(
    vars: &mut Vars,
    purpose: &'static str,
    private_name: &'static str,
    public_name: &'static str,
) -> Option<KeyRing> {
    let private_text = vars.private_key(private_name);
    let public_text = vars.text_or_file(public_name);
    for (name, set) in [(private_name, private_text.is_some()), (public_name, public_text.is_some())] {
        // A file that could not be read has had its say.
        if !set && !vars.is_set(name) && !vars.is_set(&format!("{name}_FILE")) {
            vars.reject(
                name,
                "is not set",
                format!(
                    "Set it to a PEM key or {name}_FILE to the path of one; \
                     `auth-service keys generate --out DIR` makes all four"
                ),
            );
        }
    }
    let private = private_text.and_then(|text| {
        let pem = SecretString::from(pem_text(text.expose_secret()));
        accepted(vars, private_name, PrivateKeys::parse(&pem))
    });
    let public = public_text.and_then(|text| accepted(vars, public_name, PublicKeys::parse(&pem_text(&text))));
    let ring = KeyRing::new(purpose, private?, public?);
    accepted(vars, private_name, ring)
}

fn accepted<T>(vars: &mut Vars, variable: &str, result: Result<T, KeyError>) -> Option<T> {
    match result {
        Ok(value) => Some(value),
        Err(error) => {
            vars.reject(variable, error.fault(), error.way_out());
            None
        }
    }
}

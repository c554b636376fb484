//! Who an operator is, and how their token is made.
//!
//! A token is random and long, so its plain SHA-256 is all that is configured, and guessing needs no
//! lock-out.

use std::sync::Arc;

use aws_lc_rs::{
    digest::{SHA256, digest},
    rand,
};
use axum::{
    extract::{FromRequestParts, Request, State},
    http::{HeaderMap, header, request::Parts},
    middleware::Next,
    response::Response,
};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use outbox_relay::logging::truncated;
use secrecy::{ExposeSecret, SecretString};
use subtle::ConstantTimeEq;

use super::error::AdminError;
use crate::{
    app::App,
    config::{AdminToken, Scope},
};

const NOT_CONFIGURED: &str =
    "No admin tokens are configured: make one with `auth-service admin-token new` and set ADMIN_TOKENS";
const NOT_SENT: &str = "Send \"Authorization: Bearer <token>\" with a token of ADMIN_TOKENS";
const NOT_KNOWN: &str = "The token is not one of ADMIN_TOKENS";

/// Whoever the token of a request belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Operator {
    name: Arc<str>,
    reach: Scope,
}

impl Operator {
    /// By a request's headers.
    pub fn identify(headers: &HeaderMap, tokens: &[AdminToken]) -> Result<Self, AdminError> {
        let Some(token) = bearer(headers) else {
            return Err(AdminError::NoToken(if tokens.is_empty() { NOT_CONFIGURED } else { NOT_SENT }));
        };
        let presented = digest(&SHA256, token.as_bytes());
        // All of them are compared, each in the same time, so that nothing is learnt from a miss.
        let mut found = None;
        for token in tokens {
            if bool::from(token.sha256.ct_eq(presented.as_ref())) {
                found = Some(token);
            }
        }
        let known = found.and_then(|token| Some((token, token.scopes.iter().max()?)));
        match known {
            Some((token, reach)) => Ok(Self { name: token.name.as_str().into(), reach: *reach }),
            None => Err(AdminError::NoToken(NOT_KNOWN)),
        }
    }

    /// As the audit log has it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether they may do what needs this scope; each scope includes the ones before it.
    pub fn may(&self, needed: Scope) -> bool {
        self.reach >= needed
    }
}

impl FromRequestParts<App> for Operator {
    type Rejection = AdminError;

    async fn from_request_parts(parts: &mut Parts, _: &App) -> Result<Self, AdminError> {
        parts.extensions.get().cloned().ok_or(AdminError::Internal)
    }
}

/// Lets operators in, and nobody else. The smallest scope is enough here: what a route needs beyond
/// it, the route asks for.
pub async fn admit(State(app): State<App>, mut request: Request, next: Next) -> Result<Response, AdminError> {
    let operator = Operator::identify(request.headers(), &app.config.admin.tokens).inspect_err(|_| {
        metrics::counter!("auth_admin_refusals_total", "why" => "token").increment(1);
        tracing::warn!(path = %truncated(request.uri().path()), "somebody without a good token was turned away");
    })?;
    request.extensions_mut().insert(operator);
    Ok(next.run(request).await)
}

fn bearer(headers: &HeaderMap) -> Option<&str> {
    let mut given = headers.get_all(header::AUTHORIZATION).iter();
    // Of two, a proxy and we might each believe another one.
    let (Some(value), None) = (given.next(), given.next()) else { return None };
    let (scheme, token) = value.to_str().ok()?.split_once(' ')?;
    let token = token.trim();
    (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then_some(token)
}

/// A token, and how the configuration knows it.
#[derive(Debug)]
pub struct AdminSecret {
    /// What the operator sends.
    pub token: SecretString,
    /// For `ADMIN_TOKENS`: `name:scopes:sha256`.
    pub entry: String,
}

/// Why there is no token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SecretError {
    /// The name.
    #[error("the name {0:?} can't stand in ADMIN_TOKENS: use 1 to 64 of the letters a-z, A-Z, digits and . _ -")]
    Name(String),
    /// A scope.
    #[error("there is no scope {0:?}: the scopes are read, operate and admin")]
    Scope(String),
    /// No scope.
    #[error("a token needs a scope: read, operate or admin")]
    NoScope,
    /// No token.
    #[error("a token must not be empty; delete the file it was read from to have a new one made")]
    Empty,
    /// The system has no randomness to give.
    #[error("the system gave no random bytes")]
    Random,
}

impl AdminSecret {
    /// A new random token.
    pub fn generate(name: &str, scopes: &[&str]) -> Result<Self, SecretError> {
        let mut bytes = [0; 32];
        rand::fill(&mut bytes).map_err(|_| SecretError::Random)?;
        Self::from_token(name, scopes, format!("adm_{}", URL_SAFE_NO_PAD.encode(bytes)))
    }

    /// A token that exists already.
    pub fn from_token(name: &str, scopes: &[&str], token: String) -> Result<Self, SecretError> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        if !(1..=64).contains(&name.len()) || !name.chars().all(plain) {
            return Err(SecretError::Name(name.to_owned()));
        }
        let unknown = scopes.iter().find(|scope| Scope::parse(scope).is_none());
        match unknown {
            Some(scope) => return Err(SecretError::Scope((*scope).to_owned())),
            None if scopes.is_empty() => return Err(SecretError::NoScope),
            None if token.is_empty() => return Err(SecretError::Empty),
            None => {}
        }
        let hash = digest(&SHA256, token.as_bytes());
        let hex: String = hash.as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        Ok(Self { entry: format!("{name}:{}:{hex}", scopes.join("+")), token: token.into() })
    }
}

/// What `admin-token new` prints: the only time the token is seen.
pub fn new_token(name: &str, scopes: &[String]) -> Result<String, SecretError> {
    let scopes: Vec<&str> = scopes.iter().map(|scope| scope.trim()).collect();
    let secret = AdminSecret::generate(name, &scopes)?;
    Ok(format!(
        "The token of {name}, shown this once:\n\n  {}\n\nIts entry for ADMIN_TOKENS (comma-separated) or \
         the file ADMIN_TOKENS_FILE names (one a line):\n\n  {}\n",
        secret.token.expose_secret(),
        secret.entry
    ))
}

#[cfg(test)]
mod tests {
    use axum::http::HeaderValue;

    use super::*;

    fn token(name: &str, scopes: &[Scope], token: &str) -> AdminToken {
        let sha256 = digest(&SHA256, token.as_bytes()).as_ref().try_into().expect("32 bytes");
        AdminToken { name: name.to_owned(), scopes: scopes.to_vec(), sha256 }
    }

    fn headers(values: &[&'static str]) -> HeaderMap {
        values.iter().map(|value| (header::AUTHORIZATION, HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn a_token_is_its_operators_and_no_others() {
        let tokens = [token("ada", &[Scope::Read], "a-secret"), token("eve", &[Scope::Admin], "e-secret")];
        let who =
            |values: &[&'static str]| Operator::identify(&headers(values), &tokens).map(|who| who.name().to_owned());
        assert_eq!(who(&["Bearer a-secret"]).as_deref(), Ok("ada"));
        assert_eq!(who(&["bearer  e-secret"]).as_deref(), Ok("eve"));
        assert_eq!(who(&["Bearer x"]), Err(AdminError::NoToken(NOT_KNOWN)));
        for bad in [
            &["Basic a-secret"][..],
            &["Bearer"],
            &["Bearer "],
            &["a-secret"],
            &[],
            &["Bearer a-secret", "Bearer e-secret"],
        ] {
            assert_eq!(who(bad), Err(AdminError::NoToken(NOT_SENT)), "{bad:?}");
        }
        assert_eq!(Operator::identify(&headers(&[]), &[]), Err(AdminError::NoToken(NOT_CONFIGURED)));
    }

    #[test]
    fn a_scope_includes_the_ones_before_it() {
        let tokens = [token("ada", &[Scope::Operate], "a"), token("eve", &[Scope::Read, Scope::Admin], "e")];
        let ada = Operator::identify(&headers(&["Bearer a"]), &tokens).expect("known");
        assert!(ada.may(Scope::Read) && ada.may(Scope::Operate) && !ada.may(Scope::Admin));
        let eve = Operator::identify(&headers(&["Bearer e"]), &tokens).expect("known");
        assert!(eve.may(Scope::Operate) && eve.may(Scope::Admin));
    }

    #[test]
    fn a_new_token_is_long_and_its_own() {
        let [first, second] = [(); 2].map(|()| AdminSecret::generate("ops", &["read", "operate"]).expect("a token"));
        assert!(first.token.expose_secret().len() >= 43);
        assert_ne!(first.token.expose_secret(), second.token.expose_secret());
        assert!(first.entry.starts_with("ops:read+operate:"), "{}", first.entry);
        assert!(!format!("{first:?}").contains(first.token.expose_secret()));
        let printed = new_token("ops", &["read".to_owned()]).expect("a token");
        assert!(printed.contains("adm_") && printed.contains("ops:read:"), "{printed}");
    }

    #[test]
    fn what_the_configuration_would_refuse_is_not_made() {
        assert_eq!(AdminSecret::generate("a b", &["read"]).unwrap_err(), SecretError::Name("a b".into()));
        assert_eq!(AdminSecret::generate("ops", &["write"]).unwrap_err(), SecretError::Scope("write".into()));
        assert_eq!(AdminSecret::generate("ops", &[]).unwrap_err(), SecretError::NoScope);
        assert_eq!(AdminSecret::from_token("ops", &["read"], String::new()).unwrap_err(), SecretError::Empty);
    }
}

use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use chrono::{DateTime, Utc};
use jsonwebtoken::jwk::JwkSet;
use jsonwebtoken::{Algorithm, DecodingKey, Header, Validation};
use secrecy::SecretString;
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::keys::{KeyError, KeyRing};
use crate::domain::{AccessClaims, CLOCK_LEEWAY, LegacyRefreshClaims, RefreshClaims, Session, User};

/// More than any token of ours (an 8192-bit key gives 2.3 KB), and little enough to parse for anyone.
const MAX_TOKEN_BYTES: usize = 4096;
const ACCESS_TYPE: &str = "at+jwt";
const REFRESH_TYPE: &str = "rt+jwt";

/// How tokens are made and how long they live.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSettings {
    /// `iss` of every token.
    pub issuer: String,
    /// `aud` of access tokens: everyone who lets our users in.
    pub access_audience: String,
    /// `aud` of refresh tokens: ourselves.
    pub refresh_audience: String,
    /// Life of an access token.
    pub access_ttl: Duration,
    /// Life of a refresh token, and with it of an idle session.
    pub refresh_ttl: Duration,
    /// Life of a session, however often it is refreshed.
    pub session_ttl: Duration,
    /// For how long after a refresh the token before it still gets the current one.
    pub reuse_window: Duration,
}

/// A token and the end of its life.
#[derive(Debug, Clone)]
pub struct SignedToken {
    /// The token; shown by no `Debug`.
    pub token: SecretString,
    /// When it ends, in whole seconds, as it says itself.
    pub expires_at: DateTime<Utc>,
}

/// Why there is no token, or no claims.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// Not ours, not of this kind, or changed on the way.
    #[error("the token is not valid")]
    Invalid,
    /// The key refused to sign.
    #[error("the token could not be signed")]
    SigningFailed,
}

/// Makes and checks the tokens. Cheap to clone.
///
/// What it does not check is time: the clocks of two replicas differ, and a token must not be good
/// here and over there. The claims are handed out as they are, and their reader compares them with
/// the clock of the database, which also tells whether the session lives.
#[derive(Debug, Clone)]
pub struct TokenSigner(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    access: KeyRing,
    refresh: KeyRing,
    settings: TokenSettings,
    access_rules: Validation,
    refresh_rules: Validation,
    legacy_rules: Validation,
}

impl TokenSigner {
    /// Refuses key rings that share a key.
    pub fn new(access: KeyRing, refresh: KeyRing, settings: TokenSettings) -> Result<Self, KeyError> {
        if refresh.kids().any(|kid| access.kids().any(|other| other == kid)) {
            return Err(KeyError::Shared);
        }
        let rules = |audience: &str| {
            let mut rules = Validation::new(Algorithm::RS256);
            rules.set_required_spec_claims(&["exp", "nbf", "iss", "aud", "sub"]);
            rules.set_issuer(&[&settings.issuer]);
            rules.set_audience(&[audience]);
            rules.validate_exp = false;
            rules
        };
        let mut legacy_rules = Validation::new(Algorithm::RS256);
        legacy_rules.validate_aud = false;
        legacy_rules.validate_exp = false;
        Ok(Self(Arc::new(Inner {
            access_rules: rules(&settings.access_audience),
            refresh_rules: rules(&settings.refresh_audience),
            legacy_rules,
            access,
            refresh,
            settings,
        })))
    }

    /// How tokens are made.
    pub fn settings(&self) -> &TokenSettings {
        &self.0.settings
    }

    /// The key id a new session row gets.
    pub fn refresh_kid(&self) -> &str {
        self.0.refresh.kid()
    }

    /// An access token for `user` in `session`; it never outlives the session. `now` is the database's
    /// time.
    pub fn sign_access(&self, user: &User, session: &Session, now: DateTime<Utc>) -> Result<SignedToken, TokenError> {
        let settings = self.settings();
        let exp = (now + settings.access_ttl).min(session.absolute_expires_at).timestamp();
        let claims = AccessClaims {
            id: user.id.0.into(),
            username: user.username.clone(),
            email: user.email.clone(),
            sub: user.id.to_string(),
            sid: session.session_id,
            jti: Uuid::now_v7(),
            iss: settings.issuer.clone(),
            aud: settings.access_audience.clone(),
            iat: now.timestamp(),
            nbf: now.timestamp() - CLOCK_LEEWAY,
            exp,
        };
        let ring = &self.0.access;
        sign(ring, ring.kid(), ACCESS_TYPE, &claims, exp)
    }

    /// The session's current refresh token, made from the row alone: the same row gives the same
    /// bytes, on every replica and every time, as long as the row's key is here.
    pub fn sign_refresh(&self, session: &Session) -> Result<SignedToken, TokenError> {
        let settings = self.settings();
        let exp = session.expires_at.timestamp();
        let claims = RefreshClaims {
            sub: session.user_id.to_string(),
            sid: session.session_id,
            jti: session.jti,
            generation: session.generation,
            iss: settings.issuer.clone(),
            aud: settings.refresh_audience.clone(),
            iat: session.issued_at.timestamp(),
            nbf: session.issued_at.timestamp(),
            exp,
        };
        let ring = &self.0.refresh;
        sign(ring, ring.signing_kid(&session.kid), REFRESH_TYPE, &claims, exp)
    }

    /// The claims of an access token of ours, whether or not its time has passed.
    pub fn verify_access(&self, token: &str) -> Result<AccessClaims, TokenError> {
        verify(&self.0.access, &self.0.access_rules, ACCESS_TYPE, token)
    }

    /// The claims of a refresh token of ours, whether or not its time has passed. Whether its session
    /// still lives, only the row knows.
    pub fn verify_refresh(&self, token: &str) -> Result<RefreshClaims, TokenError> {
        verify(&self.0.refresh, &self.0.refresh_rules, REFRESH_TYPE, token)
    }

    /// The claims of a refresh token the replaced service signed with the same key: it knew
    /// neither audience nor issuer nor key ids. Such a token counts only where its hash is stored.
    pub fn verify_legacy_refresh(&self, token: &str) -> Result<LegacyRefreshClaims, TokenError> {
        let header = plain_header(token)?;
        if header.typ.is_some_and(|typ| !typ.eq_ignore_ascii_case("JWT")) {
            return Err(TokenError::Invalid);
        }
        let mut keys = self.0.refresh.decoding_keys();
        keys.find_map(|key| decode(token, key, &self.0.legacy_rules).ok()).ok_or(TokenError::Invalid)
    }

    /// The public keys of access tokens. Refresh tokens are nobody else's business.
    pub fn jwks(&self) -> JwkSet {
        JwkSet { keys: self.0.access.jwks() }
    }
}

/// Signs with the parsed key: `jsonwebtoken::encode` parses and checks the PEM again for every
/// token, which takes longer than the signature.
fn sign(ring: &KeyRing, kid: &str, kind: &str, claims: &impl Serialize, exp: i64) -> Result<SignedToken, TokenError> {
    let mut header = Header::new(Algorithm::RS256);
    header.typ = Some(kind.to_owned());
    header.kid = Some(kid.to_owned());
    let part = |json: serde_json::Result<Vec<u8>>| {
        json.map(|json| URL_SAFE_NO_PAD.encode(json)).map_err(|_| TokenError::SigningFailed)
    };
    let message = format!("{}.{}", part(serde_json::to_vec(&header))?, part(serde_json::to_vec(claims))?);
    let signature = ring.sign(kid, message.as_bytes()).ok_or(TokenError::SigningFailed)?;
    Ok(SignedToken {
        token: format!("{message}.{signature}").into(),
        expires_at: DateTime::from_timestamp(exp, 0).ok_or(TokenError::SigningFailed)?,
    })
}

fn verify<C: DeserializeOwned>(ring: &KeyRing, rules: &Validation, kind: &str, token: &str) -> Result<C, TokenError> {
    let header = plain_header(token)?;
    // The JWT library does not look at the type.
    if header.typ.as_deref() != Some(kind) {
        return Err(TokenError::Invalid);
    }
    let key = header.kid.and_then(|kid| ring.decoding_key(&kid)).ok_or(TokenError::Invalid)?;
    decode(token, key, rules)
}

/// The header of a token that is small enough, signed with RS256, and neither brings its own key
/// nor demands an extension we do not know.
fn plain_header(token: &str) -> Result<Header, TokenError> {
    if token.len() > MAX_TOKEN_BYTES {
        return Err(TokenError::Invalid);
    }
    let header = jsonwebtoken::decode_header(token).map_err(|_| TokenError::Invalid)?;
    let foreign = header.crit.is_some()
        || header.jku.is_some()
        || header.jwk.is_some()
        || header.x5u.is_some()
        || header.x5c.is_some();
    if foreign || header.alg != Algorithm::RS256 {
        return Err(TokenError::Invalid);
    }
    Ok(header)
}

fn decode<C: DeserializeOwned>(token: &str, key: &DecodingKey, rules: &Validation) -> Result<C, TokenError> {
    jsonwebtoken::decode(token, key, rules).map(|data| data.claims).map_err(|_| TokenError::Invalid)
}

#[cfg(test)]
mod tests;

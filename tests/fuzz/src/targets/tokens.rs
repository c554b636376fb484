//! Access tokens, refresh tokens, and those of the replaced service: as they come, and signed with our keys whatever
//! they say.

use std::sync::LazyLock;

use auth_service::crypto::{TokenError, TokenSigner};
use base64::{Engine, engine::general_purpose::URL_SAFE_NO_PAD};
use jsonwebtoken::{Algorithm, EncodingKey, crypto::sign};
use secrecy::ExposeSecret;
use serde_json::Value;

use super::Target;
use crate::{
    parts::{parts, text},
    service::{APP, KEYS, filled_in},
};

/// `raw` and the token; or `access` or `refresh`, header and claims, to be signed with that key. `{kid}` stands for
/// the key's id.
pub const TARGET: Target = Target {
    name: "tokens",
    seeds: &[
        b"raw\x1e{access}",
        b"raw\x1e{refresh}",
        b"raw\x1eeyJhbGciOiJub25lIn0.e30.",
        b"access\x1e{\"typ\":\"at+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\"}\x1e{\"id\":7,\"username\":\"Anna\",\"email\":\"a@b.cd\",\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"iss\":\"auth-service\",\"aud\":\"fleet\",\"iat\":1800000000,\"nbf\":1800000000,\"exp\":9800000000}",
        b"refresh\x1e{\"typ\":\"rt+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\"}\x1e{\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"gen\":-1,\"iss\":\"auth-service\",\"aud\":[\"auth-service/refresh\"],\"iat\":1.5,\"nbf\":-9223372036854775808,\"exp\":9223372036854775807}",
        b"refresh\x1e{\"alg\":\"RS256\",\"typ\":\"JWT\"}\x1e{\"userId\":7,\"iat\":1700000000,\"exp\":1e300}",
        b"refresh\x1e{\"alg\":\"RS256\",\"crit\":[\"exp\"],\"jwk\":{\"kty\":\"oct\",\"k\":\"AA\"},\"kid\":\"../../etc/passwd\"}\x1e{\"id\":1,\"userId\":2}",
        b"access\x1e{\"typ\":\"at+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\"}\x1e{\"id\":7,\"username\":\"Anna\",\"email\":\"a@b.cd\",\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"iss\":\"auth-service\",\"aud\":\"elsewhere\",\"iat\":1700000000,\"nbf\":1700000000,\"exp\":9800000000}",
        b"access\x1e{\"typ\":\"at+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\"}\x1e{\"id\":7,\"username\":\"Anna\",\"email\":\"a@b.cd\",\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"iss\":\"elsewhere\",\"aud\":\"fleet\",\"iat\":1700000000,\"nbf\":1700000000,\"exp\":9800000000}",
        b"access\x1e{\"typ\":\"rt+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\"}\x1e{\"id\":7,\"username\":\"Anna\",\"email\":\"a@b.cd\",\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"iss\":\"auth-service\",\"aud\":\"fleet\",\"iat\":1700000000,\"nbf\":1700000000,\"exp\":9800000000}",
        b"access\x1e{\"typ\":\"at+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\",\"crit\":[\"exp\"]}\x1e{\"id\":7,\"username\":\"Anna\",\"email\":\"a@b.cd\",\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"iss\":\"auth-service\",\"aud\":\"fleet\",\"iat\":1700000000,\"nbf\":1700000000,\"exp\":9800000000}",
        b"refresh\x1e{\"typ\":\"rt+jwt\",\"alg\":\"RS256\",\"kid\":\"{kid}\"}\x1e{\"sub\":\"7\",\"sid\":\"00000000-0000-0000-0000-000000000001\",\"jti\":\"00000000-0000-0000-0000-000000000002\",\"gen\":1,\"iss\":\"auth-service\",\"aud\":\"fleet\",\"iat\":1700000000,\"nbf\":1700000000,\"exp\":9800000000}",
        b"access\x1e{\"alg\":\"HS256\",\"typ\":\"at+jwt\"}\x1e[]",
    ],
    run,
};

struct Key {
    kid: String,
    key: EncodingKey,
}

static ACCESS: LazyLock<Key> = LazyLock::new(|| Key::new(0, KEYS.access.private.expose_secret()));
static REFRESH: LazyLock<Key> = LazyLock::new(|| Key::new(1, KEYS.refresh.private.expose_secret()));

impl Key {
    /// The id is in our own token of that kind.
    fn new(kind: usize, pem: &str) -> Self {
        let header = jsonwebtoken::decode_header(&crate::service::TOKENS[kind]).expect("our own token");
        Self {
            kid: header.kid.expect("a key id"),
            key: EncodingKey::from_rsa_pem(pem.as_bytes()).expect("our own key"),
        }
    }

    fn token(&self, header: &[u8], claims: &[u8]) -> String {
        let header = text(header).replace("{kid}", &self.kid);
        let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = sign(message.as_bytes(), &self.key, Algorithm::RS256).expect("a signature");
        format!("{message}.{signature}")
    }
}

fn run(input: &[u8]) {
    let [kind, first, second] = parts(input);
    let signer = &APP.signer;
    let token = match kind {
        b"access" => ACCESS.token(first, second),
        b"refresh" => REFRESH.token(first, second),
        _ => text(&filled_in(first)),
    };
    let claims: Option<Value> = serde_json::from_slice(second).ok();
    if let Ok(accepted) = signer.verify_access(&token) {
        assert_ne!(kind, b"refresh", "a refresh key made an access token");
        assert_eq!((accepted.iss.as_str(), accepted.aud.as_str()), ("auth-service", "fleet"));
        check_header(&token, "at+jwt");
    }
    if let Ok(accepted) = signer.verify_refresh(&token) {
        assert_ne!(kind, b"access", "an access key made a refresh token");
        assert_eq!((accepted.iss.as_str(), accepted.aud.as_str()), ("auth-service", "auth-service/refresh"));
        check_header(&token, "rt+jwt");
    }
    if let Ok(accepted) = signer.verify_legacy_refresh(&token) {
        assert_ne!(kind, b"access", "an access key made a refresh token");
        if kind == b"refresh" {
            let claims = claims.expect("claims that were accepted");
            assert!([&claims["id"], &claims["userId"]].contains(&&Value::from(accepted.user_id)), "{claims}");
        }
    }
    check_changed(signer, &token);
}

fn check_header(token: &str, kind: &str) {
    let header = jsonwebtoken::decode_header(token).expect("a header that was accepted");
    assert_eq!((header.typ.as_deref(), header.alg), (Some(kind), Algorithm::RS256));
    assert!(header.crit.is_none() && header.jwk.is_none() && header.jku.is_none() && header.x5u.is_none());
}

/// A token with one sign changed is not a token.
fn check_changed(signer: &TokenSigner, token: &str) {
    let Some(dot) = token.rfind('.') else { return };
    let mut changed = token.as_bytes().to_vec();
    let Some(sign) = changed.get_mut(dot + 1) else { return };
    *sign = if *sign == b'A' { b'B' } else { b'A' };
    let Ok(changed) = String::from_utf8(changed) else { return };
    assert_eq!(signer.verify_access(&changed).err(), Some(TokenError::Invalid));
    assert_eq!(signer.verify_refresh(&changed).err(), Some(TokenError::Invalid));
    assert_eq!(signer.verify_legacy_refresh(&changed).err(), Some(TokenError::Invalid));
}

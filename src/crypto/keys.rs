use std::fmt;

use aws_lc_rs::encoding::{AsDer, PublicKeyX509Der};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::rsa::{KeyPair, PublicKey};
use aws_lc_rs::signature::{KeyPair as _, RSA_PKCS1_SHA256, RsaPublicKeyComponents};
use jsonwebtoken::jwk::{Jwk, PublicKeyUse, ThumbprintHash};
use jsonwebtoken::{Algorithm, DecodingKey};
use secrecy::{ExposeSecret, SecretString};

/// 2048 bits are below what ASVS 5.0 asks for (we make 3072) but above what anyone has factored.
const MIN_BITS: usize = 2048;
/// Signing takes time with the cube of the size: a larger key would be an outage.
const MAX_BITS: usize = 8192;
const EXPONENT: [u8; 3] = [1, 0, 1];

/// The RSA keys of one kind of token: one signs, all of them verify.
///
/// During a rotation the public list is longer than the private one: a new key is made known
/// before it signs, an old one verifies until its last token has expired. A second private key
/// signs nothing new; it only makes a token of its time once more, byte for byte.
pub struct KeyRing {
    purpose: &'static str,
    signing: Vec<SigningKey>,
    verifying: Vec<VerifyingKey>,
}

struct SigningKey {
    kid: String,
    pair: KeyPair,
}

struct VerifyingKey {
    kid: String,
    key: DecodingKey,
    jwk: Jwk,
}

/// Why keys can't be used. Never shows a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyError {
    /// There is no PEM block in the text.
    NoPem,
    /// A block of another kind.
    WrongKind {
        /// The label found.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
    /// The block does not hold an RSA key.
    NotRsa,
    /// Too small or too large.
    Size {
        /// What it has.
        bits: usize,
    },
    /// A public exponent nobody uses on purpose.
    Exponent,
    /// The private key's public half is not in the list.
    Mismatch {
        /// Whose keys.
        purpose: &'static str,
    },
    /// One key for both kinds of token.
    Shared,
    /// A signature made with the private key was not accepted by the public one.
    SelfTest,
    /// The system could not make a key.
    Generate(String),
}

impl KeyError {
    /// What is wrong with the key, as a predicate.
    pub fn fault(&self) -> String {
        match self {
            Self::NoPem => "has no PEM block".into(),
            Self::WrongKind { found, expected } => {
                format!("has a PEM block {found:?} where {expected} belongs")
            }
            Self::NotRsa => "does not hold an RSA key that can be read".into(),
            Self::Size { bits } => {
                format!("is an RSA key of {bits} bits; {MIN_BITS} to {MAX_BITS} are accepted")
            }
            Self::Exponent => "has a public exponent other than 65537".into(),
            Self::Mismatch { purpose } => {
                format!("does not belong to any of the {purpose} public keys")
            }
            Self::Shared => "has a key that also signs access tokens: one kind could be taken for the other".into(),
            Self::SelfTest => "failed its self-test: what it signs does not verify".into(),
            Self::Generate(reason) => format!("could not be made: {reason}"),
        }
    }

    /// What to do about it.
    pub fn way_out(&self) -> &'static str {
        match self {
            Self::NoPem => {
                "Give the PEM itself (its line breaks may be written \\n), the base64 of it, \
                 or its path in the variable with _FILE at the end"
            }
            Self::WrongKind { .. } => "Check that the private and the public key are not exchanged",
            Self::Mismatch { .. } => "Give the public key of the same pair, beside others if keys are being rotated",
            Self::Shared => "Make a pair for each with `auth-service keys generate --out DIR`",
            Self::NotRsa | Self::Size { .. } | Self::Exponent | Self::SelfTest => {
                "Make new keys with `auth-service keys generate --out DIR`"
            }
            Self::Generate(_) => "Choose 2048, 3072, 4096 or 8192 bits and try again",
        }
    }
}

impl fmt::Display for KeyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the key {}. {}.", self.fault(), self.way_out())
    }
}

impl std::error::Error for KeyError {}

/// Private keys that were read, not yet matched with public ones.
pub struct PrivateKeys(Vec<SigningKey>);

impl PrivateKeys {
    /// Reads every PEM block: PKCS#8 or PKCS#1, not encrypted.
    pub fn parse(pem: &SecretString) -> Result<Self, KeyError> {
        blocks(pem.expose_secret())?.iter().map(SigningKey::read).collect::<Result<_, _>>().map(Self)
    }
}

/// Public keys that were read.
pub struct PublicKeys(Vec<VerifyingKey>);

impl PublicKeys {
    /// Reads every PEM block: SubjectPublicKeyInfo or PKCS#1.
    pub fn parse(pem: &str) -> Result<Self, KeyError> {
        blocks(pem)?.iter().map(VerifyingKey::read).collect::<Result<_, _>>().map(Self)
    }
}

impl KeyRing {
    /// Reads and tests the keys.
    pub fn load(purpose: &'static str, private_pem: &SecretString, public_pem: &str) -> Result<Self, KeyError> {
        Self::new(purpose, PrivateKeys::parse(private_pem)?, PublicKeys::parse(public_pem)?)
    }

    /// The first private key signs; its public half, and that of every further private key, must
    /// be among the public ones. Each pair signs and verifies once before it is trusted.
    pub fn new(purpose: &'static str, private: PrivateKeys, public: PublicKeys) -> Result<Self, KeyError> {
        let ring = Self { purpose, signing: private.0, verifying: public.0 };
        for key in &ring.signing {
            let public = ring.verifying(&key.kid).ok_or(KeyError::Mismatch { purpose })?;
            let message = b"self-test";
            let signature = key.sign(message).ok_or(KeyError::SelfTest)?;
            match jsonwebtoken::crypto::verify(&signature, message, &public.key, Algorithm::RS256) {
                Ok(true) => {}
                _ => return Err(KeyError::SelfTest),
            }
        }
        Ok(ring)
    }

    /// The id of the key that signs.
    pub fn kid(&self) -> &str {
        &self.signing[0].kid
    }

    pub(super) fn kids(&self) -> impl Iterator<Item = &str> {
        self.verifying.iter().map(|key| key.kid.as_str())
    }

    /// The key of that id where its private half is here, else the one that signs now: a token
    /// made anew under another key is still the same token to everyone who reads it.
    pub(super) fn signing_kid(&self, kid: &str) -> &str {
        self.signing.iter().find(|key| key.kid == kid).map_or(self.kid(), |key| &key.kid)
    }

    /// Base64url of the RS256 signature.
    pub(super) fn sign(&self, kid: &str, message: &[u8]) -> Option<String> {
        self.signing.iter().find(|key| key.kid == kid)?.sign(message)
    }

    pub(super) fn decoding_key(&self, kid: &str) -> Option<&DecodingKey> {
        self.verifying(kid).map(|key| &key.key)
    }

    pub(super) fn decoding_keys(&self) -> impl Iterator<Item = &DecodingKey> {
        self.verifying.iter().map(|key| &key.key)
    }

    pub(super) fn jwks(&self) -> Vec<Jwk> {
        self.verifying.iter().map(|key| key.jwk.clone()).collect()
    }

    fn verifying(&self, kid: &str) -> Option<&VerifyingKey> {
        self.verifying.iter().find(|key| key.kid == kid)
    }
}

impl fmt::Debug for KeyRing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeyRing")
            .field("purpose", &self.purpose)
            .field("kids", &self.kids().collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl SigningKey {
    fn read(block: &pem::Pem) -> Result<Self, KeyError> {
        let pair = match block.tag() {
            "PRIVATE KEY" => KeyPair::from_pkcs8(block.contents()),
            "RSA PRIVATE KEY" => KeyPair::from_der(block.contents()),
            // The JWT library would take a public key here and fail at the first login.
            found => {
                return Err(KeyError::WrongKind {
                    found: found.to_owned(),
                    expected: "an unencrypted private key (PRIVATE KEY or RSA PRIVATE KEY)",
                });
            }
        }
        .map_err(|_| KeyError::NotRsa)?;
        let kid = VerifyingKey::from_public(pair.public_key())?.kid;
        Ok(Self { kid, pair })
    }

    fn sign(&self, message: &[u8]) -> Option<String> {
        use base64::Engine;
        let mut signature = vec![0; self.pair.public_modulus_len()];
        self.pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature).ok()?;
        Some(base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(signature))
    }
}

impl VerifyingKey {
    fn read(block: &pem::Pem) -> Result<Self, KeyError> {
        match block.tag() {
            "PUBLIC KEY" | "RSA PUBLIC KEY" => {
                Self::from_public(&PublicKey::from_der(block.contents()).map_err(|_| KeyError::NotRsa)?)
            }
            found => Err(KeyError::WrongKind {
                found: found.to_owned(),
                expected: "a public key (PUBLIC KEY or RSA PUBLIC KEY)",
            }),
        }
    }

    fn from_public(public: &PublicKey) -> Result<Self, KeyError> {
        let parts = RsaPublicKeyComponents::<Vec<u8>>::from(public);
        let bits = parts.n.len() * 8 - parts.n.first().map_or(0, |byte| byte.leading_zeros() as usize);
        if !(MIN_BITS..=MAX_BITS).contains(&bits) {
            return Err(KeyError::Size { bits });
        }
        if parts.e != EXPONENT {
            return Err(KeyError::Exponent);
        }
        let key = DecodingKey::from_rsa_raw_components(&parts.n, &parts.e);
        let mut jwk = Jwk::from_decoding_key(&key, Some(Algorithm::RS256)).map_err(|_| KeyError::NotRsa)?;
        let kid = jwk.thumbprint(ThumbprintHash::SHA256).map_err(|_| KeyError::NotRsa)?;
        jwk.common.key_id = Some(kid.clone());
        jwk.common.public_key_use = Some(PublicKeyUse::Signature);
        Ok(Self { kid, key, jwk })
    }
}

/// The public half in the form other programs read.
pub(super) fn public_der(pair: &KeyPair) -> Result<PublicKeyX509Der<'static>, KeyError> {
    pair.public_key().as_der().map_err(|e| KeyError::Generate(e.to_string()))
}

fn blocks(text: &str) -> Result<Vec<pem::Pem>, KeyError> {
    match pem::parse_many(text) {
        Ok(blocks) if !blocks.is_empty() => Ok(blocks),
        _ => Err(KeyError::NoPem),
    }
}

#[cfg(test)]
pub(crate) mod tests;

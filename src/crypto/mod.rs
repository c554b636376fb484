//! Passwords, keys and tokens.
//!
//! One library does all of it (aws-lc): it signs without parsing the key anew each time, and the
//! `rsa` crate with its timing hole stays out of the tree.

mod generate;
mod hasher;
mod keys;
mod signer;

pub use generate::{KeyFiles, PemPair, generate_pair, write_key_files};
pub use hasher::{HashError, Hasher, HasherSettings, MAX_COST, Verdict};
#[cfg(test)]
pub(crate) use keys::tests as test_keys;
pub use keys::{KeyError, KeyRing, PrivateKeys, PublicKeys};
pub use signer::{SignedToken, TokenError, TokenSettings, TokenSigner};

/// Makes aws-lc the cryptography of this process, for tokens and for TLS. Call it first thing in
/// `main`; again does nothing.
///
/// Both libraries find it by themselves as long as no dependency brings a second one; with two,
/// they would panic at first use.
pub fn install_provider() {
    // An error means that one is installed already: by an earlier call.
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
}

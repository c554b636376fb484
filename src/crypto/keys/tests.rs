use std::sync::LazyLock;

use super::*;
use crate::crypto::{PemPair, generate_pair, write_key_files};

/// Two pairs for every test that needs keys: making one takes a noticeable moment.
pub(crate) static FIRST: LazyLock<PemPair> = LazyLock::new(|| generate_pair(2048).expect("a pair"));
pub(crate) static SECOND: LazyLock<PemPair> = LazyLock::new(|| generate_pair(2048).expect("a pair"));

fn load(private: &str, public: &str) -> Result<KeyRing, KeyError> {
    KeyRing::load("access", &private.into(), public)
}

fn private(pair: &PemPair) -> &str {
    pair.private.expose_secret()
}

#[test]
fn a_made_pair_loads_and_its_id_is_the_thumbprint() {
    let ring = load(private(&FIRST), &FIRST.public).expect("loads");
    let jwk = &ring.jwks()[0];
    assert_eq!(jwk.common.key_id.as_deref(), Some(ring.kid()));
    assert_eq!(jwk.thumbprint(ThumbprintHash::SHA256).expect("thumbprint"), ring.kid());
    assert_eq!(ring.kid().len(), 43);
}

#[test]
fn keys_of_different_pairs_are_refused() {
    let error = load(private(&FIRST), &SECOND.public).expect_err("mismatch");
    assert_eq!(error, KeyError::Mismatch { purpose: "access" });
}

#[test]
fn halves_in_each_others_place_are_refused() {
    let error = load(&FIRST.public, &FIRST.public).expect_err("public as private");
    assert!(matches!(error, KeyError::WrongKind { .. }), "{error}");
    let error = load(private(&FIRST), private(&FIRST)).expect_err("private as public");
    assert!(matches!(error, KeyError::WrongKind { .. }), "{error}");
}

#[test]
fn what_is_no_rsa_key_is_refused() {
    for text in ["", "secret", "-----BEGIN PRIVATE KEY-----\n", "AAAA"] {
        assert_eq!(load(text, &FIRST.public).expect_err(text), KeyError::NoPem);
    }
    let noise = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n";
    assert_eq!(load(noise, &FIRST.public).expect_err("noise"), KeyError::NotRsa);
    // An Ed25519 key in its PKCS#8 frame.
    let other = "-----BEGIN PRIVATE KEY-----\n\
                 MC4CAQAwBQYDK2VwBCIEIJ1hsZ3v/VpguoRK9JLsLMREScVpezJpGXA7rAMcrn9g\n\
                 -----END PRIVATE KEY-----\n";
    assert_eq!(load(other, &FIRST.public).expect_err("ed25519"), KeyError::NotRsa);
    let error =
        load("-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n", &FIRST.public)
            .expect_err("encrypted");
    assert!(matches!(error, KeyError::WrongKind { .. }));
}

#[test]
fn a_key_below_2048_bits_is_refused() {
    // 1024 bits, made for this test.
    let small = "-----BEGIN PUBLIC KEY-----\n\
        MIGfMA0GCSqGSIb3DQEBAQUAA4GNADCBiQKBgQC1Jf5nwwwYVbzHMxz+PYRyQa8T\n\
        F21crp4eRPLMCiSCfs6RWkxgbVdijrCBGT1ivWwKvoMyWpU2d1og6sLwBxf+VVh9\n\
        GTnut3coJJW2I3ZSPSBmclocA6HjcNafh02dRNxhocyG24hcabRxC+oB8srDpb+S\n\
        H7UZgi68veOAnGfL2wIDAQAB\n\
        -----END PUBLIC KEY-----\n";
    assert_eq!(load(private(&FIRST), small).expect_err("small"), KeyError::Size { bits: 1024 });
}

#[test]
fn line_breaks_that_became_spaces_do_no_harm() {
    let flat = FIRST.public.trim().replace('\n', " ");
    load(private(&FIRST), &flat).expect("loads");
}

#[test]
fn further_public_keys_only_verify() {
    let both = format!("{}{}", SECOND.public, FIRST.public);
    let ring = load(private(&FIRST), &both).expect("loads");
    let old = load(private(&SECOND), &SECOND.public).expect("loads");
    assert_ne!(ring.kid(), old.kid());
    assert_eq!(ring.jwks().len(), 2);
    assert!(ring.decoding_key(old.kid()).is_some());
    assert!(ring.sign(old.kid(), b"x").is_none());
    assert_eq!(ring.signing_kid(old.kid()), ring.kid());
}

#[test]
fn a_second_private_key_signs_only_what_names_it() {
    let privates = format!("{}{}", private(&FIRST), private(&SECOND));
    let publics = format!("{}{}", FIRST.public, SECOND.public);
    let ring = load(&privates, &publics).expect("loads");
    let old = load(private(&SECOND), &SECOND.public).expect("loads");
    assert_eq!(ring.signing_kid(""), ring.kid());
    assert_eq!(ring.signing_kid(old.kid()), old.kid());
    assert_eq!(ring.sign(old.kid(), b"x"), old.sign(old.kid(), b"x"));
}

#[test]
fn debug_shows_ids_and_no_key() {
    let text = format!("{:?}", load(private(&FIRST), &FIRST.public).expect("loads"));
    assert!(text.contains("access") && !text.contains("BEGIN"), "{text}");
    assert!(!format!("{:?}", *FIRST).contains("PRIVATE"));
}

#[test]
fn key_files_are_private_and_never_overwritten() {
    use std::os::unix::fs::MetadataExt;
    let dir = tempfile::tempdir().expect("a folder");
    let target = dir.path().join("keys");
    let files = write_key_files(&target, 2048).expect("written");
    for (name, path) in &files.paths {
        let mode = std::fs::metadata(path).expect("there").mode() & 0o777;
        assert_eq!(mode, if name.ends_with("PRIVATE_KEY") { 0o600 } else { 0o644 }, "{name}");
    }
    assert!(files.env_lines().starts_with("ACCESS_TOKEN_PRIVATE_KEY_FILE=/"));
    let before = std::fs::read(&files.paths[0].1).expect("there");
    let error = write_key_files(&target, 2048).expect_err("refused");
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&files.paths[0].1).expect("there"), before);
}

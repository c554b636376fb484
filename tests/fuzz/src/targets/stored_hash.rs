//! Password hashes as a database may hold them, adopted or damaged.

use std::{sync::LazyLock, time::Duration};

use auth_service::crypto::{Hasher, HasherSettings};

use super::Target;
use crate::{
    parts::{parts, text},
    service::RUNTIME,
};

/// The stored text; the password that is presented.
pub const TARGET: Target = Target {
    name: "stored_hash",
    seeds: &[
        b"$2b$04$abcdefghijklmnopqrstuuJOfc2rZqnDMWXu8RoKJT5yX8uU0zJ2e\x1ehunter2hunter2",
        b"$2a$05$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\x1eU*U",
        b"$2y$16$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\x1eU*U",
        b"$2b$31$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\x1e\x00",
        b"v1$-$2b$04$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\x1ep\xc3\xa4sswort",
        b"v1$a1b2c3d4$2b$04$CCCCCCCCCCCCCCCCCCCCC.E5YPO9kmyuRGyh0XouQYb4YMJKvyOeW\x1e ",
        b"v1$-$2b$4294967296$\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9\xc3\xa9a\x1ex",
        b"$argon2id$v=19$m=65536,t=3,p=4$c29tZXNhbHQ$aGFzaA\x1ex",
    ],
    run,
};

static HASHER: LazyLock<Hasher> = LazyLock::new(|| {
    let settings = HasherSettings { cost: 4, pepper: None, threads: 1, queue: 1, max_wait: Duration::from_secs(60) };
    Hasher::new(settings).expect("a hasher")
});

fn run(input: &[u8]) {
    let [stored, password] = parts(input);
    let stored = text(stored);
    // Costs that are computed, as they should be, but would leave time for few other inputs.
    if stored.split('$').any(|part| part.parse().is_ok_and(|cost| (8..=15).contains(&cost))) {
        return;
    }
    let verdict = RUNTIME.block_on(HASHER.verify(&text(password).into(), Some(&stored))).expect("a verdict");
    if verdict.matches {
        assert!(stored.contains("$2"), "{stored:?} is no hash and matches");
        let again = RUNTIME.block_on(HASHER.verify(&format!("{}x", text(password)).into(), Some(&stored)));
        // Bare bcrypt looks at 72 bytes.
        assert!(password.len() >= 72 || !again.expect("a verdict").matches, "{stored:?} matches two passwords");
    } else {
        assert!(!verdict.needs_rehash);
    }
}

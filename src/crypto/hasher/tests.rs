use proptest::prelude::*;

use super::*;

fn settings(pepper: Option<&str>) -> HasherSettings {
    HasherSettings {
        cost: 4,
        pepper: pepper.map(SecretString::from),
        threads: 1,
        queue: 1,
        max_wait: Duration::from_secs(5),
    }
}

fn hasher(pepper: Option<&str>) -> Hasher {
    Hasher::new(settings(pepper)).expect("valid settings")
}

fn hash(hasher: &Hasher, password: &str) -> String {
    hasher.0.hash(&password.into()).expect("hashed")
}

fn verify(hasher: &Hasher, password: &str, stored: &str) -> Verdict {
    hasher.0.verify(&password.into(), Some(stored))
}

const CURRENT: Verdict = Verdict { matches: true, needs_rehash: false };
const OUTDATED: Verdict = Verdict { matches: true, needs_rehash: true };

#[tokio::test]
async fn a_hash_matches_its_password_and_no_other() {
    let hasher = hasher(None);
    let password = Password::parse("correct horse".into(), 8, None).expect("valid");
    let stored = hasher.hash(&password).await.expect("hashed");
    assert!(stored.starts_with("v1$-$2b$04$"), "{stored}");
    assert_eq!(hasher.verify(password.as_secret(), Some(&stored)).await, Ok(CURRENT));
    assert_eq!(hasher.verify(&"correct house".into(), Some(&stored)).await, Ok(Verdict::NO));
}

#[tokio::test]
async fn nobody_has_no_password() {
    assert_eq!(hasher(None).verify(&"correct horse".into(), None).await, Ok(Verdict::NO));
}

#[test]
fn nothing_is_cut_off() {
    let hasher = hasher(None);
    let long = "x".repeat(72);
    assert_eq!(verify(&hasher, &format!("{long}a"), &hash(&hasher, &format!("{long}b"))), Verdict::NO);
    assert_eq!(verify(&hasher, "a\0b", &hash(&hasher, "a\0c")), Verdict::NO);
    assert_eq!(verify(&hasher, "ab\0ab", &hash(&hasher, "ab")), Verdict::NO);
    for password in ["🔑".repeat(64), "y".repeat(1024)] {
        assert_eq!(verify(&hasher, &password, &hash(&hasher, &password)), CURRENT);
    }
}

#[test]
fn two_ways_to_type_one_character_are_one_password() {
    let hasher = hasher(None);
    assert_eq!(verify(&hasher, "Stra\u{df}e-u\u{308}ber", &hash(&hasher, "Stra\u{df}e-\u{fc}ber")), CURRENT);
}

#[test]
fn hashes_of_bcryptjs_stay_good_and_are_replaced() {
    // bcryptjs 3.0.3: hashSync(password, 10), and hashSync("x".repeat(80), 4), which it cuts at 72 bytes.
    let ascii = "$2b$10$ZmHaH5OrqKIT2ufndmC8BuTBc7ihRkUxUDZYS4L0opxwuD0JJdQ8a";
    let unicode = "$2b$10$PSdYLnSZKnbFQuUSkdSTTOTyinbGDEqfoAa8lbugWpTT4N955jZF2";
    let cut = "$2b$04$6s5e.mUIuTLPQjUXPut0B.ngOErNZgVtLT7Foe8qZZa3UfhksSYXW";
    let hasher = hasher(Some("a pepper that came later"));
    assert_eq!(verify(&hasher, "correct horse battery staple", ascii), OUTDATED);
    assert_eq!(verify(&hasher, "correct horse battery stapler", ascii), Verdict::NO);
    assert_eq!(verify(&hasher, "пароль-🔑-Ünïcode", unicode), OUTDATED);
    assert_eq!(verify(&hasher, &"x".repeat(80), cut), OUTDATED);
    for prefix in ["$2a$", "$2y$"] {
        let older = ascii.replacen("$2b$", prefix, 1);
        assert_eq!(verify(&hasher, "correct horse battery staple", &older), OUTDATED, "{prefix}");
    }
}

#[test]
fn a_nul_does_not_make_a_bare_hash_match() {
    let bare = bcrypt::hash("ab", 4).expect("hashed");
    assert_eq!(verify(&hasher(None), "ab\0ab", &bare), Verdict::NO);
}

#[test]
fn a_hash_of_another_cost_matches_and_is_replaced() {
    let dearer = Hasher::new(HasherSettings { cost: 5, ..settings(None) }).expect("valid settings");
    assert_eq!(verify(&dearer, "correct horse", &hash(&hasher(None), "correct horse")), OUTDATED);
    assert_eq!(verify(&hasher(None), "correct horse", &hash(&dearer, "correct horse")), OUTDATED);
}

#[test]
fn a_stored_cost_above_the_ceiling_is_refused_not_computed() {
    let hasher = hasher(None);
    let stored = hash(&hasher, "correct horse").replace("$2b$04$", "$2b$20$");
    let begun = Instant::now();
    assert_eq!(verify(&hasher, "correct horse", &stored), Verdict::NO);
    assert!(begun.elapsed() < Duration::from_secs(5), "cost 20 was computed");
}

#[test]
fn what_is_no_hash_matches_nothing() {
    for stored in ["", "v1$", "v1$-", "v1$-$", "plain text", "$2b$04$short", "v1$-$2x$04$", "$2b$é4$", "v2$-$2b$04$"] {
        assert_eq!(verify(&hasher(None), "", stored), Verdict::NO, "{stored:?}");
        assert_eq!(verify(&hasher(None), "plain text", stored), Verdict::NO, "{stored:?}");
    }
}

#[test]
fn a_hash_needs_the_pepper_it_was_made_with() {
    let (plain, first, second) = (hasher(None), hasher(Some("first pepper")), hasher(Some("second pepper")));
    let peppered = hash(&first, "correct horse");
    assert_eq!(verify(&first, "correct horse", &peppered), CURRENT);
    assert_eq!(verify(&second, "correct horse", &peppered), Verdict::NO);
    assert_eq!(verify(&plain, "correct horse", &peppered), Verdict::NO);
    // A pepper that comes later finds its way in by login.
    assert_eq!(verify(&first, "correct horse", &hash(&plain, "correct horse")), OUTDATED);
    assert!(!peppered.contains("first"));
}

#[test]
fn a_cost_that_would_hold_a_core_for_minutes_is_no_setting() {
    for cost in [0, 3, 16, 31] {
        assert!(Hasher::new(HasherSettings { cost, ..settings(None) }).is_err(), "{cost}");
    }
}

/// Lets `future` run until it waits.
async fn begin<F: Future + Unpin>(future: &mut F) {
    tokio::select! {
        biased;
        _ = future => panic!("it did not wait"),
        () = tokio::task::yield_now() => {}
    }
}

#[tokio::test]
async fn over_capacity_is_an_answer_and_who_leaves_makes_room() {
    let hasher = hasher(None);
    let secret = SecretString::from("correct horse");
    let slot = Arc::clone(&hasher.0.slots).acquire_owned().await.expect("open");

    let mut waiting = Box::pin(hasher.verify(&secret, None));
    begin(&mut waiting).await;
    let refused = hasher.verify(&secret, None).await.expect_err("the queue is full");
    assert!(matches!(refused, HashError::Busy { retry_after } if retry_after >= Duration::from_secs(1)));

    drop(waiting);
    let mut second = Box::pin(hasher.verify(&secret, None));
    begin(&mut second).await;
    drop(slot);
    assert_eq!(second.await, Ok(Verdict::NO));
    assert_eq!(hasher.0.waiting.load(Ordering::Relaxed), 0);
    assert_eq!(hasher.0.slots.available_permits(), 1);
}

#[tokio::test]
async fn nobody_waits_longer_than_the_limit() {
    let hasher =
        Hasher::new(HasherSettings { max_wait: Duration::from_millis(1), ..settings(None) }).expect("valid settings");
    let _slot = Arc::clone(&hasher.0.slots).acquire_owned().await.expect("open");
    let outcome = hasher.verify(&"correct horse".into(), None).await;
    assert!(matches!(outcome, Err(HashError::Busy { .. })));
    assert_eq!(hasher.0.waiting.load(Ordering::Relaxed), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    #[test]
    fn any_password_matches_itself_and_nothing_else(password in ".{1,100}", other in ".{1,100}") {
        let hasher = hasher(None);
        let stored = hash(&hasher, &password);
        prop_assert_eq!(verify(&hasher, &password, &stored), CURRENT);
        let same = password.nfkc().eq(other.nfkc());
        prop_assert_eq!(verify(&hasher, &other, &stored).matches, same);
    }

    #[test]
    fn no_stored_text_makes_it_panic(stored in any::<String>()) {
        verify(&hasher(None), "correct horse", &stored);
    }
}

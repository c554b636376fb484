//! The judge. It knows nothing of how the service works: it reads Kafka from the beginning, and holds
//! against it what clients were told and what the tables say.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    sync::atomic::Ordering,
};

use uuid::Uuid;

use crate::{
    fleet::{Fleet, HALF_DONE},
    keeper::Keeper,
    support::kafka::{self, Seen},
};

/// What may be at the end, in this scenario.
#[derive(Debug, Clone, Copy, Default)]
pub struct Expected {
    /// Keys with a parked row.
    pub parked_keys: i64,
    /// Stuck sagas.
    pub stuck: i64,
}

/// The counts.
#[derive(Debug, Default)]
pub struct Verdict {
    pub answered: u64,
    pub published: u64,
    pub lost: u64,
    pub reordered: u64,
    pub half_done: u64,
    pub duplicates: u64,
    pub allowed: u64,
    pub parked: u64,
    pub stuck: u64,
    pub deaths: u64,
    /// What was measured on the way, in words.
    pub measured: Vec<String>,
    /// What is wrong, in words.
    pub findings: Vec<String>,
}

impl Verdict {
    pub fn is_good(&self) -> bool {
        self.lost + self.reordered + self.half_done == 0 && self.findings.is_empty()
    }

    pub fn add(&mut self, other: &Verdict) {
        self.answered += other.answered;
        self.published += other.published;
        self.lost += other.lost;
        self.reordered += other.reordered;
        self.half_done += other.half_done;
        self.duplicates += other.duplicates;
        self.allowed += other.allowed;
        self.parked += other.parked;
        self.stuck += other.stuck;
        self.deaths += other.deaths;
    }
}

impl fmt::Display for Verdict {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { answered, published, duplicates, lost, reordered, half_done, .. } = self;
        write!(
            f,
            "answered {answered} published {published} copies {duplicates} lost {lost} reordered {reordered} half done {half_done}"
        )?;
        for (what, count) in [("parked", self.parked), ("stuck", self.stuck), ("deaths", self.deaths)] {
            if count > 0 {
                write!(f, " {what} {count}")?;
            }
        }
        for measured in &self.measured {
            write!(f, "; {measured}")?;
        }
        Ok(())
    }
}

/// Judges a fleet that is at rest, and ends it.
pub async fn judge(fleet: Fleet, keepers: Vec<Keeper>, expected: Expected) -> Verdict {
    let mut verdict = Verdict { allowed: fleet.allowed.load(Ordering::Relaxed), ..Verdict::default() };
    for mut keeper in keepers {
        verdict.deaths += u64::from(keeper.deaths());
        keeper.stop().await;
        verdict.allowed += keeper.given_up();
    }
    let mut topics = ["user.create", "user.delete", "load"].map(|name| fleet.topic(name)).to_vec();
    topics.extend(fleet.more_topics());
    let seen = kafka::read_all(&fleet.brokers, &topics).await;
    let first = first_occurrences(&mut verdict, &seen);
    order(&mut verdict, &first);
    if fleet.fenced {
        no_late_copies(&mut verdict, &fleet, &seen).await;
    }
    nothing_lost(&mut verdict, &fleet, &first).await;
    at_rest(&mut verdict, &fleet, expected).await;
    fleet.end().await;
    verdict
}

/// Each message once; later ones under a known id have to be true copies.
fn first_occurrences<'a>(verdict: &mut Verdict, seen: &'a [Seen]) -> Vec<&'a Seen> {
    let mut known: BTreeMap<&str, &Seen> = BTreeMap::new();
    let mut first = vec![];
    for message in seen {
        match known.insert(message.header("ce_id"), message) {
            None => first.push(message),
            Some(before) => {
                verdict.duplicates += 1;
                if (&before.key, &before.value) != (&message.key, &message.value) {
                    verdict.findings.push(format!("two different messages have the ce_id {}", message.header("ce_id")));
                }
            }
        }
    }
    verdict.published = first.len() as u64;
    if verdict.duplicates > verdict.allowed {
        let (copies, allowed) = (verdict.duplicates, verdict.allowed);
        verdict.findings.push(format!("{copies} copies, and at most {allowed} were in flight when something broke"));
    }
    first
}

/// First occurrences of a key stand in the order of their numbers. A number that is missing before
/// one that is there is out of order too: what comes behind it came too early.
fn order(verdict: &mut Verdict, first: &[&Seen]) {
    let mut last: BTreeMap<(&str, &str), i64> = BTreeMap::new();
    let mut numbers: BTreeMap<&str, BTreeSet<i64>> = BTreeMap::new();
    for message in first {
        let seq: i64 = message.header("aggregate-seq").parse().unwrap_or(0);
        let before = last.insert((&message.topic, &message.key), seq).unwrap_or(0);
        if seq <= before {
            verdict.reordered += 1;
            verdict.findings.push(format!("key {}: message {seq} stands behind {before}", message.key));
        }
        if !numbers.entry(&message.key).or_default().insert(seq) {
            verdict.findings.push(format!("key {}: two messages have the number {seq}", message.key));
        }
    }
    for (key, numbers) in numbers {
        let last = numbers.last().copied().unwrap_or(0);
        let missing: Vec<i64> = (1..last).filter(|seq| !numbers.contains(seq)).collect();
        if !missing.is_empty() {
            verdict.reordered += 1;
            verdict.findings.push(format!("key {key}: {last} is there and {missing:?} are not"));
        }
    }
}

/// A relay that was fenced off appends nothing: a copy may stand before the message that the archive
/// names, sent by an owner that died between the broker's answer and its own COMMIT, and never behind it.
async fn no_late_copies(verdict: &mut Verdict, fleet: &Fleet, seen: &[Seen]) {
    let archived: Vec<(Uuid, i32, i64)> =
        sqlx::query_as("select message_id, partition, \"offset\" from outbox_archive where replay_of is null")
            .fetch_all(&fleet.db)
            .await
            .expect("the archive");
    let places: BTreeMap<String, (i32, i64)> =
        archived.into_iter().map(|(id, partition, offset)| (id.to_string(), (partition, offset))).collect();
    for message in seen {
        let late = places.get(message.header("ce_id")).is_some_and(|&(partition, offset)| {
            (message.partition, message.offset) > (partition, offset) || message.partition != partition
        });
        if late {
            let Seen { topic, partition, offset, .. } = message;
            verdict.findings.push(format!("{topic} {partition} {offset}: a relay that was fenced off sent a copy"));
        }
    }
}

/// Whatever a client was told of, and whatever the database has committed, is in Kafka or parked.
async fn nothing_lost(verdict: &mut Verdict, fleet: &Fleet, first: &[&Seen]) {
    let out: BTreeSet<&str> = first.iter().map(|message| message.header("ce_id")).collect();
    let created: BTreeSet<&str> = first
        .iter()
        .filter(|message| message.topic.ends_with("user.create"))
        .map(|message| message.header("saga-id"))
        .collect();
    let parked: Vec<(Uuid, Option<Uuid>)> =
        sqlx::query_as("select message_id, saga_id from outbox_parked").fetch_all(&fleet.db).await.expect("the parked");
    let is_parked = |id: &Uuid| parked.iter().any(|(message_id, _)| message_id == id);
    let mut lost = vec![];
    {
        let told = fleet.told.lock().unwrap();
        verdict.answered = (told.users.len() + told.events.values().map(Vec::len).sum::<usize>()) as u64;
        for (id, saga) in &told.users {
            let waits = parked.iter().any(|(_, of)| of.is_some_and(|of| of.to_string() == *saga));
            if !created.contains(saga.as_str()) && !waits {
                lost.push(format!("user {id} was answered 201 and its user.create is not in Kafka"));
            }
        }
        for (key, ids) in &told.events {
            let missing = ids.iter().filter(|id| !out.contains(id.to_string().as_str()) && !is_parked(id));
            lost.extend(missing.map(|id| format!("event {id} of {key} was committed and is not in Kafka")));
        }
    }
    let archived: Vec<Uuid> = sqlx::query_scalar("select message_id from outbox_archive where replay_of is null")
        .fetch_all(&fleet.db)
        .await
        .expect("the archive");
    let missing = archived.iter().filter(|id| !out.contains(id.to_string().as_str()));
    lost.extend(missing.map(|id| format!("message {id} is in the archive and not in Kafka")));
    let left: i64 = fleet.count("select count(*) from outbox").await;
    if left != 0 {
        verdict.findings.push(format!("{left} rows are still in the outbox"));
    }
    verdict.lost += lost.len() as u64;
    verdict.findings.extend(lost.into_iter().take(5));
}

async fn at_rest(verdict: &mut Verdict, fleet: &Fleet, expected: Expected) {
    verdict.parked = fleet.count("select count(*) from outbox_parked").await as u64;
    let keys = fleet.count("select count(distinct key) from outbox_parked").await;
    if keys != expected.parked_keys {
        verdict.findings.push(format!("{keys} keys are parked, {} had to be", expected.parked_keys));
    }
    let stuck = fleet.count("select count(*) from saga_state where status = 'stuck'").await;
    verdict.stuck = stuck as u64;
    if stuck != expected.stuck {
        verdict.findings.push(format!("{stuck} sagas are stuck, {} had to be", expected.stuck));
    }
    let open = fleet.count("select count(*) from saga_state where status in ('running', 'resolving')").await;
    if open != 0 {
        verdict.half_done += open as u64;
        verdict.findings.push(format!("{open} sagas are not at rest"));
    }
    if fleet.has_other() {
        let half_done = fleet.count(HALF_DONE).await;
        if half_done != 0 {
            verdict.half_done += half_done.unsigned_abs();
            verdict.findings.push(format!("{half_done} users without profile or profiles without user"));
        }
        let refused: Vec<i64> = fleet.told.lock().unwrap().refused.iter().copied().collect();
        let still: i64 = sqlx::query_scalar(
            "select count(*) from auth_users u join saga_state s on s.saga_id = u.create_saga_id
              where u.id = any($1) and s.status <> 'stuck'",
        )
        .bind(&refused)
        .fetch_one(&fleet.db)
        .await
        .expect("a count");
        let kept: Vec<i64> = {
            let told = fleet.told.lock().unwrap();
            told.users.keys().filter(|id| !told.refused.contains(id) && !told.undecided.contains(id)).copied().collect()
        };
        let there: i64 = sqlx::query_scalar("select count(*) from auth_users where id = any($1)")
            .bind(&kept)
            .fetch_one(&fleet.db)
            .await
            .expect("a count");
        let gone = kept.len() as i64 - there;
        if gone != 0 {
            verdict.half_done += gone as u64;
            verdict.findings.push(format!("{gone} users were answered 201, nobody refused them, and they are gone"));
        }
        if still != 0 {
            verdict.half_done += still as u64;
            verdict.findings.push(format!("{still} refused users are still there"));
        }
    }
}

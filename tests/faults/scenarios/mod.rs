//! What goes wrong. One file a place, one function a kind of harm.

mod answers;
mod brokers;
mod cluster;
mod databases;
mod kills;
mod poison;
mod relays;
mod replies;

use std::sync::LazyLock;

use futures_util::future::BoxFuture;

use crate::{checker::Verdict, stage::Stage};

/// One kind of harm.
pub struct Scenario {
    pub name: &'static str,
    pub about: &'static str,
    pub lane: Lane,
    /// Played with `--full`, or when it is named.
    pub rare: bool,
    pub play: fn(Stage) -> BoxFuture<'static, Verdict>,
}

/// What a scenario needs for itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lane {
    /// Nothing but a database and topics.
    Shared,
    /// The Kafka that may be harmed.
    OwnBroker,
    /// The three of them.
    Cluster,
}

impl Scenario {
    const fn new(name: &'static str, about: &'static str, play: fn(Stage) -> BoxFuture<'static, Verdict>) -> Self {
        Self { name, about, lane: Lane::Shared, rare: false, play }
    }

    const fn on_cluster(mut self) -> Self {
        self.lane = Lane::Cluster;
        self
    }

    const fn rare(mut self) -> Self {
        self.rare = true;
        self
    }

    const fn on_own_broker(mut self) -> Self {
        self.lane = Lane::OwnBroker;
        self
    }
}

/// All of them.
pub fn all() -> impl Iterator<Item = &'static Scenario> {
    static ALL: LazyLock<Vec<Scenario>> = LazyLock::new(|| {
        // The slow ones first, so that they run beside the others.
        [
            cluster::scenarios(),
            brokers::scenarios(),
            databases::scenarios(),
            relays::scenarios(),
            poison::scenarios(),
            replies::scenarios(),
            answers::scenarios(),
            kills::scenarios(),
        ]
        .into_iter()
        .flatten()
        .collect()
    });
    ALL.iter()
}

/// A scenario's line: its name, what it does, its function.
macro_rules! scenario {
    ($name:literal, $about:literal, $play:path) => {
        $crate::scenarios::Scenario::new($name, $about, |stage| Box::pin($play(stage)))
    };
}
use scenario;

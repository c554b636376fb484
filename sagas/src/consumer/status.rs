//! What keeps replies from being read: for readiness, metrics and the log.

use outbox_relay::trouble::{TroubleKind, Troubles};

/// What keeps replies from being read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Trouble {
    /// No broker answers.
    BrokersAway,
    /// The consumer group can't be joined.
    GroupNotJoined,
    /// Reply topics do not exist.
    TopicMissing,
    /// Reply topics may not be read.
    TopicForbidden,
    /// A message can't be fetched or decoded.
    FetchFailed,
    /// A reply was read and can't be taken in: everything behind it waits.
    ReplyWaits,
    /// The consumer failed or panicked, and is being replaced.
    ConsumerFailed,
}

impl TroubleKind for Trouble {
    const GAUGE: &'static str = "saga_consumer_trouble";
    const EFFECT: &'static str = "replies are not read";
    const ALL: &'static [Self] = &[
        Trouble::BrokersAway,
        Trouble::GroupNotJoined,
        Trouble::TopicMissing,
        Trouble::TopicForbidden,
        Trouble::FetchFailed,
        Trouble::ReplyWaits,
        Trouble::ConsumerFailed,
    ];

    fn as_str(self) -> &'static str {
        match self {
            Trouble::BrokersAway => "brokers-away",
            Trouble::GroupNotJoined => "group-not-joined",
            Trouble::TopicMissing => "topic-missing",
            Trouble::TopicForbidden => "topic-forbidden",
            Trouble::FetchFailed => "fetch-failed",
            Trouble::ReplyWaits => "reply-waits",
            Trouble::ConsumerFailed => "consumer-failed",
        }
    }
}

/// The state of one reply consumer.
pub type ConsumerStatus = Troubles<Trouble>;

//! Whose fault it is that a message did not get out. The answer decides who waits: one key, one
//! topic, everybody, or nobody but a new producer.

/// The class of a delivery failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// The message itself can never be accepted: its key is parked, the others go on.
    Message,
    /// The topic is missing or closed to us: the topic is paused and asked again.
    Topic,
    /// The broker, or the way to it, is in trouble: nothing is the message's fault, so no attempt
    /// is counted against it.
    Broker,
    /// The client gave up on the message after its delivery time-out. The broker's fault as a rule; where it
    /// is the client's own, which holds on to leaders that are none any more, a new client is the remedy.
    TimedOut,
    /// The producer is dead for good and has to be built anew.
    Producer,
    /// The client reports success, but names no position in the log: the message may be there or not. It is
    /// sent again. The broker is at fault, but it is there and answers, so nobody else has to wait.
    NoPosition,
}

impl Fault {
    /// A label for logs and metrics.
    pub fn as_str(self) -> &'static str {
        match self {
            Fault::Message => "message",
            Fault::Topic => "topic",
            Fault::Broker => "broker",
            Fault::TimedOut => "timed_out",
            Fault::Producer => "producer",
            Fault::NoPosition => "no_position",
        }
    }
}

//! Where a message stands in Kafka.

use std::fmt;

/// A message's position in the log of a partition. It is the only proof that the broker has the message, so it
/// can't be made without an offset.
///
/// librdkafka reports success without one (-1001) when it concludes from the success of a later request that
/// this message must have been appended too. That conclusion is wrong when the broker had refused the earlier
/// request, for example because it was just becoming the partition's leader.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Position {
    partition: i32,
    offset: i64,
}

impl Position {
    /// `None` unless both numbers name a place in a log.
    pub(crate) fn new(partition: i32, offset: i64) -> Option<Self> {
        (partition >= 0 && offset >= 0).then_some(Self { partition, offset })
    }

    pub(crate) fn partition(self) -> i32 {
        self.partition
    }

    pub(crate) fn offset(self) -> i64 {
        self.offset
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "partition {} offset {}", self.partition, self.offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_an_offset_there_is_no_position() {
        assert!(Position::new(0, 0).is_some());
        for (partition, offset) in [(0, -1001), (0, -1), (0, i64::MIN), (-1, 0), (-1, -1001)] {
            assert_eq!(Position::new(partition, offset), None, "{partition} {offset}");
        }
    }
}

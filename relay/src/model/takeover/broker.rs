//! The network and the log.

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Broker {
    /// Sent and not there yet.
    pub(super) on_the_way: Rows,
    pub(super) log: Rows,
    /// A row's first occurrence came before the one before it was there.
    pub(super) out_of_order: bool,
}

/// A set of row ids.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Rows(pub(super) u16);

impl Rows {
    pub(super) fn has(self, id: i64) -> bool {
        self.0 & (1 << id) != 0
    }

    pub(super) fn add(&mut self, id: i64) {
        self.0 |= 1 << id;
    }

    pub(super) fn remove(&mut self, id: i64) {
        self.0 &= !(1 << id);
    }

    pub(super) fn ids(self) -> impl Iterator<Item = i64> {
        (0..16).filter(move |&id| self.has(id))
    }
}

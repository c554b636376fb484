//! The broker's side of transactions.

/// Of one key.
pub(super) const ROWS: u8 = 2;

#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct Broker {
    /// Whose producer is the present one; nobody's, if that process is gone.
    pub(super) producer: Option<usize>,
    /// What the present producer has on the way; not yet refused, even if its process is gone.
    pub(super) on_the_way: Vec<Request>,
    /// Written and not committed.
    pub(super) open: Option<Transaction>,
    /// What consumers see.
    pub(super) visible: Rows,
    /// The newest term anything was published under.
    pub(super) newest: u8,
    /// Something became visible under an older term than the newest.
    pub(super) zombie: bool,
    /// Something became visible that was archived already.
    pub(super) copy_of_archived: bool,
    pub(super) out_of_order: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Transaction {
    pub(super) term: u8,
    pub(super) rows: Rows,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Request {
    Produce { relay: usize, term: u8, row: u8 },
    Commit { relay: usize, term: u8 },
}

/// A set of rows.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub(super) struct Rows(pub(super) u8);

impl Rows {
    pub(super) fn has(self, row: u8) -> bool {
        self.0 & (1 << row) != 0
    }

    pub(super) fn add(&mut self, row: u8) {
        self.0 |= 1 << row;
    }

    pub(super) fn all(self) -> bool {
        (1..=ROWS).all(|row| self.has(row))
    }

    pub(super) fn is_empty(self) -> bool {
        self.0 == 0
    }
}

impl Broker {
    pub(super) fn fenced_by(&mut self, relay: Option<usize>) {
        self.producer = relay;
        self.open = None;
        self.on_the_way.clear();
    }

    pub(super) fn takes(&mut self, request: Request) {
        if !self.on_the_way.contains(&request) {
            self.on_the_way.push(request);
        }
    }

    pub(super) fn write(&mut self, term: u8, row: u8) {
        self.open.get_or_insert(Transaction { term, rows: Rows::default() }).rows.add(row);
    }

    pub(super) fn publish(&mut self, term: u8, rows: Rows, archived: Rows) {
        for row in (1..=ROWS).filter(|&row| rows.has(row)) {
            self.out_of_order |= row > 1 && !self.visible.has(row - 1);
            self.copy_of_archived |= archived.has(row);
            self.visible.add(row);
        }
        self.zombie |= term < self.newest;
        self.newest = self.newest.max(term);
    }
}

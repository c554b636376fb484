//! A relay without a broker, for tests of what is sent: it takes lanes, reads what is not out and
//! moves it to the archive with the statements of the real one.

use std::{collections::BTreeMap, time::Duration};

use sqlx::PgConnection;

use crate::{
    delivery::{self, ClaimFilter, LaneClaim, LaneTerm, PendingRow, SentRow},
    lanes::{LeaseKeeper, Ownership, Trusted},
    message::LANES,
    parking::{self, ParkCause},
    position::Position,
};

/// Longer than any test.
const LEASE: Duration = Duration::from_secs(3600);
const BATCH: usize = 1000;

/// What the relay asks before each read: the newest row id that was given out, and the number of the oldest
/// transaction that has not ended.
pub async fn horizon(conn: &mut PgConnection) -> Result<(i64, i64), sqlx::Error> {
    let horizon = delivery::horizon(conn).await?;
    Ok((horizon.newest_id, horizon.oldest_running))
}

/// Takes messages out of the outbox and hands them over. It needs all lanes: no relay may run on
/// its database.
pub struct Courier {
    keeper: LeaseKeeper,
    next_offset: i64,
}

/// A message as consumers would see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Delivered {
    /// Topic.
    pub topic: String,
    /// Key.
    pub key: String,
    /// Headers, those included that the relay adds.
    pub headers: BTreeMap<String, String>,
    /// Value.
    pub payload: Vec<u8>,
}

impl Courier {
    /// Takes the lanes.
    pub async fn hire(conn: &mut PgConnection) -> Result<Self, sqlx::Error> {
        let mut keeper = LeaseKeeper::new(Ownership::default(), "courier".to_owned(), LEASE, BATCH, LANES);
        keeper.tick(conn).await?;
        Ok(Self { keeper, next_offset: 0 })
    }

    /// Takes out everything that is committed, in order, and archives it.
    pub async fn take_out(&mut self, conn: &mut PgConnection) -> Result<Vec<Delivered>, sqlx::Error> {
        let trusted = self.trusted()?;
        let terms: Vec<LaneTerm> = trusted.lanes.keys().filter_map(|lane| trusted.term(*lane)).collect();
        let lanes = lanes_from_the_beginning(&trusted);
        let mut delivered = vec![];
        loop {
            let rows = delivery::claim(conn, &lanes, &ClaimFilter::default()).await?;
            if rows.is_empty() {
                return Ok(delivered);
            }
            let sent: Vec<SentRow> = rows.iter().filter_map(|row| self.sent(row)).collect();
            let archived = delivery::finish(conn, trusted.relay_id, &terms, &sent).await?;
            if archived.ids.len() < rows.len() {
                return Err(somebody_else());
            }
            for row in rows {
                delivered.push(Delivered::of(row)?);
            }
        }
    }

    /// Does what the relay does when the broker refuses this row for good. Answers how many rows were parked.
    pub async fn refuse(&mut self, conn: &mut PgConnection, row_id: i64, reason: &str) -> Result<u64, sqlx::Error> {
        let trusted = self.trusted()?;
        let rows = delivery::claim(conn, &lanes_from_the_beginning(&trusted), &ClaimFilter::default()).await?;
        let row = rows.iter().find(|row| row.id == row_id).ok_or(sqlx::Error::RowNotFound)?;
        let lane = trusted.term(row.lane).ok_or_else(somebody_else)?;
        parking::park(conn, trusted.relay_id, lane, row, &ParkCause::Unsendable(reason.to_owned())).await
    }

    /// Gives the lanes back.
    pub async fn resign(&mut self, conn: &mut PgConnection) -> Result<(), sqlx::Error> {
        self.keeper.resign(conn).await
    }

    fn trusted(&self) -> Result<Trusted, sqlx::Error> {
        let trusted = self.keeper.ownership.lanes_of(0, 1);
        trusted.filter(|trusted| trusted.lanes.len() == LANES as usize).ok_or_else(somebody_else)
    }

    fn sent(&mut self, row: &PendingRow) -> Option<SentRow> {
        let position = Position::new(0, self.next_offset)?;
        self.next_offset += 1;
        Some(SentRow { id: row.id, lane: row.lane, position })
    }
}

fn lanes_from_the_beginning(trusted: &Trusted) -> Vec<LaneClaim> {
    trusted.lanes.keys().map(|&lane| LaneClaim { lane, above: 0, most: BATCH as i64 }).collect()
}

impl Delivered {
    fn of(row: PendingRow) -> Result<Self, sqlx::Error> {
        let own: Vec<_> = row.own_headers().map(|(name, value)| (name.to_owned(), value)).collect();
        let mut headers: BTreeMap<String, String> =
            serde_json::from_str(row.headers.get()).map_err(|error| sqlx::Error::Decode(error.into()))?;
        headers.extend(own);
        Ok(Self { topic: row.topic, key: row.key.as_ref().to_owned(), headers, payload: row.payload })
    }
}

fn somebody_else() -> sqlx::Error {
    sqlx::Error::Protocol("the lanes are not all the courier's: does a relay run on its database?".to_owned())
}

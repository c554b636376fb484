//! The SQL of delivering: read what is not out, move what is out to the archive. Every write names the
//! lane's term; a relay that has lost the lane finds that nothing happened.

use std::sync::Arc;

use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::value::RawValue;
use sqlx::{PgConnection, types::Json};
use uuid::Uuid;

use crate::position::Position;

/// A row that is not out yet, with what is known of its key.
#[derive(Debug, Clone, sqlx::FromRow)]
pub(crate) struct PendingRow {
    pub id: i64,
    pub lane: i16,
    /// Shared: the window knows the row by it in three places.
    #[sqlx(try_from = "String")]
    pub key: Arc<str>,
    pub seq: i64,
    pub topic: String,
    pub payload: Vec<u8>,
    /// Read when the row is sent: one that is not as it should be is that row's trouble alone.
    pub headers: Json<Box<RawValue>>,
    /// Set on a row that sends an archived one again: it stands outside the key's sequence.
    pub replay_of: Option<i64>,
    pub created_at: DateTime<Utc>,
    /// Sequence number of the last message of this key that is out.
    pub published_seq: i64,
    /// The key is blocked from an earlier message on, or from this one.
    pub blocked: bool,
}

impl PendingRow {
    /// The headers that are known only now, beside those the row was stored with.
    pub(crate) fn own_headers(&self) -> impl Iterator<Item = (&'static str, String)> {
        let own = [
            ("ce_time", self.created_at.to_rfc3339_opts(SecondsFormat::Micros, true)),
            ("aggregate-seq", self.seq.to_string()),
        ];
        own.into_iter().chain(self.replay_of.map(|of| ("replay-of", of.to_string())))
    }
}

/// A row the broker has acknowledged.
#[derive(Debug, Clone)]
pub(crate) struct SentRow {
    pub id: i64,
    pub lane: i16,
    pub position: Position,
}

/// A lane and the term under which it is owned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneTerm {
    pub lane: i16,
    pub term: i64,
}

/// What to read of a lane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LaneClaim {
    pub lane: i16,
    /// Rows with higher ids.
    pub above: i64,
    /// So many at the most.
    pub most: i64,
}

/// What not to read.
#[derive(Debug, Default)]
pub(crate) struct ClaimFilter {
    /// Rows that are in memory already.
    pub known_ids: Vec<i64>,
    /// Topics that are paused. With any of them, only rows whose predecessor is out are read:
    /// else the rows that wait behind a paused one would fill the window.
    pub paused_topics: Vec<String>,
    /// Keys that wait for their next attempt.
    pub held_keys: Vec<String>,
}

impl ClaimFilter {
    /// Whether rows may be passed over that are not in memory.
    pub(crate) fn passes_over_rows(&self) -> bool {
        !(self.paused_topics.is_empty() && self.held_keys.is_empty())
    }
}

/// Reads what is not out yet in these lanes, oldest first.
///
/// This is a read of the unpublished set, not of a cursor: ids become visible out of order, and a
/// cursor would step over the late ones. Where to begin is a hint that spares the dead rows a held
/// snapshot keeps alive; the caller sweeps without it regularly.
pub(crate) async fn claim(
    conn: &mut PgConnection,
    lanes: &[LaneClaim],
    filter: &ClaimFilter,
) -> Result<Vec<PendingRow>, sqlx::Error> {
    let mut rows: Vec<PendingRow> = sqlx::query_as(
        "select r.*
           from unnest($1::smallint[], $2::bigint[], $3::bigint[]) as l(lane, above, most)
          cross join lateral (
                select o.id, o.lane, o.key, o.seq, o.topic, o.payload, o.headers, o.replay_of, o.created_at,
                       coalesce(p.seq, 0) as published_seq, coalesce(b.row_id <= o.id, false) as blocked
                  from outbox o
                  left join lateral (select seq from outbox_progress
                                      where key = o.key order by seq desc limit 1) p on true
                  left join outbox_blocked b on b.key = o.key
                 where o.lane = l.lane and o.id > l.above
                   and o.id <> all($4) and o.topic <> all($5) and o.key <> all($6)
                   and (cardinality($5) = 0 or o.replay_of is not null or o.seq <= coalesce(p.seq, 0) + 1)
                 order by o.id
                 limit l.most) r",
    )
    .bind(lanes.iter().map(|l| l.lane).collect::<Vec<_>>())
    .bind(lanes.iter().map(|l| l.above).collect::<Vec<_>>())
    .bind(lanes.iter().map(|l| l.most).collect::<Vec<_>>())
    .bind(&filter.known_ids)
    .bind(&filter.paused_topics)
    .bind(&filter.held_keys)
    .fetch_all(conn)
    .await?;
    // SQL promises no order across lateral joins; within a key the order of ids is the order of seq.
    rows.sort_unstable_by_key(|row| row.id);
    Ok(rows)
}

/// What the next statement of this connection will see at the least.
#[derive(Debug, Clone, Copy, sqlx::FromRow)]
pub(crate) struct Horizon {
    /// The newest id that was given out. What is above it did not exist when this was asked.
    pub newest_id: i64,
    /// The number of the oldest transaction that had not ended.
    pub oldest_running: i64,
}

/// Asked before a read, so that the read sees no less.
pub(crate) async fn horizon(conn: &mut PgConnection) -> Result<Horizon, sqlx::Error> {
    sqlx::query_as(
        "select last_value - case when is_called then 0 else 1 end as newest_id,
                pg_snapshot_xmin(pg_current_snapshot())::text::bigint as oldest_running
           from outbox_id_seq",
    )
    .fetch_one(conn)
    .await
}

/// What [`finish`] has moved.
#[derive(Debug)]
pub(crate) struct Finished {
    /// These rows. One of a lane that was lost stays for the lane's new owner, who sends it again under the
    /// same message id.
    pub ids: Vec<i64>,
    /// The transaction's number, where it moved any.
    pub xid: Option<i64>,
}

/// Moves acknowledged rows to the archive and notes how far their keys are out.
pub(crate) async fn finish(
    conn: &mut PgConnection,
    relay_id: Uuid,
    terms: &[LaneTerm],
    sent: &[SentRow],
) -> Result<Finished, sqlx::Error> {
    let moved: Vec<(i64, i64)> = sqlx::query_as(
        // Lanes are locked in their own order: a hand-over that locks several at once does too.
        // The share lock makes a take-over wait until this commits, or this one see the new term.
        "with owned as materialized (
             select l.lane, l.term
               from outbox_lanes l
               join unnest($2::smallint[], $3::bigint[]) as t(lane, term) on t.lane = l.lane and t.term = l.term
              where l.owner = $1
              order by l.lane
                for share of l
         ), sent as materialized (
             select * from unnest($4::bigint[], $5::smallint[], $6::integer[], $7::bigint[])
                        as s(id, lane, partition, \"offset\")
         ), gone as (
             delete from outbox o
              using sent s, owned w
              where o.lane = s.lane and o.id = s.id and w.lane = s.lane
             returning o.*, s.partition, s.\"offset\", w.term
         ), archived as (
             insert into outbox_archive (id, lane, key, seq, message_id, topic, payload, headers, saga_id,
                                         replay_of, created_at, partition, \"offset\", relay_id, term)
             select id, lane, key, seq, message_id, topic, payload, headers, saga_id,
                    replay_of, created_at, partition, \"offset\", $1, term
               from gone
         ), stepped as materialized (
             select key, min(seq) - 1 as before, max(seq) as seq from gone where replay_of is null group by key
         ), left_behind as (
             delete from outbox_progress p using stepped s where p.key = s.key and p.seq = s.before
         ), progressed as (
             insert into outbox_progress (key, seq) select key, seq from stepped on conflict do nothing
         )
         select id, pg_current_xact_id()::text::bigint from gone",
    )
    .bind(relay_id)
    .bind(terms.iter().map(|t| t.lane).collect::<Vec<_>>())
    .bind(terms.iter().map(|t| t.term).collect::<Vec<_>>())
    .bind(sent.iter().map(|s| s.id).collect::<Vec<_>>())
    .bind(sent.iter().map(|s| s.lane).collect::<Vec<_>>())
    .bind(sent.iter().map(|s| s.position.partition()).collect::<Vec<_>>())
    .bind(sent.iter().map(|s| s.position.offset()).collect::<Vec<_>>())
    .fetch_all(conn)
    .await?;
    Ok(Finished { xid: moved.first().map(|&(_, xid)| xid), ids: moved.into_iter().map(|(id, _)| id).collect() })
}

/// Those of these lanes that have another owner or term by now.
pub(crate) async fn lost(conn: &mut PgConnection, relay_id: Uuid, terms: &[LaneTerm]) -> Result<Vec<i16>, sqlx::Error> {
    sqlx::query_scalar(
        "select t.lane from unnest($2::smallint[], $3::bigint[]) as t(lane, term)
          where not exists (select from outbox_lanes l where l.lane = t.lane and l.term = t.term and l.owner = $1)",
    )
    .bind(relay_id)
    .bind(terms.iter().map(|t| t.lane).collect::<Vec<_>>())
    .bind(terms.iter().map(|t| t.term).collect::<Vec<_>>())
    .fetch_all(conn)
    .await
}

/// Writes down, before it is sent, that this row is in flight all alone in a lane whose owners keep
/// dying. Answers how many of them died that way already; `None` when the lane was lost.
pub(crate) async fn suspect(
    conn: &mut PgConnection,
    relay_id: Uuid,
    lane: LaneTerm,
    row_id: i64,
) -> Result<Option<i16>, sqlx::Error> {
    sqlx::query_scalar(
        "update outbox_lanes
            set suspect_kills = case when suspect_id = $4 then suspect_kills else 0 end, suspect_id = $4, on_trial = true
          where lane = $1 and term = $2 and owner = $3
         returning suspect_kills",
    )
    .bind(lane.lane)
    .bind(lane.term)
    .bind(relay_id)
    .bind(row_id)
    .fetch_optional(conn)
    .await
}

/// The deaths this row is charged with were none. Not guarded by a term: the lane may have another owner.
pub(crate) async fn acquit(conn: &mut PgConnection, row_id: i64) -> Result<(), sqlx::Error> {
    sqlx::query("update outbox_lanes set suspect_kills = 0 where suspect_id = $1").bind(row_id).execute(conn).await?;
    Ok(())
}

/// Rows of a suspected lane went out and the process still lives: the next limit, `None` for no
/// suspicion any more.
pub(crate) async fn trust_more(
    conn: &mut PgConnection,
    relay_id: Uuid,
    lane: LaneTerm,
    limit: Option<i32>,
) -> Result<(), sqlx::Error> {
    sqlx::query(
        "update outbox_lanes set attempt_limit = $4, suspect_id = null, suspect_kills = 0, on_trial = false
          where lane = $1 and term = $2 and owner = $3",
    )
    .bind(lane.lane)
    .bind(lane.term)
    .bind(relay_id)
    .bind(limit)
    .execute(conn)
    .await?;
    Ok(())
}

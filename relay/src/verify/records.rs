//! The database's side of the comparison: what the archive says of a window. Nothing is written.
//!
//! One short transaction reads everything from one snapshot. The rows stay behind in a cursor `WITH
//! HOLD`: the server sorts them once, keeps about 150 bytes of each in a file of its own, and lets
//! the snapshot go, so that hours of reading Kafka hold nothing back here. (Pages without such a
//! cursor would each scan the window again: the archive has no index by place, since the relay would
//! pay for it with every row.) Behind a pooler, a cursor needs pooling by session.

use std::{
    collections::{BTreeSet, VecDeque},
    ops::Range,
};

use chrono::{DateTime, Utc};
use sha2::{Digest, Sha256};
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::{
    comparison::Logged,
    report::{DatabaseIdentity, Finding, FindingKind, MAX_LISTED, MovedKey, Vanished},
};

/// A row of the window; its value as a SHA-256, made by the server.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct ArchivedRow {
    pub id: i64,
    pub key: String,
    pub seq: i64,
    pub message_id: Uuid,
    pub topic: String,
    pub partition: i32,
    pub offset: i64,
    pub replay_of: Option<i64>,
    pub value_hash: Vec<u8>,
}

impl ArchivedRow {
    /// Whether it says where in Kafka its message stands. Only earlier releases wrote rows that don't.
    pub(crate) fn has_position(&self) -> bool {
        self.partition >= 0 && self.offset >= 0
    }

    pub(crate) fn finding(&self, kind: FindingKind, what: String) -> Finding {
        Finding {
            kind,
            what,
            row_id: Some(self.id),
            key: Some(self.key.clone()),
            seq: Some(self.seq),
            ce_id: Some(self.message_id),
            topic: self.topic.clone(),
            partition: self.partition,
            offset: self.offset,
        }
    }
}

/// What the window's rows say of one partition.
#[derive(Debug, Clone, sqlx::FromRow)]
pub(crate) struct Share {
    pub topic: String,
    pub partition: i32,
    /// The lowest and highest offset that some row names; none when no row names one.
    pub first: Option<i64>,
    pub last: Option<i64>,
}

/// A row that knows a message's `ce_id`, key and place in the key.
#[derive(Debug, Clone, PartialEq, Eq, sqlx::FromRow)]
pub(crate) struct Known {
    /// Index of the message it was looked up for.
    pub asked: i32,
    pub id: i64,
    pub replay_of: Option<i64>,
    pub topic: String,
    pub value_hash: Vec<u8>,
    /// Where it is in Kafka, as the archive says; `None` while it is not archived.
    #[sqlx(skip)]
    pub place: Option<(i32, i64)>,
}

impl Known {
    /// Whether it is archived without a position.
    pub(crate) fn is_unpositioned(&self) -> bool {
        self.place.is_some_and(|(partition, offset)| partition < 0 || offset < 0)
    }
}

/// What can be said of the window at once.
pub(crate) struct Overview {
    pub shares: Vec<Share>,
    pub sources: Vec<String>,
    /// From here on the archive speaks.
    pub since: DateTime<Utc>,
    /// What is wrong with the sequence of some key.
    pub findings: Vec<Finding>,
    /// Of all keys, whatever the window.
    pub vanished: Vec<Vanished>,
    /// Keys of the window that stand in more than one partition of a topic, and how many there are.
    pub moved: Vec<MovedKey>,
    pub moved_keys: u64,
}

/// The window's rows, in order of topic, partition and offset.
pub(crate) struct Records<'c> {
    conn: &'c mut PgConnection,
    page: VecDeque<ArchivedRow>,
    ended: bool,
    digest: Sha256,
}

const WINDOW: &str = "
    declare outbox_window no scroll cursor with hold for
     select id, key, seq, message_id, topic, partition, \"offset\", replay_of, sha256(payload) as value_hash
       from outbox_archive
      where published_at >= $1 and published_at < $2 and ($3::text is null or topic = $3)
      order by topic collate \"C\", partition, \"offset\", id";

const SHARES: &str = "
     select topic, partition, min(\"offset\") filter (where \"offset\" >= 0) as first, max(\"offset\") filter (where \"offset\" >= 0) as last
       from outbox_archive
      where published_at >= $1 and published_at < $2 and ($3::text is null or topic = $3)
      group by topic, partition
      order by topic collate \"C\", partition";

const SOURCES: &str = "
     select distinct headers ->> 'ce_source'
       from outbox_archive
      where published_at >= $1 and published_at < $2 and ($3::text is null or topic = $3) and headers ? 'ce_source'";

/// An archive that holds something older than the window speaks of all of it. One that does not may
/// have lost it to retention, which drops whole days: it speaks from its oldest row's day on. One that
/// is empty has lost everything, and is judged for it.
const SINCE: &str = "
     select case when exists (select from outbox_archive where published_at < $1) then $1
                 else greatest($1, date_trunc('day', coalesce(
                          (select min(published_at) from outbox_archive where published_at >= $1 and published_at < $2),
                          case when exists (select from outbox_archive where published_at >= $2) then $2 end,
                          $1))) end";

/// Rows that do not follow the one before them in their key. A predecessor that is nowhere was dropped
/// by retention, unless the window itself holds an older row of the key; one that is in the outbox or
/// parked was overtaken.
const SEQUENCE: &str = "
     with w as (
         select id, key, seq, message_id, topic, partition, \"offset\",
                lag(seq) over (partition by key order by seq, id) as previous
           from outbox_archive
          where published_at >= $1 and published_at < $2 and replay_of is null
     )
     select s.*, b.topic = s.topic and b.partition = s.partition and b.\"offset\" > s.\"offset\" as before_stands_behind
       from (select * from w
              where ($3::text is null or topic = $3)
                and (previous = seq or seq > 1 and previous is distinct from seq - 1)) s
       left join lateral (
             select a.topic, a.partition, a.\"offset\" from outbox_archive a
              where a.key = s.key and a.seq = s.seq - 1 and a.replay_of is null
              limit 1) b on true
      where s.previous = s.seq
         or b.topic = s.topic and b.partition = s.partition and b.\"offset\" > s.\"offset\"
         or b.topic is null
        and (s.previous is not null
             or exists (select from outbox o where o.key = s.key and o.seq = s.seq - 1 and o.replay_of is null)
             or exists (select from outbox_parked p where p.key = s.key and p.seq = s.seq - 1 and p.replay_of is null))
      order by s.id
      limit $4";

/// A row that was taken out of the middle of a key is told by the ones behind it; one at its end by the counter alone,
/// which is counted up in the transaction that appends.
const VANISHED: &str = "
     select k.key, known.seq as known_seq, k.last_seq
       from outbox_keys k
      cross join lateral (
            select greatest(0, (select max(p.seq) from outbox_progress p where p.key = k.key),
                               (select max(o.seq) from outbox o where o.key = k.key),
                               (select max(q.seq) from outbox_parked q where q.key = k.key)) as seq) known
      where known.seq < k.last_seq
      order by k.key collate \"C\"
      limit $1";

/// Keys whose messages stand in more than one partition of a topic. A key stays in one for as long as the number of
/// partitions does. Replays stand outside the order.
const MOVED: &str = "
     select key, topic, array_agg(distinct partition) as partitions, count(*) over () as keys
       from outbox_archive
      where published_at >= $1 and published_at < $2 and ($3::text is null or topic = $3)
        and replay_of is null and partition >= 0 and \"offset\" >= 0
      group by key, topic
     having min(partition) <> max(partition)
      order by topic collate \"C\", key collate \"C\"
      limit $4";

impl<'c> Records<'c> {
    /// Takes the snapshot. The connection keeps the cursor until [`close`](Self::close).
    pub(crate) async fn open(
        conn: &'c mut PgConnection,
        window: &Range<DateTime<Utc>>,
        topic: Option<&str>,
    ) -> Result<(Self, Overview), sqlx::Error> {
        let mut tx = conn.begin_with("begin isolation level repeatable read, read only").await?;
        sqlx::query(WINDOW).bind(window.start).bind(window.end).bind(topic).execute(&mut *tx).await?;
        let shares = sqlx::query_as(SHARES).bind(window.start).bind(window.end).bind(topic).fetch_all(&mut *tx).await?;
        let sources =
            sqlx::query_scalar(SOURCES).bind(window.start).bind(window.end).bind(topic).fetch_all(&mut *tx).await?;
        let since = sqlx::query_scalar(SINCE).bind(window.start).bind(window.end).fetch_one(&mut *tx).await?;
        let broken: Vec<Broken> = sqlx::query_as(SEQUENCE)
            .bind(window.start)
            .bind(window.end)
            .bind(topic)
            .bind(MAX_LISTED as i64)
            .fetch_all(&mut *tx)
            .await?;
        let moved: Vec<Moved> = sqlx::query_as(MOVED)
            .bind(window.start)
            .bind(window.end)
            .bind(topic)
            .bind(MAX_LISTED as i64)
            .fetch_all(&mut *tx)
            .await?;
        let moved_keys = moved.first().map_or(0, |moved| moved.keys as u64);
        let moved = moved.into_iter().map(|moved| moved.key).collect();
        let vanished = sqlx::query_as(VANISHED).bind(MAX_LISTED as i64).fetch_all(&mut *tx).await?;
        tx.commit().await?;
        let findings = broken.into_iter().map(Broken::finding).collect();
        let records = Self { conn, page: VecDeque::new(), ended: false, digest: Sha256::new() };
        Ok((records, Overview { shares, sources, since, findings, vanished, moved, moved_keys }))
    }

    /// The next row, if `wanted` says so.
    pub(crate) async fn next_if(
        &mut self,
        wanted: impl Fn(&ArchivedRow) -> bool,
    ) -> Result<Option<ArchivedRow>, sqlx::Error> {
        if self.page.is_empty() && !self.ended {
            let page: Vec<ArchivedRow> =
                sqlx::query_as("fetch forward 2000 from outbox_window").fetch_all(&mut *self.conn).await?;
            self.ended = page.is_empty();
            self.page = page.into();
        }
        if !self.page.front().is_some_and(wanted) {
            return Ok(None);
        }
        let row = self.page.pop_front();
        if let Some(ArchivedRow { id, message_id, topic, partition, offset, .. }) = &row {
            self.digest.update(format!("{id},{message_id},{topic},{partition},{offset}\n"));
        }
        Ok(row)
    }

    /// What the database knows of messages that no row of the window claims: one list a message. One
    /// statement, one snapshot: a row on its way from the outbox to the archive is in one of them.
    pub(crate) async fn look_up(&mut self, messages: &[Logged]) -> Result<Vec<Vec<Known>>, sqlx::Error> {
        let (mut asked, mut keys, mut seqs, mut ids) = (vec![], vec![], vec![], vec![]);
        for (index, message) in messages.iter().enumerate() {
            if let (Some(key), Some(seq), Some(id)) = (&message.key, message.seq, message.message_id) {
                asked.push(index as i32);
                keys.push(key.as_str());
                seqs.push(seq);
                ids.push(id);
            }
        }
        let rows: Vec<KnownRow> = sqlx::query_as(
            // `offset 0` keeps each look-up one of its own, by index, whatever the planner thinks of
            // the archive's size.
            "with w as (select * from unnest($1::integer[], $2::text[], $3::bigint[], $4::uuid[])
                                   as w(asked, key, seq, message_id))
             select w.asked, r.* from w cross join lateral (
                    select a.id, a.replay_of, a.topic, sha256(a.payload) as value_hash, a.partition, a.\"offset\"
                      from outbox_archive a
                     where a.key = w.key and a.seq = w.seq and a.message_id = w.message_id offset 0) r
             union all
             select w.asked, r.* from w cross join lateral (
                    select o.id, o.replay_of, o.topic, sha256(o.payload), null::integer, null::bigint
                      from outbox o
                     where o.key = w.key and o.seq = w.seq and o.message_id = w.message_id offset 0) r
             union all
             select w.asked, r.* from w cross join lateral (
                    select p.id, p.replay_of, p.topic, sha256(p.payload), null::integer, null::bigint
                      from outbox_parked p
                     where p.key = w.key and p.seq = w.seq and p.message_id = w.message_id offset 0) r",
        )
        .bind(asked)
        .bind(keys)
        .bind(seqs)
        .bind(ids)
        .fetch_all(&mut *self.conn)
        .await?;
        let mut known = vec![Vec::new(); messages.len()];
        for KnownRow { known: row, partition, offset } in rows {
            let asked = row.asked as usize;
            known[asked].push(Known { place: partition.zip(offset), ..row });
        }
        Ok(known)
    }

    /// Of these archived rows, those that were sent again since, by a replay that has a position.
    pub(crate) async fn sent_again(&mut self, rows: &[ArchivedRow]) -> Result<BTreeSet<i64>, sqlx::Error> {
        let ids: Vec<i64> = sqlx::query_scalar(
            "select w.id from unnest($1::bigint[], $2::text[], $3::bigint[]) as w(id, key, seq)
              where exists (select from outbox_archive a
                             where a.key = w.key and a.seq = w.seq and a.replay_of = w.id
                               and a.partition >= 0 and a.\"offset\" >= 0)",
        )
        .bind(rows.iter().map(|row| row.id).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.key.as_str()).collect::<Vec<_>>())
        .bind(rows.iter().map(|row| row.seq).collect::<Vec<_>>())
        .fetch_all(&mut *self.conn)
        .await?;
        Ok(ids.into_iter().collect())
    }

    /// For each of these messages, the row that has its number in its key, whatever message that row is of.
    pub(crate) async fn holders_of_number(&mut self, messages: &[Logged]) -> Result<Vec<Option<i64>>, sqlx::Error> {
        sqlx::query_scalar(
            "select coalesce(
                    (select a.id from outbox_archive a where a.key = w.key and a.seq = w.seq and a.replay_of is null limit 1),
                    (select o.id from outbox o where o.key = w.key and o.seq = w.seq and o.replay_of is null),
                    (select p.id from outbox_parked p where p.key = w.key and p.seq = w.seq and p.replay_of is null))
               from unnest($1::text[], $2::bigint[]) with ordinality as w(key, seq, n)
              order by w.n",
        )
        .bind(messages.iter().map(|message| message.key.as_deref()).collect::<Vec<_>>())
        .bind(messages.iter().map(|message| message.seq).collect::<Vec<_>>())
        .fetch_all(&mut *self.conn)
        .await
    }

    /// Lets the cursor go. Answers with the SHA-256 over all rows that were read.
    pub(crate) async fn close(self) -> Result<String, sqlx::Error> {
        sqlx::query("close outbox_window").execute(self.conn).await?;
        Ok(self.digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

#[derive(sqlx::FromRow)]
struct KnownRow {
    #[sqlx(flatten)]
    known: Known,
    partition: Option<i32>,
    offset: Option<i64>,
}

#[derive(sqlx::FromRow)]
struct Moved {
    #[sqlx(flatten)]
    key: MovedKey,
    /// How many such keys there are.
    keys: i64,
}

#[derive(sqlx::FromRow)]
struct Broken {
    id: i64,
    key: String,
    seq: i64,
    message_id: Uuid,
    topic: String,
    partition: i32,
    offset: i64,
    previous: Option<i64>,
    before_stands_behind: Option<bool>,
}

impl Broken {
    fn finding(self) -> Finding {
        let before = self.seq.saturating_sub(1);
        let (kind, what) = match (self.previous, self.before_stands_behind) {
            (Some(previous), _) if previous == self.seq => {
                (FindingKind::Sequence, "another row of the archive has this place in the key".to_owned())
            }
            (_, Some(true)) => (FindingKind::OutOfOrder, format!("message {before} of its key stands behind it")),
            (Some(previous), _) => {
                (FindingKind::Sequence, format!("it follows message {previous} of its key: {before} is not archived"))
            }
            (None, _) => (FindingKind::Sequence, format!("message {before} of its key is not out yet")),
        };
        Finding {
            kind,
            what,
            row_id: Some(self.id),
            key: Some(self.key),
            seq: Some(self.seq),
            ce_id: Some(self.message_id),
            topic: self.topic,
            partition: self.partition,
            offset: self.offset,
        }
    }
}

/// Which database this is. Its system identifier is left out where this user may not read it.
pub(crate) async fn identity(conn: &mut PgConnection) -> Result<DatabaseIdentity, sqlx::Error> {
    let (name, server_version) = sqlx::query_as("select current_database()::text, current_setting('server_version')")
        .fetch_one(&mut *conn)
        .await?;
    let system_identifier: Option<i64> =
        sqlx::query_scalar("select system_identifier from pg_control_system()").fetch_one(conn).await.ok();
    Ok(DatabaseIdentity { name, server_version, system_identifier: system_identifier.map(|id| id.to_string()) })
}

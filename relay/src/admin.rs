//! What operators see of the outbox and the relays.

use chrono::{DateTime, Utc};
use serde::Serialize;
use serde_json::Value;
use sqlx::{PgConnection, QueryBuilder};
use uuid::Uuid;

/// Where a row is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RowStatus {
    /// Not out yet.
    Pending,
    /// Held back until an operator decides.
    Parked,
    /// In Kafka.
    Published,
}

impl RowStatus {
    /// From a query parameter.
    pub fn parse(text: &str) -> Option<Self> {
        match text {
            "pending" => Some(Self::Pending),
            "parked" => Some(Self::Parked),
            "published" => Some(Self::Published),
            _ => None,
        }
    }
}

/// Which rows to list.
#[derive(Debug, Clone, Default)]
pub struct OutboxFilter {
    /// Only there; everywhere by default.
    pub status: Option<RowStatus>,
    /// Only of this topic.
    pub topic: Option<String>,
    /// Only of this key.
    pub key: Option<String>,
    /// Only of this saga.
    pub saga_id: Option<Uuid>,
    /// Only rows with a lower id: the last one of the page before.
    pub cursor: Option<i64>,
    /// At most this many.
    pub limit: i64,
}

/// An outbox row, wherever it is.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct OutboxRow {
    /// Row id; the same in the outbox, the parking lot and the archive.
    pub id: i64,
    /// `pending`, `parked` or `published`.
    pub status: String,
    /// Lane of its key.
    pub lane: i16,
    /// Kafka key.
    pub key: String,
    /// Its place among the messages of its key.
    pub seq: i64,
    /// `ce_id`.
    pub message_id: Uuid,
    /// Kafka topic.
    pub topic: String,
    /// Value; shown by whoever knows what it is.
    #[serde(skip)]
    pub payload: Vec<u8>,
    /// Headers.
    pub headers: Value,
    /// The saga it belongs to.
    pub saga_id: Option<Uuid>,
    /// The row it sends again.
    pub replay_of: Option<i64>,
    /// When it was appended.
    pub created_at: DateTime<Utc>,
    /// When it was parked.
    pub parked_at: Option<DateTime<Utc>>,
    /// Why it was parked.
    pub reason: Option<String>,
    /// When the broker had it.
    pub published_at: Option<DateTime<Utc>>,
    /// Where it stands in Kafka.
    pub partition: Option<i32>,
    /// Where it stands in Kafka.
    pub offset: Option<i64>,
}

/// The three places a row can be in, with the columns of [`OutboxRow`].
const PLACES: [(RowStatus, &str); 3] = [
    (
        RowStatus::Pending,
        "select id, 'pending' as status, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at,
                null::timestamptz as parked_at, null::text as reason, null::timestamptz as published_at,
                null::integer as partition, null::bigint as \"offset\"
           from outbox where lane = any(array(select generate_series(0, 63)::smallint))",
    ),
    (
        RowStatus::Parked,
        "select id, 'parked' as status, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of, created_at,
                parked_at, reason, null::timestamptz as published_at, null::integer as partition,
                null::bigint as \"offset\"
           from outbox_parked where true",
    ),
    (
        RowStatus::Published,
        "select id, 'published' as status, lane, key, seq, message_id, topic, payload, headers, saga_id, replay_of,
                created_at, null::timestamptz as parked_at, null::text as reason, published_at, partition, \"offset\"
           from outbox_archive where true",
    ),
];

/// Rows, newest first.
pub async fn list(conn: &mut PgConnection, filter: &OutboxFilter) -> Result<Vec<OutboxRow>, sqlx::Error> {
    let mut query = QueryBuilder::new("select * from (");
    let places = PLACES.iter().filter(|(status, _)| filter.status.is_none_or(|wanted| wanted == *status));
    for (index, (_, select)) in places.enumerate() {
        query.push(if index == 0 { "(" } else { " union all (" }).push(*select);
        if let Some(topic) = &filter.topic {
            query.push(" and topic = ").push_bind(topic.clone());
        }
        if let Some(key) = &filter.key {
            query.push(" and key = ").push_bind(key.clone());
        }
        if let Some(saga_id) = filter.saga_id {
            query.push(" and saga_id = ").push_bind(saga_id);
        }
        if let Some(cursor) = filter.cursor {
            query.push(" and id < ").push_bind(cursor);
        }
        query.push(" order by id desc limit ").push_bind(filter.limit).push(")");
    }
    query.push(") found order by id desc limit ").push_bind(filter.limit);
    query.build_query_as().fetch_all(conn).await
}

/// One row, wherever it is.
pub async fn show(conn: &mut PgConnection, id: i64) -> Result<Option<OutboxRow>, sqlx::Error> {
    let mut query = QueryBuilder::new("");
    for (index, (_, select)) in PLACES.iter().enumerate() {
        query
            .push(if index == 0 { "(" } else { " union all (" })
            .push(*select)
            .push(" and id = ")
            .push_bind(id)
            .push(")");
    }
    query.push(" limit 1");
    query.build_query_as().fetch_optional(conn).await
}

/// The figures an operator needs first.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct Figures {
    /// Rows that are not out yet.
    pub pending: i64,
    /// Rows held back.
    pub parked: i64,
    /// Keys held back.
    pub parked_keys: i64,
    /// Age of the oldest row that is neither out nor parked, in seconds; 0 when there is none.
    pub oldest_unsent_seconds: f64,
    /// Disk that pending rows take, indexes and room for more included.
    pub outbox_bytes: i64,
}

/// Reads the figures.
pub async fn figures(conn: &mut PgConnection) -> Result<Figures, sqlx::Error> {
    sqlx::query_as(
        "select (select count(*) from outbox) as pending,
                (select count(*) from outbox_parked) as parked,
                (select count(distinct key) from outbox_parked) as parked_keys,
                coalesce((select extract(epoch from clock_timestamp() - min(created_at))::float8 from outbox), 0)
                    as oldest_unsent_seconds,
                pg_total_relation_size('outbox') as outbox_bytes",
    )
    .fetch_one(conn)
    .await
}

/// A relay process.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct RelayRow {
    /// Its identity for this lease.
    pub id: Uuid,
    /// Host and process.
    pub name: String,
    /// Since when.
    pub started_at: DateTime<Utc>,
    /// Until when its lanes are its own.
    pub lease_until: DateTime<Utc>,
    /// How many lanes it owns.
    pub lanes: i64,
}

/// A lane.
#[derive(Debug, Clone, Serialize, sqlx::FromRow)]
#[serde(rename_all = "camelCase")]
pub struct LaneRow {
    /// Which.
    pub lane: i16,
    /// The relay that owns it.
    pub owner: Option<Uuid>,
    /// Changes with every owner.
    pub term: i64,
    /// How few rows may be in flight while the lane is under suspicion.
    pub attempt_limit: Option<i32>,
    /// The row that was in flight all alone when the last owner died.
    pub suspect_id: Option<i64>,
    /// Rows that are not out yet.
    pub pending: i64,
    /// Age of the oldest of them, in seconds.
    pub oldest_unsent_seconds: Option<f64>,
}

/// All relays and lanes.
#[derive(Debug, Clone, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct RelayStatus {
    /// When an operator paused all relays.
    pub paused_at: Option<DateTime<Utc>>,
    /// Who.
    pub paused_by: Option<String>,
    /// The figures.
    pub figures: Figures,
    /// The processes.
    pub relays: Vec<RelayRow>,
    /// The lanes.
    pub lanes: Vec<LaneRow>,
}

/// Reads the whole picture.
pub async fn relay_status(conn: &mut PgConnection) -> Result<RelayStatus, sqlx::Error> {
    let (paused_at, paused_by) =
        sqlx::query_as("select paused_at, paused_by from outbox_control").fetch_one(&mut *conn).await?;
    let relays = sqlx::query_as(
        "select r.id, r.name, r.started_at, r.lease_until,
                (select count(*) from outbox_lanes l where l.owner = r.id) as lanes
           from outbox_relays r order by r.started_at",
    )
    .fetch_all(&mut *conn)
    .await?;
    let lanes = sqlx::query_as(
        "select l.lane, l.owner, l.term, l.attempt_limit, l.suspect_id, coalesce(p.pending, 0) as pending,
                p.oldest_unsent_seconds
           from outbox_lanes l
           left join (select lane, count(*) as pending,
                             extract(epoch from clock_timestamp() - min(created_at))::float8 as oldest_unsent_seconds
                        from outbox group by lane) p on p.lane = l.lane
          order by l.lane",
    )
    .fetch_all(&mut *conn)
    .await?;
    Ok(RelayStatus { paused_at, paused_by, figures: figures(conn).await?, relays, lanes })
}

/// Pauses all relays, or lets them go on. They notice at their next lease renewal. `false` when
/// they were so already.
pub async fn set_paused(conn: &mut PgConnection, paused_by: Option<&str>) -> Result<bool, sqlx::Error> {
    let changed = sqlx::query(
        "update outbox_control
            set paused_at = case when $1::text is not null then clock_timestamp() end, paused_by = $1
          where (paused_at is null) <> ($1::text is null)",
    )
    .bind(paused_by)
    .execute(conn)
    .await?;
    Ok(changed.rows_affected() == 1)
}

-- The transactional outbox. Who writes what:
--   appender (business transaction): outbox_keys, outbox
--   relay (owner of the lane):       outbox (delete), outbox_archive, outbox_parked, outbox_progress
--   operator:                        outbox_parked, outbox_progress, outbox (replay)
-- No table is written by both the appender and the relay row by row, so a business transaction
-- that hangs never holds the relay up.

-- Hands out the per-key sequence. The row lock is held until the business transaction ends:
-- that is what makes the order of seq the order of commits, per key.
create table outbox_keys (
    key      text primary key,
    last_seq bigint not null
) with (fillfactor = 80);

-- What is not out yet. Insert and delete only: an update in place would leave a second dead
-- row version for every event.
create table outbox (
    id         bigint generated always as identity,
    lane       smallint not null,
    key        text not null,
    seq        bigint not null,
    message_id uuid not null,
    topic      text not null,
    payload    bytea not null,
    headers    jsonb not null,
    saga_id    uuid,
    replay_of  bigint,
    created_at timestamptz not null default clock_timestamp(),
    primary key (lane, id),
    constraint outbox_seq_unique unique nulls not distinct (key, seq, replay_of),
    constraint outbox_headers_object check (jsonb_typeof(headers) = 'object')
) with (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0);

-- How far each key is out. blocked_by is the parked row that everything later of its key waits for.
create table outbox_progress (
    key        text primary key,
    seq        bigint not null,
    blocked_by bigint
) with (fillfactor = 60);

-- Rows that cannot be sent, and the rows of the same key behind them. Never purged.
create table outbox_parked (
    id         bigint primary key,
    lane       smallint not null,
    key        text not null,
    seq        bigint not null,
    message_id uuid not null,
    topic      text not null,
    payload    bytea not null,
    headers    jsonb not null,
    saga_id    uuid,
    replay_of  bigint,
    created_at timestamptz not null,
    parked_at  timestamptz not null default clock_timestamp(),
    reason     text not null,
    constraint outbox_parked_seq_unique unique nulls not distinct (key, seq, replay_of)
);

-- What is out, and where it stands in Kafka. Daily partitions, dropped by retention; the default
-- partition is there so that a missed housekeeping run never fails a delivery.
create table outbox_archive (
    id           bigint not null,
    lane         smallint not null,
    key          text not null,
    seq          bigint not null,
    message_id   uuid not null,
    topic        text not null,
    payload      bytea not null,
    headers      jsonb not null,
    saga_id      uuid,
    replay_of    bigint,
    created_at   timestamptz not null,
    published_at timestamptz not null default clock_timestamp(),
    partition    integer not null,
    "offset"     bigint not null,
    relay_id     uuid not null,
    term         bigint not null
) partition by range (published_at);
create table outbox_archive_default partition of outbox_archive default;
create index outbox_archive_id on outbox_archive (id);
create index outbox_archive_key on outbox_archive (key, seq);
create index outbox_archive_saga on outbox_archive (saga_id) where saga_id is not null;

-- Relay processes. The row is the lease: a relay owns its lanes for as long as lease_until (this
-- server's clock) lies ahead. Whoever finds a row expired deletes it, and with it every ownership,
-- so that a relay that comes back late learns from its own renewal that it has lost all.
create table outbox_relays (
    id          uuid primary key,
    name        text not null,
    started_at  timestamptz not null default clock_timestamp(),
    lease_until timestamptz not null
) with (fillfactor = 50);

-- One owner a lane at a time. term changes with every change of owner and guards every write
-- the owner makes. clean = false while the lane has an owner: a lane whose owner vanished is
-- under suspicion, and attempt_limit says how few rows its next owner may have in flight.
-- suspect_id/suspect_kills: the row that was in flight all alone when its relay died.
create table outbox_lanes (
    lane          smallint primary key,
    owner         uuid references outbox_relays (id) on delete set null,
    term          bigint not null default 0,
    clean         boolean not null default true,
    attempt_limit integer,
    suspect_id    bigint,
    suspect_kills smallint not null default 0,
    constraint outbox_lanes_suspect_counted check (suspect_id is not null or suspect_kills = 0)
) with (fillfactor = 50);
create index outbox_lanes_owner on outbox_lanes (owner);
insert into outbox_lanes (lane) select generate_series(0, 63);

-- Settings shared by all relays. One row.
create table outbox_control (
    only_row  boolean primary key default true check (only_row),
    paused_at timestamptz,
    paused_by text
);
insert into outbox_control default values;

-- Every message that was taken from Kafka, once. message_key is the message's own id, else
-- cluster:topic:partition:offset. raw_* keeps, byte for byte, what could not be understood or
-- has to wait.
create table inbox (
    consumer    text not null,
    message_key text not null,
    received_at timestamptz not null default clock_timestamp(),
    topic       text not null,
    partition   integer not null,
    "offset"    bigint not null,
    outcome     text not null,
    detail      text,
    saga_id     uuid,
    raw_key     bytea,
    raw_headers jsonb,
    raw_payload bytea,
    primary key (consumer, message_key),
    constraint inbox_outcome_known check (outcome in
        ('applied', 'deferred', 'late', 'duplicate', 'unknown', 'unexpected', 'rejected'))
);
create index inbox_received on inbox (received_at);
create index inbox_open on inbox (saga_id) where outcome = 'deferred';
create index inbox_attention on inbox (received_at) where outcome in ('unknown', 'unexpected', 'rejected');

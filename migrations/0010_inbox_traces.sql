-- What tells a copy of a message from another message under the same id, how often it came, and Kafka's
-- own time of it.
alter table inbox add column digest   bytea;
alter table inbox add column kafka_at timestamptz;
alter table inbox add column copies   bigint not null default 0;
alter table inbox add column last_at  timestamptz not null default clock_timestamp();
update inbox set last_at = received_at;

-- Retention counts from the last copy: a message that still comes must be known.
drop index inbox_received;
create index inbox_last on inbox (last_at);

-- Whether the service made the correlation id itself. One that a client gave may have been in use before, so a
-- reply that names its saga by it alone must not be older than the saga.
alter table saga_state add column correlation_made boolean not null default false;

-- Headers as a list: a name may come more than once, a value may be missing, or be bytes.
update inbox
   set raw_headers = (select coalesce(jsonb_agg(jsonb_build_object('name', key, 'text', value)), '[]')
                        from jsonb_each_text(raw_headers))
 where jsonb_typeof(raw_headers) = 'object';

-- Where every saga stands. The statuses and their columns are tied to each other by checks, so
-- that no bug can leave a saga that waits for nothing.
create table saga_state (
    saga_id            uuid primary key,
    name               text not null,
    definition_version integer not null,
    status             text not null,
    step               text not null,
    subject            text not null,
    data               jsonb not null,
    context            jsonb not null default '{}',
    correlation_id     text not null,
    command_id         uuid,
    command_row        bigint,
    deadline_at        timestamptz,
    resolve_attempts   integer not null default 0,
    resolver_until     timestamptz,
    evidence           text,
    stuck_reason       text,
    undone             boolean not null default false,
    revision           bigint not null default 0,
    created_at         timestamptz not null default clock_timestamp(),
    updated_at         timestamptz not null default clock_timestamp(),
    finished_at        timestamptz,
    constraint saga_state_correlation_unique unique (correlation_id),
    constraint saga_state_status_known check (status in
        ('running', 'resolving', 'completed', 'compensated', 'stuck')),
    constraint saga_state_stuck_says_why check ((status = 'stuck') = (stuck_reason is not null)),
    constraint saga_state_closed_by_evidence check
        ((status in ('completed', 'compensated')) = (evidence is not null and finished_at is not null)),
    constraint saga_state_evidence_known check
        (evidence is null or evidence in ('reply', 'back-check', 'assumption', 'operator')),
    constraint saga_state_resolving_has_lease check ((status = 'resolving') = (resolver_until is not null)),
    constraint saga_state_deadline_only_open check (deadline_at is null or status in ('running', 'resolving'))
) with (fillfactor = 70);
-- Waiting for its command to be published: the deadline has not begun to run.
create index saga_state_unpublished on saga_state (command_row) where status = 'running' and deadline_at is null;
create index saga_state_due on saga_state (deadline_at) where status = 'running' and deadline_at is not null;
create index saga_state_resolving on saga_state (resolver_until) where status = 'resolving';
create index saga_state_open_subject on saga_state (subject, name) where status in ('running', 'resolving', 'stuck');
create index saga_state_parked on saga_state (command_row) where status = 'stuck' and stuck_reason like 'command parked:%';
create index saga_state_listing on saga_state (created_at, saga_id);
create index saga_state_status on saga_state (status, created_at) where status in ('running', 'resolving', 'stuck');

-- Everything that happened to a saga, in order. (saga_id, revision) is the saga's own clock: an
-- event that changed nothing has a row too, under the next revision.
create table saga_log (
    saga_id     uuid not null,
    revision    bigint not null,
    at          timestamptz not null default clock_timestamp(),
    event       text not null,
    from_status text,
    to_status   text not null,
    actor       text not null,
    detail      jsonb not null default '{}',
    primary key (saga_id, revision)
);

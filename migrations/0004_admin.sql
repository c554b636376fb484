-- Who did what, when and why. Written in the transaction of the change it tells of.
create table admin_audit (
    id      bigint generated always as identity primary key,
    at      timestamptz not null default clock_timestamp(),
    actor   text not null,
    action  text not null,
    target  text not null,
    reason  text,
    outcome text not null,
    detail  jsonb not null default '{}'
);

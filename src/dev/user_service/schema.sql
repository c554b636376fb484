create schema if not exists user_service;

create table if not exists profiles (
    user_id    bigint primary key,
    username   text not null,
    email      text not null,
    -- Null: created by the original fleet's call, which names no saga.
    saga_id    uuid,
    created_at timestamptz not null default now()
);

-- What was erased stays erased, whatever arrives late.
create table if not exists erased_users (
    user_id   bigint primary key,
    erased_at timestamptz not null default now()
);

-- Every command that was decided, with its answer for whoever asks again.
create table if not exists inbox (
    saga_id    uuid not null,
    command    text not null,
    user_id    bigint not null,
    -- Null: accepted.
    refusal    text,
    decided_at timestamptz not null default now(),
    primary key (saga_id, command)
);

-- A published row names its position in Kafka. Releases before this one took a delivery report without an offset
-- (-1001) for one. NOT VALID, because a database may hold such rows: `auth-service migrate` says how many there are,
-- and validates the constraint when there are none.
alter table outbox_archive
    add constraint outbox_archive_position check (partition >= 0 and "offset" >= 0) not valid;

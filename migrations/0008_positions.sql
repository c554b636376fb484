-- A published row names its position in Kafka. Releases before this one took a delivery report without an offset
-- (-1001) for one. NOT VALID, because a database may hold such rows, and because looking for them here would stop the
-- relay meanwhile: `auth-service migrate` looks afterwards, says how many there are, and validates the constraint when
-- there are none.
alter table outbox_archive
    add constraint outbox_archive_position check (partition >= 0 and "offset" >= 0) not valid;
do $$
begin
    if not exists (select from outbox_archive) then
        alter table outbox_archive validate constraint outbox_archive_position;
    end if;
end
$$;

-- How far each key is out: the row with the highest seq. A row is put in for every step and the one before taken out, as
-- in the outbox itself. Updated in place, all versions of a key would stand behind one index entry, and while some
-- transaction elsewhere holds an old snapshot, every look at a busy key would walk over all of them.
--
-- A relay of an earlier release that still runs beside this schema fails and sends nothing until it is replaced.
alter table outbox_progress drop constraint outbox_progress_pkey;
alter table outbox_progress add primary key (key, seq);
alter table outbox_progress reset (fillfactor);
-- Fast enough to keep up with 50,000 rows a second, and not a whole processor for a vacuum that an old snapshot keeps
-- from cleaning anything.
alter table outbox_progress set (autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 1);
alter table outbox set (autovacuum_vacuum_cost_delay = 1);

-- Keys of which a row is parked: everything later of the key waits for it. Its row is the lock between parking behind
-- a parked row and replaying it.
create table outbox_blocked (
    key    text primary key,
    row_id bigint not null
);
insert into outbox_blocked (key, row_id) select key, blocked_by from outbox_progress where blocked_by is not null;
alter table outbox_progress drop column blocked_by;

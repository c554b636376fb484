-- Whether the lane's suspect is in flight now, all alone: only then is it charged with its owner's death. An owner that
-- dies before it has put the suspect on trial did not die of it.
alter table outbox_lanes add column on_trial boolean not null default false;

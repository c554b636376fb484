-- The steps whose undo was refused or can't be sent, and has not come through since, by name: the saga is
-- stuck for as long as there is one.
alter table saga_state add column refused_undos text[] not null default '{}';

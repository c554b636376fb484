-- What retention looks for.
--
-- Rows that came on a day without a partition of its own: few, or none, but found at once.
create index outbox_archive_default_published on outbox_archive_default (published_at);
-- Messages with bytes that belong to a saga: they go with it.
create index inbox_kept on inbox (saga_id) where saga_id is not null and outcome not in ('applied', 'duplicate');

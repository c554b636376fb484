-- Rows that came on a day without a partition of its own: few, or none, but retention finds them at once.
create index outbox_archive_default_published on outbox_archive_default (published_at);

-- A session whose state is gone is over. One that the replaced service has opened meanwhile goes on, as at the adoption
-- (migrations/0001_accounts.sql).
do $$
begin
    update refresh_tokens
       set revoked_at = coalesce(revoked_at, now()), revoked_reason = coalesce(revoked_reason, 'schema_repaired');
    if exists (select from pg_attribute
                where attrelid = 'refresh_tokens'::regclass and attname = 'token' and not attisdropped) then
        alter table refresh_tokens alter column token drop not null;
        update refresh_tokens s
           set legacy_token_hash = case when same.nth = 1 then sha256(convert_to(s.token, 'UTF8')) end,
               revoked_at = null, revoked_reason = null, token = null
          from (select id, row_number() over (partition by token order by id) as nth
                  from refresh_tokens where token is not null) same
         where same.id = s.id;
        alter table refresh_tokens drop column token;
    end if;
end $$;

-- rotated_at says since when the current generation could be seen, not when it was written: a COMMIT may wait for a
-- standby or a lock for as long as it likes. The statement that replaces a token leaves it empty; whoever knows that
-- the COMMIT took effect fills it in.
-- earlier_rotations: the same of the generations before, newest first, at most seven.
alter table refresh_tokens add column earlier_rotations timestamptz[] not null default '{}';

-- What a login names is a username or an e-mail address, so the two are one namespace: no new address is somebody's
-- username, no new username somebody's address. No unique index can span two columns, hence the lock. Names with an @
-- can't be chosen and addresses have one, so registrations share the lock and never wait for each other; only what
-- may clash with them (an adopted user who is renamed, an import) takes it alone. One lock a transaction, however many
-- rows it writes. A transaction sees what the one before it in the lock committed as long as it is READ COMMITTED, and
-- all of ours are.
--
-- Pairs that are there already stay: `auth-service migrate` lists them. When it gives adopted users their canonical
-- names anew, it says so, and nothing is compared.
create function auth_users_one_namespace() returns trigger language plpgsql set search_path from current as $$
declare
    lock_id constant bigint := 7306088137498190193;
    check_username boolean := true;
    check_email boolean := true;
begin
    if tg_op = 'UPDATE' then
        check_username := new.username_canonical is distinct from old.username_canonical;
        check_email := new.email_canonical is distinct from old.email_canonical;
        if not (check_username or check_email) or current_setting('auth_service.adopting', true) = 'on' then
            return new;
        end if;
    end if;
    if position('@' in new.username_canonical) > 0 or position('@' in new.email_canonical) = 0 then
        perform pg_advisory_xact_lock(lock_id);
    else
        perform pg_advisory_xact_lock_shared(lock_id);
    end if;
    if check_email
       and exists (select from auth_users where username_canonical = new.email_canonical and id <> new.id) then
        raise unique_violation using constraint = 'auth_users_email_no_username',
            message = 'the e-mail address is another user''s username';
    end if;
    if check_username
       and exists (select from auth_users where email_canonical = new.username_canonical and id <> new.id) then
        raise unique_violation using constraint = 'auth_users_username_no_email',
            message = 'the username is another user''s e-mail address';
    end if;
    return new;
end $$;

-- Of all updates, not of the two columns alone: a trigger that names a column keeps it from being dropped, and
-- Sequelize's sync() does that half way through.
create trigger auth_users_one_namespace before insert or update on auth_users
    for each row execute function auth_users_one_namespace();

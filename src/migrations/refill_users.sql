-- Whose registration is under way, by the sagas: only such a user may be taken back. All others had completed.
update auth_users u
   set create_saga_id = s.saga_id,
       status = case when s.status in ('running', 'resolving', 'stuck') then 'pending' else u.status end
  from saga_state s
 where s.name = 'create_user' and s.subject = u.id::text;

-- Sequelize makes the spelling unique at each start. That is looser than what holds, and would be what a violation names.
do $$
declare
    found record;
begin
    for found in
        select i.indexrelid::regclass as index, c.conname
          from pg_index i
          join pg_attribute a on a.attrelid = i.indrelid and a.attnum = i.indkey[0]
          left join pg_constraint c on c.conindid = i.indexrelid and c.contype = 'u'
         where i.indrelid = 'auth_users'::regclass and i.indisunique and i.indnkeyatts = 1
           and a.attname in ('username', 'email')
    loop
        if found.conname is null then
            execute format('drop index %s', found.index);
        else
            execute format('alter table auth_users drop constraint %I', found.conname);
        end if;
    end loop;
end $$;

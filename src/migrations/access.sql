-- Of each of these tables: where it is, and what keeps this role from its rows.
select c.relname::text as "table",
       n.nspname::text as schema,
       pg_get_userbyid(c.relowner)::text as owner,
       array(select lower(p) from unnest(array['SELECT', 'INSERT', 'UPDATE', 'DELETE']) p
              where not has_table_privilege(c.oid, p)) as missing_rights,
       row_security_active(c.oid) as rows_are_hidden,
       exists (select from pg_subscription_rel r join pg_subscription s on s.oid = r.srsubid
                where r.srrelid = c.oid and s.subenabled) as is_replicated_to
  from unnest($1::text[]) as t (name)
  join pg_class c on c.oid = to_regclass(quote_ident(t.name))
  join pg_namespace n on n.oid = c.relnamespace

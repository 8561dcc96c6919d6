-- Every role, its attributes and its memberships as lines of text.
SELECT concat_ws(' | ', 'role', rolname,
                 nullif(concat_ws(' ', CASE WHEN rolsuper THEN 'SUPERUSER' END, CASE WHEN rolcreaterole THEN 'CREATEROLE' END,
                                  CASE WHEN rolcreatedb THEN 'CREATEDB' END, CASE WHEN rolreplication THEN 'REPLICATION' END,
                                  CASE WHEN rolbypassrls THEN 'BYPASSRLS' END, CASE WHEN NOT rolinherit THEN 'NOINHERIT' END), ''))
  FROM pg_roles WHERE rolname !~ '^pg_' ORDER BY rolname;
SELECT concat_ws(' | ', 'member', member::regrole, roleid::regrole, concat_ws(' ', CASE WHEN inherit_option THEN 'INHERIT' END,
                 CASE WHEN set_option THEN 'SET' END, CASE WHEN admin_option THEN 'ADMIN' END))
  FROM pg_auth_members WHERE member::regrole::text !~ '^pg_' ORDER BY member::regrole::text, roleid::regrole::text;

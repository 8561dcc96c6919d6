-- Every privilege of one database as lines of text: object, grantee, privileges. An owner's own are left out (it has
-- all); of the system's objects only those that differ from what initdb or an extension gave them.
SET search_path = pg_catalog;
WITH grants (object, owner, grantee, privilege, grantable) AS (
    SELECT 'database ' || d.datname, d.datdba, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_database AS d, aclexplode(coalesce(d.datacl, acldefault('d', d.datdba))) AS a
     WHERE d.datname = current_database()
    UNION ALL
    SELECT 'schema ' || n.nspname, n.nspowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_namespace AS n, aclexplode(coalesce(n.nspacl, acldefault('n', n.nspowner))) AS a
     WHERE n.nspname NOT IN ('pg_catalog', 'information_schema', 'pg_toast')
    UNION ALL
    SELECT CASE c.relkind WHEN 'S' THEN 'sequence ' WHEN 'v' THEN 'view ' WHEN 'm' THEN 'materialized view '
                WHEN 'f' THEN 'foreign table ' ELSE 'table ' END || c.oid::regclass,
           c.relowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_class AS c, aclexplode(coalesce(c.relacl, acldefault(CASE c.relkind WHEN 'S' THEN 's' ELSE 'r' END::"char", c.relowner))) AS a
     WHERE c.relkind IN ('r', 'p', 'v', 'm', 'S', 'f')
       AND c.relnamespace <> ALL ('{pg_catalog, information_schema, pg_toast}'::regnamespace[])
    UNION ALL
    SELECT 'column ' || c.attrelid::regclass || '.' || c.attname, r.relowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_attribute AS c JOIN pg_class AS r ON r.oid = c.attrelid, aclexplode(c.attacl) AS a
     WHERE r.relnamespace <> ALL ('{pg_catalog, information_schema}'::regnamespace[])
    UNION ALL
    SELECT 'function ' || p.oid::regprocedure, p.proowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_proc AS p, aclexplode(coalesce(p.proacl, acldefault('f', p.proowner))) AS a
     WHERE p.pronamespace <> ALL ('{pg_catalog, information_schema}'::regnamespace[])
    UNION ALL
    SELECT 'type ' || t.oid::regtype, t.typowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_type AS t, aclexplode(coalesce(t.typacl, acldefault('T', t.typowner))) AS a
     WHERE t.typtype IN ('d', 'e', 'r', 'm', 'b') AND t.typcategory <> 'A'
       AND t.typnamespace <> ALL ('{pg_catalog, information_schema, pg_toast}'::regnamespace[])
    UNION ALL
    SELECT 'language ' || l.lanname, l.lanowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_language AS l, aclexplode(coalesce(l.lanacl, acldefault('l', l.lanowner))) AS a WHERE l.lanispl
    UNION ALL
    SELECT 'tablespace ' || s.spcname, s.spcowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_tablespace AS s, aclexplode(coalesce(s.spcacl, acldefault('t', s.spcowner))) AS a
    UNION ALL
    SELECT 'parameter ' || p.parname, 10, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_parameter_acl AS p, aclexplode(p.paracl) AS a
    UNION ALL
    SELECT 'foreign data wrapper ' || w.fdwname, w.fdwowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_foreign_data_wrapper AS w, aclexplode(coalesce(w.fdwacl, acldefault('F', w.fdwowner))) AS a
    UNION ALL
    SELECT 'foreign server ' || s.srvname, s.srvowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_foreign_server AS s, aclexplode(coalesce(s.srvacl, acldefault('S', s.srvowner))) AS a
    UNION ALL
    SELECT 'large object', l.lomowner, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_largeobject_metadata AS l, aclexplode(coalesce(l.lomacl, acldefault('L', l.lomowner))) AS a
    UNION ALL
    SELECT 'default of ' || d.defaclrole::regrole || coalesce(' in ' || nullif(d.defaclnamespace, 0)::regnamespace, '')
           || ' for ' || d.defaclobjtype::text, 0, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_default_acl AS d, aclexplode(d.defaclacl) AS a
    UNION ALL
    SELECT 'system ' || CASE i.classoid WHEN 'pg_proc'::regclass THEN i.objoid::regprocedure::text
                             WHEN 'pg_namespace'::regclass THEN i.objoid::regnamespace::text
                             ELSE i.objoid::regclass::text END,
           10, a.grantee, a.privilege_type, a.is_grantable
      FROM pg_init_privs AS i
      LEFT JOIN pg_class AS c ON i.classoid = 'pg_class'::regclass AND c.oid = i.objoid AND i.objsubid = 0
      LEFT JOIN pg_proc AS p ON i.classoid = 'pg_proc'::regclass AND p.oid = i.objoid
      LEFT JOIN pg_namespace AS n ON i.classoid = 'pg_namespace'::regclass AND n.oid = i.objoid AND n.nspname <> 'public',
           aclexplode(coalesce(c.relacl, p.proacl, n.nspacl)) AS a
     WHERE coalesce(c.relacl, p.proacl, n.nspacl) IS DISTINCT FROM i.initprivs
    UNION ALL -- system objects that had no privileges to start with, and have some now; everybody reads information_schema
    SELECT 'system ' || x.name, 10, a.grantee, a.privilege_type, a.is_grantable
      FROM (SELECT 'pg_class'::regclass, oid, oid::regclass::text, relacl FROM pg_class
             WHERE relnamespace = ANY ('{pg_catalog, information_schema}'::regnamespace[]) AND relacl IS NOT NULL
            UNION ALL
            SELECT 'pg_proc'::regclass, oid, oid::regprocedure::text, proacl FROM pg_proc
             WHERE pronamespace = ANY ('{pg_catalog, information_schema}'::regnamespace[]) AND proacl IS NOT NULL
           ) AS x (class, oid, name, acl),
           aclexplode(x.acl) AS a
     WHERE NOT EXISTS (SELECT FROM pg_init_privs AS i WHERE i.classoid = x.class AND i.objoid = x.oid AND i.objsubid = 0)
       AND NOT (x.name LIKE 'information_schema.%' AND a.grantee = 0 AND a.privilege_type = 'SELECT')
)
SELECT concat_ws(' | ', current_database(), object, CASE grantee WHEN 0 THEN 'PUBLIC' ELSE grantee::regrole::text END,
                 string_agg(privilege || CASE WHEN grantable THEN '*' ELSE '' END, ' ' ORDER BY privilege))
  FROM grants WHERE grantee <> owner
 GROUP BY object, grantee
 ORDER BY object, grantee::regrole::text;

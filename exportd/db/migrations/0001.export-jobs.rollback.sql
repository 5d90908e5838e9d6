-- Takes back what the step made, and never a row: a table with jobs in it stays as it is, an application's
-- own table loses only the columns that exportd added.

DO $$
DECLARE
    added name;
    used boolean;
BEGIN
    IF to_regclass('export_jobs') IS NULL THEN
        RETURN;
    END IF;
    IF obj_description('export_jobs'::regclass, 'pg_class') LIKE 'exportd:%' THEN
        EXECUTE 'SELECT EXISTS (SELECT FROM export_jobs)' INTO used;
        IF NOT used THEN
            DROP TABLE export_jobs;
        END IF;
        RETURN;
    END IF;
    FOR added IN
        SELECT attname FROM pg_attribute
         WHERE attrelid = 'export_jobs'::regclass AND attnum > 0 AND NOT attisdropped
           AND attname IN ('tool_data', 'created_at', 'completed_at', 'package_path', 'package_size_bytes',
                           'package_sha256')
           AND col_description(attrelid, attnum) LIKE 'exportd:%'
    LOOP
        EXECUTE format('ALTER TABLE export_jobs DROP COLUMN %I', added);
    END LOOP;
END
$$;

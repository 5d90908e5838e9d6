-- The marks go; the jobs and their packages stay.

DO $$
BEGIN
    IF EXISTS (
        SELECT FROM pg_attribute
         WHERE attrelid = to_regclass('export_jobs') AND attname = 'package_suspect_since'
           AND NOT attisdropped AND col_description(attrelid, attnum) LIKE 'exportd:%'
    ) THEN
        ALTER TABLE export_jobs DROP COLUMN package_suspect_since;
    END IF;
END
$$;

-- The history and the counts go; the jobs and their packages stay.

DROP TABLE IF EXISTS download_progress;

DROP TABLE IF EXISTS download_events;

DO $$
DECLARE
    added name;
BEGIN
    FOR added IN
        SELECT attname FROM pg_attribute
         WHERE attrelid = to_regclass('export_jobs') AND attnum > 0 AND NOT attisdropped
           AND attname IN ('package_retention_days', 'package_expires_at', 'download_count',
                           'last_downloaded_at', 'bytes_served', 're_export_of')
           AND col_description(attrelid, attnum) LIKE 'exportd:%'
    LOOP
        EXECUTE format('ALTER TABLE export_jobs DROP COLUMN %I', added);
    END LOOP;
END
$$;

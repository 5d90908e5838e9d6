-- Jobs, counts, the history and the packages stay. Links end, and so does what was known of running deliveries.

DROP INDEX IF EXISTS download_events_resuming, download_events_broken_off;

DROP FUNCTION IF EXISTS exportd_reach(text, int8multirange, bigint);

DROP INDEX IF EXISTS download_events_by_user;

DROP TABLE IF EXISTS exportd_download_links;

DROP TABLE IF EXISTS exportd_cleanup_runs;

DROP FUNCTION IF EXISTS exportd_unfinished_downloads(uuid);

DROP TRIGGER IF EXISTS exportd_expiry_at_completion ON export_jobs;

DROP TRIGGER IF EXISTS exportd_expiry_of_new_jobs ON export_jobs;

DROP FUNCTION IF EXISTS exportd_set_package_expiry();

DROP INDEX IF EXISTS exportd_jobs_by_user, exportd_jobs_by_time, exportd_jobs_by_status, exportd_jobs_to_expire,
    exportd_jobs_by_path, exportd_jobs_to_pack, exportd_jobs_re_exports;

DO $$
DECLARE
    added name;
BEGIN
    FOR added IN
        SELECT attname FROM pg_attribute
         WHERE attrelid = to_regclass('export_jobs') AND attnum > 0 AND NOT attisdropped
           AND attname IN ('package_suspect_since', 'package_deleted_at', 'failure_reason', 'pack_source', 'pack_percent',
                           'pack_attempts', 'pack_due_at', 'packer_id', 'packer_seen_at')
           AND col_description(attrelid, attnum) LIKE 'exportd:%'
    LOOP
        EXECUTE format('ALTER TABLE export_jobs DROP COLUMN %I', added);
    END LOOP;
END
$$;

ALTER TABLE IF EXISTS download_progress DROP COLUMN IF EXISTS completed_at;

DROP INDEX IF EXISTS download_events_by_age, download_events_by_job;

DELETE FROM download_events WHERE outcome = 'running';

DROP INDEX IF EXISTS download_events_running;

ALTER TABLE IF EXISTS download_events
    DROP COLUMN IF EXISTS bytes_acknowledged,
    DROP COLUMN IF EXISTS reason,
    DROP COLUMN IF EXISTS method,
    DROP COLUMN IF EXISTS daemon_id,
    DROP COLUMN IF EXISTS updated_at;

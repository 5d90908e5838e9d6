-- The jobs, their expiry and their packages stay; what the packer and the cleanup wrote down goes.

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
           AND attname IN ('package_deleted_at', 'failure_reason', 'pack_source', 'pack_percent',
                           'pack_attempts', 'pack_due_at', 'packer_id', 'packer_seen_at')
           AND col_description(attrelid, attnum) LIKE 'exportd:%'
    LOOP
        EXECUTE format('ALTER TABLE export_jobs DROP COLUMN %I', added);
    END LOOP;
END
$$;

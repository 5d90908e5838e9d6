-- A package whose file changed under a running download is not served until somebody has looked at it.
-- depends: 0002.download-tracking

DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_attribute
         WHERE attrelid = 'export_jobs'::regclass AND attname = 'package_suspect_since' AND NOT attisdropped
    ) THEN
        ALTER TABLE export_jobs ADD COLUMN package_suspect_since timestamptz;
        COMMENT ON COLUMN export_jobs.package_suspect_since
            IS 'exportd: the file changed after completion; it is not served until this is null again';
    END IF;
END
$$;

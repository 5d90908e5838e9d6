-- The table of export jobs: made where it is missing, completed where an application owns one already.
--
-- Every statement adds only what is not there, so a migration that was interrupted can be run again.

DO $$
DECLARE
    lacking text;
BEGIN
    IF to_regclass('export_jobs') IS NULL THEN
        CREATE TABLE export_jobs (
            job_id uuid PRIMARY KEY,
            user_id text NOT NULL,
            status text NOT NULL DEFAULT 'pending'
        );
        COMMENT ON TABLE export_jobs IS 'exportd: one row for each export job';
        COMMENT ON COLUMN export_jobs.job_id IS 'exportd: the id of the job, and the name of its package';
        COMMENT ON COLUMN export_jobs.user_id IS 'exportd: the creator''s id, as tokens have it';
        COMMENT ON COLUMN export_jobs.status IS 'exportd: only a completed job has a package';
        RETURN;
    END IF;

    SELECT string_agg(needed.name, ', ')
      INTO lacking
      FROM unnest(ARRAY['job_id', 'user_id', 'status']) AS needed(name)
     WHERE NOT EXISTS (
        SELECT FROM pg_attribute
         WHERE attrelid = 'export_jobs'::regclass AND attname = needed.name AND NOT attisdropped
     );
    IF lacking IS NOT NULL THEN
        RAISE EXCEPTION 'the table export_jobs that is there already lacks %', lacking;
    END IF;

    IF NOT EXISTS (
        SELECT FROM pg_index
          JOIN pg_attribute ON attrelid = indrelid AND attnum = indkey[0]
         WHERE indrelid = 'export_jobs'::regclass AND indisunique AND indnkeyatts = 1 AND indpred IS NULL
           AND attname = 'job_id' AND atttypid = 'uuid'::regtype
    ) THEN
        RAISE EXCEPTION 'export_jobs.job_id must be of type uuid, with a primary key or unique index on it alone';
    END IF;
END
$$;

DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('tool_data', 'jsonb', 'what was exported; name (or toolName) goes into the file name'),
            ('created_at', 'timestamptz DEFAULT now()', 'when the export was requested'),
            ('completed_at', 'timestamptz', 'when the package was completed; its Last-Modified'),
            ('package_path', 'text', 'the package''s path below the storage root; null after its deletion'),
            ('package_size_bytes', 'bigint', 'a package of another size is not served'),
            ('package_sha256', 'text', '64 lower-case hexadecimal digits; the source of the ETag')
        ) AS columns(name, definition, meaning)
    LOOP
        IF NOT EXISTS (
            SELECT FROM pg_attribute
             WHERE attrelid = 'export_jobs'::regclass AND attname = wanted.name AND NOT attisdropped
        ) THEN
            EXECUTE format('ALTER TABLE export_jobs ADD COLUMN %I %s', wanted.name, wanted.definition);
            EXECUTE format('COMMENT ON COLUMN export_jobs.%I IS %L', wanted.name, 'exportd: ' || wanted.meaning);
        END IF;
    END LOOP;
END
$$;

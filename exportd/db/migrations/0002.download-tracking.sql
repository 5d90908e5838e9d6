-- Retention, the count of downloads, and their history.
-- depends: 0001.export-jobs

DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('package_retention_days', 'integer DEFAULT 30', 'days until the package expires after its completion'),
            ('package_expires_at', 'timestamptz', 'no download starts after this time; null: never expires'),
            ('download_count', 'bigint DEFAULT 0', 'how often the package was downloaded'),
            ('last_downloaded_at', 'timestamptz', 'when the last download was counted'),
            ('bytes_served', 'bigint DEFAULT 0', 'bytes sent in all deliveries, including partial and aborted ones'),
            ('re_export_of', 'uuid', 'the job that this one exports again')
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

DO $$
DECLARE
    taken text;
BEGIN
    SELECT string_agg(relname, ', ')
      INTO taken
      FROM pg_class
     WHERE oid IN (to_regclass('download_events'), to_regclass('download_progress'))
       AND coalesce(obj_description(oid, 'pg_class'), '') NOT LIKE 'exportd:%';
    IF taken IS NOT NULL THEN
        RAISE EXCEPTION 'tables of these names are there already and are not of exportd''s making: %', taken;
    END IF;
END
$$;

CREATE TABLE IF NOT EXISTS download_events (
    event_id uuid PRIMARY KEY,
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    started_at timestamptz NOT NULL,
    duration_seconds double precision NOT NULL,
    outcome text NOT NULL,
    http_status smallint NOT NULL,
    requested int8multirange NOT NULL,
    received int8multirange NOT NULL,
    bytes_sent bigint NOT NULL,
    package_size_bytes bigint NOT NULL,
    request_id text NOT NULL
);

COMMENT ON TABLE download_events IS 'exportd: one row for each delivery';

CREATE TABLE IF NOT EXISTS download_progress (
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    received int8multirange NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (job_id, user_id)
);

COMMENT ON TABLE download_progress IS 'exportd: the bytes of a package that a principal has so far';

-- Running deliveries, the expiry of packages, packing, links, the cleanup's history, and indexes for large tables.
-- depends: 0002.download-tracking

ALTER TABLE download_events
    ADD COLUMN IF NOT EXISTS bytes_acknowledged bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS reason text,
    ADD COLUMN IF NOT EXISTS method text,
    ADD COLUMN IF NOT EXISTS daemon_id uuid,
    ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now();

CREATE INDEX IF NOT EXISTS download_events_running ON download_events (updated_at) WHERE outcome = 'running';

CREATE INDEX IF NOT EXISTS download_events_by_job ON download_events (job_id, started_at);

CREATE INDEX IF NOT EXISTS download_events_by_age ON download_events (started_at);

ALTER TABLE download_progress
    ADD COLUMN IF NOT EXISTS completed_at timestamptz NOT NULL DEFAULT '-infinity';

DO $$
DECLARE
    wanted record;
BEGIN
    FOR wanted IN
        SELECT * FROM (VALUES
            ('package_suspect_since', 'timestamptz', 'the file changed after completion; it is not served until this is null again'),
            ('package_deleted_at', 'timestamptz', 'when the cleanup deleted the package'),
            ('failure_reason', 'text', 'why the job failed, in words for its user'),
            ('pack_source', 'text', 'the folder or ready .tar.gz that exportd''s packer makes the package of'),
            ('pack_percent', 'smallint', 'the progress of packing'),
            ('pack_attempts', 'smallint NOT NULL DEFAULT 0', 'how often packing was started'),
            ('pack_due_at', 'timestamptz', 'the earliest time of the next attempt'),
            ('packer_id', 'uuid', 'the packer that holds the job'),
            ('packer_seen_at', 'timestamptz', 'the last heartbeat of that packer')
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

-- Sets the expiry when a job is completed. UTC, because the table may hold times without a zone.
CREATE OR REPLACE FUNCTION exportd_set_package_expiry() RETURNS trigger
    LANGUAGE plpgsql
    SET timezone = 'UTC'
    AS $$
BEGIN
    IF NEW.status::text = 'completed' AND NEW.package_path IS NOT NULL AND NEW.package_expires_at IS NULL THEN
        NEW.completed_at := coalesce(NEW.completed_at, now());
        NEW.package_expires_at := NEW.completed_at + make_interval(days => NEW.package_retention_days);
    END IF;
    RETURN NEW;
END
$$;

COMMENT ON FUNCTION exportd_set_package_expiry()
    IS 'exportd: package_expires_at = completed_at + package_retention_days; null days: never';

CREATE OR REPLACE TRIGGER exportd_expiry_of_new_jobs BEFORE INSERT ON export_jobs
    FOR EACH ROW EXECUTE FUNCTION exportd_set_package_expiry();

-- Only at completion: an existing package keeps its expiry, or has none.
CREATE OR REPLACE TRIGGER exportd_expiry_at_completion BEFORE UPDATE OF status, package_path ON export_jobs
    FOR EACH ROW
    WHEN (OLD.package_path IS NULL OR OLD.status::text <> 'completed')
    EXECUTE FUNCTION exportd_set_package_expiry();

-- Principals with an unfinished download: their last delivery is not whole, and began after their last whole delivery and
-- after the last completion by several deliveries.
CREATE OR REPLACE FUNCTION exportd_unfinished_downloads(of_job uuid) RETURNS SETOF text
    LANGUAGE sql STABLE
    AS $$
    SELECT event.user_id
      FROM (
        SELECT *, received @> int8multirange(int8range(0, package_size_bytes)) AS is_whole
          FROM download_events
         WHERE job_id = of_job
      ) AS event
      LEFT JOIN download_progress AS progress USING (job_id, user_id)
     GROUP BY event.user_id, progress.completed_at
    HAVING max(event.started_at) FILTER (WHERE NOT event.is_whole)
           > greatest(max(event.started_at) FILTER (WHERE event.is_whole), progress.completed_at, '-infinity')
$$;

COMMENT ON FUNCTION exportd_unfinished_downloads(uuid) IS 'exportd: the principals that may resume a download of the job';

CREATE TABLE IF NOT EXISTS exportd_cleanup_runs (
    run_id uuid PRIMARY KEY,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    packages_deleted bigint NOT NULL,
    packages_failed bigint NOT NULL,
    packages_waiting bigint NOT NULL,
    bytes_freed bigint NOT NULL,
    events_pruned bigint NOT NULL
);

COMMENT ON TABLE exportd_cleanup_runs IS 'exportd: one row for each complete cleanup';

CREATE INDEX IF NOT EXISTS exportd_cleanup_runs_by_time ON exportd_cleanup_runs (started_at);

CREATE TABLE IF NOT EXISTS exportd_download_links (
    ticket_sha256 bytea PRIMARY KEY,
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    is_admin boolean NOT NULL,
    package_sha256 text,
    created_at timestamptz NOT NULL DEFAULT now(),
    start_until timestamptz NOT NULL,
    resume_until timestamptz NOT NULL,
    begun_at timestamptz,
    revoked_at timestamptz
);

COMMENT ON TABLE exportd_download_links IS 'exportd: links that download one package as one principal';

CREATE INDEX IF NOT EXISTS exportd_download_links_by_job ON exportd_download_links (job_id);

CREATE INDEX IF NOT EXISTS exportd_download_links_by_age ON exportd_download_links (resume_until);

CREATE INDEX IF NOT EXISTS download_events_by_user ON download_events (user_id, started_at);

-- The position up to which the client of an interrupted delivery may have received bytes: the sent ones or, after a kill,
-- the requested ones. Null: the delivery was not interrupted, or has several parts.
CREATE OR REPLACE FUNCTION exportd_reach(outcome text, requested int8multirange, bytes_sent bigint) RETURNS bigint
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE
               WHEN requested <> int8multirange(int8range(lower(requested), upper(requested))) THEN NULL
               WHEN outcome IN ('aborted', 'failed') THEN lower(requested) + bytes_sent
               WHEN outcome = 'lost' THEN upper(requested) - 1
           END
$$;

COMMENT ON FUNCTION exportd_reach(text, int8multirange, bigint)
    IS 'exportd: up to where the client of an interrupted delivery may have received bytes';

CREATE INDEX IF NOT EXISTS download_events_broken_off ON download_events (job_id, user_id, started_at)
    WHERE exportd_reach(outcome, requested, bytes_sent) > coalesce(upper(received), lower(requested));

CREATE INDEX IF NOT EXISTS download_events_resuming ON download_events (job_id, user_id, started_at)
    WHERE lower(requested) > 0 AND outcome <> 'running';

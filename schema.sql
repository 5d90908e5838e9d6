-- The whole schema as it stands now, for PostgreSQL 14 or newer (int8multirange).
--
-- `exportd migrate up` gets there step by step, from an empty database or from one whose application
-- already owns an export_jobs table; a test holds the two equal. Comments that begin with "exportd:" mark
-- what exportd made, so that `exportd migrate down` removes that and nothing else.

CREATE TABLE export_jobs (
    job_id uuid PRIMARY KEY,
    user_id text NOT NULL,
    status text NOT NULL DEFAULT 'pending',
    tool_data jsonb,
    created_at timestamptz DEFAULT now(),
    completed_at timestamptz,
    package_path text,
    package_size_bytes bigint,
    package_sha256 text,
    package_retention_days integer DEFAULT 30,
    package_expires_at timestamptz,
    download_count bigint DEFAULT 0,
    last_downloaded_at timestamptz,
    bytes_served bigint DEFAULT 0,
    re_export_of uuid,
    package_suspect_since timestamptz,
    package_deleted_at timestamptz,
    failure_reason text,
    pack_source text,
    pack_percent smallint,
    pack_attempts smallint NOT NULL DEFAULT 0,
    pack_due_at timestamptz,
    packer_id uuid,
    packer_seen_at timestamptz
);

COMMENT ON TABLE export_jobs IS 'exportd: one row for each export job';
COMMENT ON COLUMN export_jobs.job_id IS 'exportd: the name of the job, and of its package';
COMMENT ON COLUMN export_jobs.user_id IS 'exportd: the creator, as the token names them';
COMMENT ON COLUMN export_jobs.status IS 'exportd: only a job whose status is completed has a package';
COMMENT ON COLUMN export_jobs.tool_data IS 'exportd: what was exported; name (or toolName) goes into the file name';
COMMENT ON COLUMN export_jobs.created_at IS 'exportd: when the export was asked for';
COMMENT ON COLUMN export_jobs.completed_at IS 'exportd: when the package was complete; its Last-Modified';
COMMENT ON COLUMN export_jobs.package_path IS 'exportd: the package, relative to the storage root; null once deleted';
COMMENT ON COLUMN export_jobs.package_size_bytes IS 'exportd: a package of another size is not served';
COMMENT ON COLUMN export_jobs.package_sha256 IS 'exportd: 64 lower-case hexadecimal digits; the source of the ETag';
COMMENT ON COLUMN export_jobs.package_retention_days IS 'exportd: how long the package is kept once completed';
COMMENT ON COLUMN export_jobs.package_expires_at IS 'exportd: no download starts from this moment on; null: never expires';
COMMENT ON COLUMN export_jobs.download_count IS 'exportd: how often the whole package was received';
COMMENT ON COLUMN export_jobs.last_downloaded_at IS 'exportd: when it last was';
COMMENT ON COLUMN export_jobs.bytes_served IS 'exportd: bytes sent in all deliveries, partial and aborted ones too';
COMMENT ON COLUMN export_jobs.re_export_of IS 'exportd: the job this one exports again';
COMMENT ON COLUMN export_jobs.package_suspect_since IS 'exportd: the file changed after completion; it is not served until this is null again';
COMMENT ON COLUMN export_jobs.package_deleted_at IS 'exportd: when the cleanup deleted the package';
COMMENT ON COLUMN export_jobs.failure_reason IS 'exportd: why the job failed, in words for its user';
COMMENT ON COLUMN export_jobs.pack_source IS 'exportd: the folder or ready .tar.gz that exportd''s packer makes the package of';
COMMENT ON COLUMN export_jobs.pack_percent IS 'exportd: how much of it is packed';
COMMENT ON COLUMN export_jobs.pack_attempts IS 'exportd: how often packing it was begun';
COMMENT ON COLUMN export_jobs.pack_due_at IS 'exportd: a job that failed for now is not tried again before';
COMMENT ON COLUMN export_jobs.packer_id IS 'exportd: the packer at work on it';
COMMENT ON COLUMN export_jobs.packer_seen_at IS 'exportd: when that packer was last heard of';

CREATE INDEX exportd_jobs_by_user ON export_jobs (user_id, created_at, job_id);

CREATE INDEX exportd_jobs_by_time ON export_jobs (created_at, job_id);

CREATE INDEX exportd_jobs_by_status ON export_jobs (status, created_at, job_id);

CREATE INDEX exportd_jobs_to_expire ON export_jobs (package_expires_at, job_id)
    WHERE package_path IS NOT NULL;

CREATE INDEX exportd_jobs_by_path ON export_jobs (package_path) WHERE package_path IS NOT NULL;

CREATE INDEX exportd_jobs_to_pack ON export_jobs (created_at, job_id)
    WHERE pack_source IS NOT NULL AND completed_at IS NULL;

CREATE INDEX exportd_jobs_re_exports ON export_jobs (re_export_of) WHERE re_export_of IS NOT NULL;

-- Whoever completes a job, its package gets an expiry. UTC, because the table may hold times without a zone.
CREATE FUNCTION exportd_set_package_expiry() RETURNS trigger
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
    IS 'exportd: package_expires_at = completed_at + package_retention_days; of a job that keeps its package for ever, those days are null';

CREATE TRIGGER exportd_expiry_of_new_jobs BEFORE INSERT ON export_jobs
    FOR EACH ROW EXECUTE FUNCTION exportd_set_package_expiry();

-- Only at the moment of completion: a package that was there before keeps the expiry it has, or has not.
CREATE TRIGGER exportd_expiry_at_completion BEFORE UPDATE OF status, package_path ON export_jobs
    FOR EACH ROW
    WHEN (OLD.package_path IS NULL OR OLD.status::text <> 'completed')
    EXECUTE FUNCTION exportd_set_package_expiry();

-- One row for each delivery. No foreign key: the history outlives a job that the application deletes.
CREATE TABLE download_events (
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
    request_id text NOT NULL,
    bytes_acknowledged bigint NOT NULL DEFAULT 0,
    reason text,
    method text,
    daemon_id uuid,
    updated_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON TABLE download_events IS 'exportd: one row for each delivery';

CREATE INDEX download_events_running ON download_events (updated_at) WHERE outcome = 'running';

CREATE INDEX download_events_by_job ON download_events (job_id, started_at);

CREATE INDEX download_events_by_user ON download_events (user_id, started_at);

CREATE INDEX download_events_by_age ON download_events (started_at);

-- Up to which byte the client may have got beyond what it acknowledged: what was sent or, after a kill, what was
-- asked for. Null: the delivery did not break off, or has several parts.
CREATE FUNCTION exportd_reach(outcome text, requested int8multirange, bytes_sent bigint) RETURNS bigint
    LANGUAGE sql IMMUTABLE
    AS $$
    SELECT CASE
               WHEN requested <> int8multirange(int8range(lower(requested), upper(requested))) THEN NULL
               WHEN outcome IN ('aborted', 'failed') THEN lower(requested) + bytes_sent
               WHEN outcome = 'lost' THEN upper(requested) - 1
           END
$$;

COMMENT ON FUNCTION exportd_reach(text, int8multirange, bigint)
    IS 'exportd: how far the client may have got whose delivery broke off';

CREATE INDEX download_events_broken_off ON download_events (job_id, user_id, started_at)
    WHERE exportd_reach(outcome, requested, bytes_sent) > coalesce(upper(received), lower(requested));

CREATE INDEX download_events_resuming ON download_events (job_id, user_id, started_at)
    WHERE lower(requested) > 0 AND outcome <> 'running';

-- What each principal has of a package so far, since the last time it had the whole (completed_at).
CREATE TABLE download_progress (
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    received int8multirange NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    completed_at timestamptz NOT NULL DEFAULT '-infinity',
    PRIMARY KEY (job_id, user_id)
);

COMMENT ON TABLE download_progress IS 'exportd: the bytes of a package that a principal has so far';

-- Who began to download a package and does not have the whole of it since: whose last delivery began after the
-- last one that was whole, and after the last time that several together were.
CREATE FUNCTION exportd_unfinished_downloads(of_job uuid) RETURNS SETOF text
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

COMMENT ON FUNCTION exportd_unfinished_downloads(uuid) IS 'exportd: whoever may resume a download of the job';

CREATE TABLE exportd_cleanup_runs (
    run_id uuid PRIMARY KEY,
    started_at timestamptz NOT NULL,
    finished_at timestamptz NOT NULL,
    packages_deleted bigint NOT NULL,
    packages_failed bigint NOT NULL,
    packages_waiting bigint NOT NULL,
    bytes_freed bigint NOT NULL,
    events_pruned bigint NOT NULL
);

COMMENT ON TABLE exportd_cleanup_runs IS 'exportd: one row for each cleanup that went to its end';

CREATE INDEX exportd_cleanup_runs_by_time ON exportd_cleanup_runs (started_at);

CREATE TABLE exportd_download_links (
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

CREATE INDEX exportd_download_links_by_job ON exportd_download_links (job_id);

CREATE INDEX exportd_download_links_by_age ON exportd_download_links (resume_until);

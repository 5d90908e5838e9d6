-- The whole schema as it stands now, for PostgreSQL 14 or newer (int8multirange).
--
-- `exportd migrate up` builds it step by step, in an empty database or in one with an application's own export_jobs
-- table. A test keeps the two equal. Comments that begin with "exportd:" mark objects of exportd, so that
-- `exportd migrate down` removes only those.

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
COMMENT ON COLUMN export_jobs.job_id IS 'exportd: the id of the job, and the name of its package';
COMMENT ON COLUMN export_jobs.user_id IS 'exportd: the creator''s id, as tokens have it';
COMMENT ON COLUMN export_jobs.status IS 'exportd: only a completed job has a package';
COMMENT ON COLUMN export_jobs.tool_data IS 'exportd: what was exported; name (or toolName) goes into the file name';
COMMENT ON COLUMN export_jobs.created_at IS 'exportd: when the export was requested';
COMMENT ON COLUMN export_jobs.completed_at IS 'exportd: when the package was completed; its Last-Modified';
COMMENT ON COLUMN export_jobs.package_path IS 'exportd: the package''s path below the storage root; null after its deletion';
COMMENT ON COLUMN export_jobs.package_size_bytes IS 'exportd: a package of another size is not served';
COMMENT ON COLUMN export_jobs.package_sha256 IS 'exportd: 64 lower-case hexadecimal digits; the source of the ETag';
COMMENT ON COLUMN export_jobs.package_retention_days IS 'exportd: days until the package expires after its completion';
COMMENT ON COLUMN export_jobs.package_expires_at IS 'exportd: no download starts after this time; null: never expires';
COMMENT ON COLUMN export_jobs.download_count IS 'exportd: how often the package was downloaded';
COMMENT ON COLUMN export_jobs.last_downloaded_at IS 'exportd: when the last download was counted';
COMMENT ON COLUMN export_jobs.bytes_served IS 'exportd: bytes sent in all deliveries, including partial and aborted ones';
COMMENT ON COLUMN export_jobs.re_export_of IS 'exportd: the job that this one exports again';
COMMENT ON COLUMN export_jobs.package_suspect_since IS 'exportd: the file changed after completion; it is not served until this is null again';
COMMENT ON COLUMN export_jobs.package_deleted_at IS 'exportd: when the cleanup deleted the package';
COMMENT ON COLUMN export_jobs.failure_reason IS 'exportd: why the job failed, in words for its user';
COMMENT ON COLUMN export_jobs.pack_source IS 'exportd: the folder or ready .tar.gz that exportd''s packer makes the package of';
COMMENT ON COLUMN export_jobs.pack_percent IS 'exportd: the progress of packing';
COMMENT ON COLUMN export_jobs.pack_attempts IS 'exportd: how often packing was started';
COMMENT ON COLUMN export_jobs.pack_due_at IS 'exportd: the earliest time of the next attempt';
COMMENT ON COLUMN export_jobs.packer_id IS 'exportd: the packer that holds the job';
COMMENT ON COLUMN export_jobs.packer_seen_at IS 'exportd: the last heartbeat of that packer';

CREATE INDEX exportd_jobs_by_user ON export_jobs (user_id, created_at, job_id);

CREATE INDEX exportd_jobs_by_time ON export_jobs (created_at, job_id);

CREATE INDEX exportd_jobs_by_status ON export_jobs (status, created_at, job_id);

CREATE INDEX exportd_jobs_to_expire ON export_jobs (package_expires_at, job_id)
    WHERE package_path IS NOT NULL;

CREATE INDEX exportd_jobs_by_path ON export_jobs (package_path) WHERE package_path IS NOT NULL;

CREATE INDEX exportd_jobs_to_pack ON export_jobs (created_at, job_id)
    WHERE pack_source IS NOT NULL AND completed_at IS NULL;

CREATE INDEX exportd_jobs_re_exports ON export_jobs (re_export_of) WHERE re_export_of IS NOT NULL;

-- Sets the expiry when a job is completed, in the zone of the session that completes it. A package whose expiry cannot be
-- computed, or does not fit the column, never expires.
CREATE FUNCTION exportd_set_package_expiry() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
DECLARE
    given CONSTANT record := NEW;
BEGIN
    IF NEW.status::text = 'completed' AND NEW.package_path IS NOT NULL AND NEW.package_expires_at IS NULL THEN
        NEW.completed_at := coalesce(NEW.completed_at, now());
        NEW.package_expires_at := NEW.completed_at + make_interval(days => NEW.package_retention_days::integer);
    END IF;
    RETURN NEW;
EXCEPTION WHEN OTHERS THEN
    RAISE WARNING USING MESSAGE = 'exportd cannot set the expiry of the package of a job: ' || SQLERRM;
    RETURN given;
END
$$;

COMMENT ON FUNCTION exportd_set_package_expiry()
    IS 'exportd: package_expires_at = completed_at + package_retention_days; null days: never';

CREATE TRIGGER exportd_expiry_of_new_jobs BEFORE INSERT ON export_jobs
    FOR EACH ROW EXECUTE FUNCTION exportd_set_package_expiry();

-- Only at completion: an existing package keeps its expiry, or has none.
CREATE TRIGGER exportd_expiry_at_completion BEFORE UPDATE OF status, package_path ON export_jobs
    FOR EACH ROW
    WHEN (OLD.package_path IS NULL OR OLD.status::text <> 'completed')
    EXECUTE FUNCTION exportd_set_package_expiry();

-- A column of the type json may hold escapes that no text can.
CREATE FUNCTION exportd_tool_name(tool_data json) RETURNS text
    LANGUAGE plpgsql IMMUTABLE
    AS $$
BEGIN
    RETURN coalesce(tool_data ->> 'name', tool_data ->> 'toolName', '');
EXCEPTION WHEN OTHERS THEN
    RETURN '';
END
$$;

COMMENT ON FUNCTION exportd_tool_name(json) IS 'exportd: the name in tool_data; empty if it cannot be read';

-- One row for each delivery that has ended. No foreign key: the history outlives a job that the application deletes.
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
    package_sha256 text NOT NULL DEFAULT '',
    is_judged boolean NOT NULL DEFAULT true,
    CONSTRAINT download_events_ended CHECK (outcome <> 'running')
);

COMMENT ON TABLE download_events IS 'exportd: one row for each delivery';
COMMENT ON COLUMN download_events.is_judged IS 'exportd: false: the job had no row, so the delivery is not counted yet';

CREATE INDEX download_events_by_job ON download_events (job_id, started_at);

CREATE INDEX download_events_by_user ON download_events (user_id, started_at);

CREATE INDEX download_events_by_age ON download_events (started_at);

CREATE INDEX download_events_not_judged ON download_events (job_id) WHERE NOT is_judged;

-- Running deliveries. A checkpoint changes no indexed column, and half of each page is free for it.
CREATE TABLE exportd_running (
    event_id uuid PRIMARY KEY,
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    daemon_id uuid NOT NULL,
    started_at timestamptz NOT NULL,
    http_status smallint NOT NULL,
    requested int8multirange NOT NULL,
    package_size_bytes bigint NOT NULL,
    package_sha256 text NOT NULL,
    request_id text NOT NULL,
    bytes_acknowledged bigint NOT NULL,
    bytes_sent bigint NOT NULL,
    duration_seconds double precision NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now()
) WITH (fillfactor = 50);

COMMENT ON TABLE exportd_running IS 'exportd: one row for each running delivery, with its last checkpoint';

CREATE INDEX exportd_running_by_job ON exportd_running (job_id);

CREATE INDEX exportd_running_by_user ON exportd_running (user_id);

-- What each principal has of a package, and not yet the whole: the received bytes, and the evidence that may show more
-- (tails and resumes, see exportd/counting/rule.py). The row is deleted when the download is counted.
CREATE TABLE download_progress (
    job_id uuid NOT NULL,
    user_id text NOT NULL,
    received int8multirange NOT NULL DEFAULT '{}',
    updated_at timestamptz NOT NULL DEFAULT now(),
    package_size_bytes bigint NOT NULL,
    package_sha256 text NOT NULL,
    tails jsonb NOT NULL DEFAULT '[]',
    resumes jsonb NOT NULL DEFAULT '[]',
    PRIMARY KEY (job_id, user_id, package_size_bytes, package_sha256)
);

COMMENT ON TABLE download_progress IS 'exportd: the bytes of a package that a principal has so far';

CREATE FUNCTION exportd_unfinished_downloads(of_job uuid) RETURNS SETOF text
    LANGUAGE sql STABLE
    AS $$
    SELECT user_id FROM download_progress WHERE job_id = of_job
    UNION
    SELECT user_id FROM exportd_running WHERE job_id = of_job
$$;

COMMENT ON FUNCTION exportd_unfinished_downloads(uuid) IS 'exportd: the principals that may resume a download of the job';

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

COMMENT ON TABLE exportd_cleanup_runs IS 'exportd: one row for each complete cleanup';

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

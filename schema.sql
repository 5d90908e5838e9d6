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
    package_suspect_since timestamptz
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

CREATE INDEX download_events_by_age ON download_events (started_at);

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

-- Counting by a rule over one row of progress. Running deliveries get a table of their own, so that events are written once.
-- depends: 0003.deliveries-and-packages

ALTER TABLE download_events
    ADD COLUMN IF NOT EXISTS package_sha256 text NOT NULL DEFAULT '',
    ADD COLUMN IF NOT EXISTS is_judged boolean NOT NULL DEFAULT true;

COMMENT ON COLUMN download_events.is_judged IS 'exportd: false: the job had no row, so the delivery is not counted yet';

CREATE INDEX IF NOT EXISTS download_events_not_judged ON download_events (job_id) WHERE NOT is_judged;

CREATE TABLE IF NOT EXISTS exportd_running (
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

CREATE INDEX IF NOT EXISTS exportd_running_by_job ON exportd_running (job_id);

CREATE INDEX IF NOT EXISTS exportd_running_by_user ON exportd_running (user_id);

ALTER TABLE download_progress
    ADD COLUMN IF NOT EXISTS package_size_bytes bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS package_sha256 text NOT NULL DEFAULT '',
    ADD COLUMN IF NOT EXISTS tails jsonb NOT NULL DEFAULT '[]',
    ADD COLUMN IF NOT EXISTS resumes jsonb NOT NULL DEFAULT '[]';

DO $$
BEGIN
    -- A migration that died before it was marked runs again.
    IF (SELECT indnkeyatts FROM pg_index WHERE indrelid = 'download_progress'::regclass AND indisprimary) > 2 THEN
        RETURN;
    END IF;

    INSERT INTO exportd_running (
        event_id, job_id, user_id, daemon_id, started_at, http_status, requested, package_size_bytes, package_sha256,
        request_id, bytes_acknowledged, bytes_sent, duration_seconds, seen_at
    )
    SELECT event.event_id, event.job_id, event.user_id, coalesce(event.daemon_id, event.event_id), event.started_at,
           event.http_status, event.requested, event.package_size_bytes,
           CASE WHEN job.package_sha256::text ~* '^[0-9a-f]{64}$' THEN lower(job.package_sha256::text) ELSE '' END,
           event.request_id, event.bytes_acknowledged, event.bytes_sent, event.duration_seconds, event.updated_at
      FROM download_events AS event
      LEFT JOIN export_jobs AS job USING (job_id)
     WHERE event.outcome = 'running'
    ON CONFLICT (event_id) DO NOTHING;

    DELETE FROM download_events WHERE outcome = 'running';

    -- What the history shows about downloads that are not complete: deliveries that broke off, and resumes. It is the history
    -- since the principal's last complete download.
    WITH since AS (
        SELECT job_id, user_id,
               greatest(
                   max(started_at) FILTER (WHERE event.received @> int8multirange(int8range(0, event.package_size_bytes))),
                   max(progress.completed_at)
               ) AS completed_at
          FROM download_events AS event
          LEFT JOIN download_progress AS progress USING (job_id, user_id)
         GROUP BY job_id, user_id
    ), present AS (
        SELECT event.*, exportd_reach(outcome, requested, bytes_sent) AS reach,
               coalesce(upper(received), lower(requested)) AS known
          FROM download_events AS event
          JOIN since USING (job_id, user_id)
          JOIN export_jobs AS job USING (job_id)
         WHERE job.package_path IS NOT NULL AND job.package_size_bytes = event.package_size_bytes
           AND started_at > coalesce(since.completed_at, '-infinity')
    ), evidence AS (
        SELECT job_id, user_id,
               jsonb_agg(
                   jsonb_build_object(
                       'known', known, 'reach', reach,
                       'after', CASE outcome WHEN 'lost' THEN updated_at ELSE started_at END,
                       'daemon_id', CASE outcome WHEN 'lost' THEN daemon_id END
                   ) ORDER BY started_at
               ) FILTER (WHERE reach >= known AND reach > 0) AS tails,
               jsonb_agg(
                   jsonb_build_object(
                       'start', lower(requested), 'began_at', started_at, 'daemon_id', coalesce(daemon_id, event_id)
                   ) ORDER BY started_at
               ) FILTER (WHERE lower(requested) > 0) AS resumes
          FROM present
         GROUP BY job_id, user_id
    )
    INSERT INTO download_progress AS progress (job_id, user_id, tails, resumes)
    SELECT job_id, user_id,
           coalesce(jsonb_path_query_array(tails, '$[last - 63 to last]'), '[]'),
           coalesce(jsonb_path_query_array(resumes, '$[last - 63 to last]'), '[]')
      FROM evidence
     WHERE tails IS NOT NULL OR resumes IS NOT NULL
    ON CONFLICT (job_id, user_id) DO UPDATE SET tails = excluded.tails, resumes = excluded.resumes;

    UPDATE download_progress AS progress
       SET package_size_bytes = job.package_size_bytes,
           package_sha256 = CASE WHEN job.package_sha256::text ~* '^[0-9a-f]{64}$' THEN lower(job.package_sha256::text) ELSE '' END
      FROM export_jobs AS job
     WHERE job.job_id = progress.job_id AND job.package_size_bytes IS NOT NULL;

    DELETE FROM download_progress WHERE package_size_bytes = 0 OR isempty(received) AND tails = '[]' AND resumes = '[]';

    -- Progress belongs to one package: a job may get another one.
    ALTER TABLE download_progress
        ALTER COLUMN package_size_bytes DROP DEFAULT,
        ALTER COLUMN package_sha256 DROP DEFAULT,
        DROP CONSTRAINT download_progress_pkey,
        ADD PRIMARY KEY (job_id, user_id, package_size_bytes, package_sha256);
END
$$;

-- A process of the earlier version that still runs cannot write a running delivery among the events.
ALTER TABLE download_events DROP CONSTRAINT IF EXISTS download_events_ended;

ALTER TABLE download_events ADD CONSTRAINT download_events_ended CHECK (outcome <> 'running');

CREATE OR REPLACE FUNCTION exportd_unfinished_downloads(of_job uuid) RETURNS SETOF text
    LANGUAGE sql STABLE
    AS $$
    SELECT user_id FROM download_progress WHERE job_id = of_job
    UNION
    SELECT user_id FROM exportd_running WHERE job_id = of_job
$$;

DROP INDEX IF EXISTS download_events_running, download_events_resuming, download_events_broken_off;

DROP FUNCTION IF EXISTS exportd_reach(text, int8multirange, bigint);

ALTER TABLE download_progress DROP COLUMN IF EXISTS completed_at;

ALTER TABLE download_events DROP COLUMN IF EXISTS updated_at;

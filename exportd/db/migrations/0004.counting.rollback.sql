-- Jobs, counts, the history and the progress of the present packages stay. Evidence of interrupted deliveries remains in the
-- history.

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

ALTER TABLE download_events
    DROP CONSTRAINT IF EXISTS download_events_ended,
    DROP COLUMN IF EXISTS package_sha256,
    DROP COLUMN IF EXISTS is_judged,
    ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now();

INSERT INTO download_events (
    event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received, bytes_sent,
    package_size_bytes, request_id, bytes_acknowledged, daemon_id, updated_at
)
SELECT event_id, job_id, user_id, started_at, duration_seconds, 'running', http_status, requested,
       requested * int8multirange(int8range(lower(requested), lower(requested) + bytes_acknowledged)), bytes_sent,
       package_size_bytes, request_id, bytes_acknowledged, daemon_id, seen_at
  FROM exportd_running
ON CONFLICT (event_id) DO NOTHING;

DROP TABLE IF EXISTS exportd_running;

CREATE INDEX IF NOT EXISTS download_events_running ON download_events (updated_at) WHERE outcome = 'running';

DELETE FROM download_progress AS progress
 WHERE isempty(received) OR NOT EXISTS (
    SELECT FROM export_jobs AS job
     WHERE job.job_id = progress.job_id AND job.package_size_bytes = progress.package_size_bytes
       AND coalesce(job.package_sha256::text, '') = progress.package_sha256
 );

ALTER TABLE download_progress
    DROP CONSTRAINT IF EXISTS download_progress_pkey,
    DROP COLUMN IF EXISTS package_size_bytes,
    DROP COLUMN IF EXISTS package_sha256,
    DROP COLUMN IF EXISTS tails,
    DROP COLUMN IF EXISTS resumes,
    ADD COLUMN IF NOT EXISTS completed_at timestamptz NOT NULL DEFAULT '-infinity',
    ADD PRIMARY KEY (job_id, user_id);

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

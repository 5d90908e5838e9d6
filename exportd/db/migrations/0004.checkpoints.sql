-- A delivery is known while it runs, so that a daemon that is killed does not forget it.
-- depends: 0003.suspect-packages

ALTER TABLE download_events
    ADD COLUMN IF NOT EXISTS bytes_acknowledged bigint NOT NULL DEFAULT 0,
    ADD COLUMN IF NOT EXISTS reason text,
    ADD COLUMN IF NOT EXISTS method text,
    ADD COLUMN IF NOT EXISTS daemon_id uuid,
    ADD COLUMN IF NOT EXISTS updated_at timestamptz NOT NULL DEFAULT now();

UPDATE download_events SET bytes_acknowledged = bytes_sent WHERE daemon_id IS NULL;

CREATE INDEX IF NOT EXISTS download_events_running ON download_events (updated_at) WHERE outcome = 'running';

CREATE INDEX IF NOT EXISTS download_events_by_job ON download_events (job_id, started_at);

CREATE INDEX IF NOT EXISTS download_events_by_age ON download_events (started_at);

ALTER TABLE download_progress
    ADD COLUMN IF NOT EXISTS completed_at timestamptz NOT NULL DEFAULT '-infinity';

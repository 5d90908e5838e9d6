-- The history and the counts stay; what was under way when a daemon was killed is forgotten.

ALTER TABLE IF EXISTS download_progress DROP COLUMN IF EXISTS completed_at;

DROP INDEX IF EXISTS download_events_by_age, download_events_by_job;

DELETE FROM download_events WHERE outcome = 'running';

DROP INDEX IF EXISTS download_events_running;

ALTER TABLE IF EXISTS download_events
    DROP COLUMN IF EXISTS bytes_acknowledged,
    DROP COLUMN IF EXISTS reason,
    DROP COLUMN IF EXISTS method,
    DROP COLUMN IF EXISTS daemon_id,
    DROP COLUMN IF EXISTS updated_at;

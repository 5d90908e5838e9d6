-- What a user downloaded in the last day is asked at each start of a download, where it is limited.
-- depends: 0006.download-links

CREATE INDEX IF NOT EXISTS download_events_by_user ON download_events (user_id, started_at);

DROP INDEX IF EXISTS download_events_by_user;

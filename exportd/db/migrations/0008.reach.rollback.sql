DROP INDEX IF EXISTS download_events_resuming, download_events_broken_off;

DROP FUNCTION IF EXISTS exportd_reach(text, int8multirange, bigint);

-- What a delivery that broke off may have brought is looked up by an index, however long the history.
-- depends: 0007.quota

-- Up to which byte the client may have got beyond what it acknowledged: what was sent or, after a kill, what was
-- asked for. Null: the delivery did not break off, or has several parts.
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
    IS 'exportd: how far the client may have got whose delivery broke off';

CREATE INDEX IF NOT EXISTS download_events_broken_off ON download_events (job_id, user_id, started_at)
    WHERE exportd_reach(outcome, requested, bytes_sent) > coalesce(upper(received), lower(requested));

CREATE INDEX IF NOT EXISTS download_events_resuming ON download_events (job_id, user_id, started_at)
    WHERE lower(requested) > 0 AND outcome <> 'running';

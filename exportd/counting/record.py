"""Records deliveries and counts downloads, in SQL.

Each delivery is one event. A download is counted when one principal has received every byte of the package,
in one delivery or in several.

The rule, for each event and its principal: the received bytes (those that the client's kernel acknowledged)
join the principal's progress. When the progress covers the package, the count goes up by one and the progress
is cleared. Events of one batch are counted one after the other, in one statement. Everything is idempotent by
the event's id.

A running delivery is an event with outcome ``running``. It joins no progress, because its end is unknown. If
its daemon is killed, it is recorded as ``lost``, with the acknowledged bytes of its last checkpoint. If the
daemon was only cut off, the delivery's own end is recorded later, and the bytes since the checkpoint join
then.

A client may have more than it acknowledged when its delivery broke off: acknowledgements were on their way,
or the daemon was killed. A resume shows how much. If the same principal requests a range that begins after
the acknowledged bytes, and not after the sent ones (after a kill: the requested ones), the client has the
bytes in between. For example, a client acknowledged bytes up to 600 of 1000 sent, and then resumes at 900: it
has the bytes from 600 to 900. If several deliveries match, the one that got furthest counts. If the principal
already has the byte before the resume's start, the resume shows nothing.

After a package was completed, earlier deliveries and resumes show nothing more. The time of completion is the
end of the delivery that completed the package, by its daemon's clock, like the ends it is compared with; for
a lost delivery it is the time of its record.

The cost of an event does not grow with the history. A resume is compared with the last 64 deliveries that
broke off before it, and a delivery that broke off with the last 64 resumes after it. Of a principal's
progress the 500 largest pieces are kept.

A delivery that ended because the package was written to (outcome ``changed``) marks the job as suspect. No
download of it starts until it is verified.
"""

from collections.abc import Sequence

from exportd.db.pool import Database
from exportd.domain.delivery import DownloadEvent

# A statement of its own, sent together with the next one and so in one transaction: the next one then sees
# rows that were committed while this one waited. The order prevents deadlocks between daemons.
_LOCK_JOBS = """
SELECT FROM export_jobs WHERE job_id = ANY (%(job_id)s::uuid[]) ORDER BY job_id FOR NO KEY UPDATE;
"""

# Idempotent by event_id: the parts after ``inserted`` see only events that this statement inserted.
_GIVEN = """
WITH RECURSIVE before AS (
    -- Events that were recorded as lost, with the bytes they had then. Those bytes are in the progress
    -- already. Reads see nothing that this statement writes.
    SELECT event_id, received, bytes_sent
      FROM download_events
     WHERE event_id = ANY (%(event_id)s::uuid[]) AND outcome = 'lost'
), given AS (
    SELECT *
      FROM unnest(
        %(event_id)s::uuid[], %(job_id)s::uuid[], %(user_id)s::text[], %(started_at)s::timestamptz[],
        %(duration_seconds)s::double precision[], %(outcome)s::text[], %(http_status)s::smallint[],
        %(requested)s::int8multirange[], %(received)s::int8multirange[], %(bytes_sent)s::bigint[],
        %(package_size_bytes)s::bigint[], %(request_id)s::text[], %(bytes_acknowledged)s::bigint[],
        %(reason)s::text[], %(method)s::text[], %(daemon_id)s::uuid[], %(is_whole)s::boolean[]
      ) WITH ORDINALITY AS given(
        event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
        bytes_sent, package_size_bytes, request_id, bytes_acknowledged, reason, method, daemon_id, is_whole,
        number
      )
"""
_UNLESS_LOST_BEFORE = """
     WHERE NOT EXISTS (SELECT FROM before)
"""
_INSERT_EVENTS = """
), inserted AS (
    INSERT INTO download_events AS known (
        event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
        bytes_sent, package_size_bytes, request_id, bytes_acknowledged, reason, method, daemon_id
    )
    SELECT event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
           bytes_sent, package_size_bytes, request_id, bytes_acknowledged, reason, method, daemon_id
      FROM given
     ORDER BY event_id
    ON CONFLICT (event_id) DO UPDATE
       SET duration_seconds = excluded.duration_seconds,
           outcome = excluded.outcome,
           received = excluded.received,
           bytes_sent = excluded.bytes_sent,
           bytes_acknowledged = excluded.bytes_acknowledged,
           reason = excluded.reason,
           -- Of a lost one, it stays the time of the last checkpoint.
           updated_at = CASE excluded.outcome WHEN 'lost' THEN known.updated_at ELSE now() END
     -- One that was taken for lost may end after all: its daemon was cut off for long, and not dead.
     WHERE known.outcome IN ('running', 'lost') AND excluded.outcome NOT IN ('running', known.outcome)
    RETURNING event_id, updated_at
), new AS (
    SELECT given.*, updated_at,
           before.event_id IS NOT NULL AS was_lost,
           given.received - coalesce(before.received, '{}') AS received_since,
           given.bytes_sent - coalesce(before.bytes_sent, 0) AS bytes_since,
           -- A lost one has joined with what it had then. Of an empty package, that was nothing.
           is_whole AND (before.event_id IS NULL OR package_size_bytes = 0) AS is_download
      FROM given
      JOIN inserted USING (event_id)
      LEFT JOIN before USING (event_id)
     WHERE EXISTS (SELECT FROM export_jobs AS job WHERE job.job_id = given.job_id)
), event AS (
    SELECT *,
           int8multirange(int8range(0, package_size_bytes)) AS package,
           lower(requested) AS start,
           coalesce(upper(received), lower(requested)) AS known,
           exportd_reach(outcome, requested, bytes_sent) AS reach,
           started_at + make_interval(secs => duration_seconds) AS ended_at,
           row_number() OVER (PARTITION BY job_id, user_id ORDER BY number) AS turn,
           NOT bool_and(is_download) OVER (PARTITION BY job_id, user_id) AS is_joining
      FROM new
)
"""
_JOIN_PROGRESS = """
, principal AS (
    -- Whose deliveries are not all whole: they join what there was before.
    SELECT job_id, user_id,
           coalesce(progress.received, '{}') AS received,
           coalesce(progress.completed_at, '-infinity') AS completed_at,
           progress.job_id IS NOT NULL AS is_known
      FROM (SELECT DISTINCT job_id, user_id FROM event WHERE is_joining) AS joining
      LEFT JOIN download_progress AS progress USING (job_id, user_id)
), late AS (
    SELECT event_id, turn FROM event WHERE was_lost
), pair AS (
    -- A resume and a delivery that broke off before it, up to a byte that it may have reached. At least one
    -- of them is new. The pair joins at the turn of the later one. An event that was recorded as lost is
    -- treated as lost until its turn.
    SELECT resumed.job_id, resumed.user_id, resumed.turn, resumed.start, broken.known,
           least(resumed.ended_at, broken.ended_at) AS ended_at
      FROM event AS resumed
     CROSS JOIN LATERAL (
        SELECT coalesce(upper(old.received), lower(old.requested)) AS known,
               exportd_reach(old.outcome, old.requested, old.bytes_sent) AS reach,
               old.started_at + make_interval(secs => old.duration_seconds) AS ended_at,
               old.event_id, old.outcome, old.daemon_id, old.updated_at
          FROM download_events AS old
         -- Whole rows are compared and sorted by, so that no other index will do.
         WHERE (old.job_id, old.user_id, old.started_at)
                 > (resumed.job_id, resumed.user_id, '-infinity')
           AND (old.job_id, old.user_id, old.started_at)
                 < (resumed.job_id, resumed.user_id, resumed.started_at)
           AND exportd_reach(old.outcome, old.requested, old.bytes_sent)
                 > coalesce(upper(old.received), lower(old.requested))
         ORDER BY old.job_id DESC, old.user_id DESC, old.started_at DESC
         LIMIT 64
     ) AS broken
      LEFT JOIN late ON late.event_id = broken.event_id
     WHERE resumed.start > 0 AND (late.turn IS NULL OR late.turn > resumed.turn)
       AND resumed.start > broken.known AND resumed.start <= broken.reach
       AND (broken.outcome <> 'lost'
            OR broken.daemon_id <> resumed.daemon_id AND broken.updated_at < resumed.started_at)
    UNION ALL
    SELECT broken.job_id, broken.user_id, broken.turn, resumed.start, broken.known,
           least(resumed.ended_at, broken.ended_at)
      FROM event AS broken
     CROSS JOIN LATERAL (
        SELECT lower(old.requested) AS start,
               old.started_at + make_interval(secs => old.duration_seconds) AS ended_at,
               old.event_id, old.started_at, old.daemon_id
          FROM download_events AS old
         WHERE (old.job_id, old.user_id, old.started_at)
                 > (broken.job_id, broken.user_id, broken.started_at)
           AND (old.job_id, old.user_id, old.started_at)
                 < (broken.job_id, broken.user_id, 'infinity')
           AND lower(old.requested) > 0 AND old.outcome <> 'running'
         ORDER BY old.job_id DESC, old.user_id DESC, old.started_at DESC
         LIMIT 64
     ) AS resumed
      LEFT JOIN late ON late.event_id = resumed.event_id
     WHERE broken.reach > broken.known AND (late.turn IS NULL OR late.turn > broken.turn)
       AND resumed.start > broken.known AND resumed.start <= broken.reach
       AND (broken.outcome <> 'lost'
            OR broken.daemon_id <> resumed.daemon_id AND broken.updated_at < resumed.started_at)
    UNION ALL
    SELECT job_id, user_id, greatest(broken.turn, resumed.turn), resumed.start, broken.known,
           least(resumed.ended_at, broken.ended_at)
      FROM event AS broken
      JOIN event AS resumed USING (job_id, user_id)
     WHERE broken.started_at < resumed.started_at
       AND resumed.start > broken.known AND resumed.start <= broken.reach
       AND (broken.outcome <> 'lost'
            OR broken.daemon_id <> resumed.daemon_id AND broken.updated_at < resumed.started_at)
), gap AS MATERIALIZED (
    SELECT job_id, user_id, turn,
           array_agg(start) AS starts, array_agg(known) AS knowns, array_agg(ended_at) AS ends
      FROM pair
     GROUP BY 1, 2, 3
), step AS MATERIALIZED (
    SELECT job_id, user_id, turn, received_since, package, is_download AS is_whole, starts, knowns, ends,
           -- How long a lost one went on, nobody knows.
           CASE outcome WHEN 'lost' THEN now() ELSE ended_at END AS ended_at
      FROM event
      LEFT JOIN gap USING (job_id, user_id, turn)
     WHERE is_joining
), joined AS (
    -- One after the other. Once the package was whole, what ended before is over: a whole delivery notes that
    -- where there is something to clear.
    SELECT job_id, user_id, 0::bigint AS turn, received, 0 AS downloads, is_known, completed_at
      FROM principal
    UNION ALL
    SELECT job_id, user_id, step.turn,
           CASE WHEN is_download THEN '{}' ELSE total END,
           downloads + is_download::integer,
           is_known OR NOT is_whole AND NOT isempty(total),
           CASE
               WHEN is_download AND (is_known OR NOT is_whole) THEN greatest(completed_at, step.ended_at)
               ELSE completed_at
           END
      FROM joined
      JOIN step USING (job_id, user_id)
     CROSS JOIN LATERAL (
        SELECT joined.received + step.received_since
                 + coalesce(range_agg(int8range(nearest.known, nearest.start)), '{}') AS total
          FROM (
            SELECT gap.start, max(gap.known) AS known
              FROM unnest(starts, knowns, ends) AS gap(start, known, ended_at)
             WHERE gap.ended_at > joined.completed_at AND NOT joined.received @> gap.start - 1
             GROUP BY gap.start
          ) AS nearest
     ) AS sum
     CROSS JOIN LATERAL (
        SELECT is_whole OR (total @> package AND NOT isempty(package)) AS is_download
     ) AS judged
     WHERE step.turn = joined.turn + 1
), result AS (
    SELECT DISTINCT ON (job_id, user_id) job_id, user_id, received, downloads, completed_at
      FROM joined
     ORDER BY job_id, user_id, turn DESC
), progressed AS (
    INSERT INTO download_progress AS progress (job_id, user_id, received, completed_at)
    SELECT job_id, user_id,
           (SELECT coalesce(range_agg(part), '{}')
              FROM (
                SELECT part
                  FROM unnest(result.received) AS part
                 ORDER BY upper(part) - lower(part) DESC
                 LIMIT 500
              ) AS largest),
           result.completed_at
      FROM result
      JOIN principal USING (job_id, user_id)
     WHERE result.completed_at <> principal.completed_at OR result.received <> principal.received
    ON CONFLICT (job_id, user_id) DO UPDATE
       SET received = excluded.received, completed_at = excluded.completed_at, updated_at = now()
)
"""
_JOIN_NOTHING = """
, result AS (SELECT job_id, 0 AS downloads FROM event LIMIT 0)
"""
_COUNT = """
, cleared AS (
    UPDATE download_progress AS progress
       SET received = '{}', completed_at = greatest(progress.completed_at, last.ended_at), updated_at = now()
      FROM (
        SELECT job_id, user_id, max(ended_at) AS ended_at FROM event WHERE NOT is_joining GROUP BY 1, 2
      ) AS last
     WHERE progress.job_id = last.job_id AND progress.user_id = last.user_id
), counted AS (
    SELECT job_id, sum(downloads) AS downloads
      FROM (
        SELECT job_id, 1 AS downloads FROM event WHERE NOT is_joining
        UNION ALL
        SELECT job_id, downloads FROM result
      ) AS each
     GROUP BY job_id
), served AS (
    SELECT job_id, sum(bytes_since) AS bytes, bool_or(outcome = 'changed') AS is_suspect
      FROM event
     GROUP BY job_id
)
UPDATE export_jobs AS job
   SET bytes_served = coalesce(job.bytes_served, 0) + served.bytes,
       download_count = coalesce(job.download_count, 0) + counted.downloads,
       last_downloaded_at = CASE WHEN counted.downloads > 0 THEN now() ELSE job.last_downloaded_at END,
       package_suspect_since = CASE
           WHEN served.is_suspect THEN coalesce(job.package_suspect_since, now())
           ELSE job.package_suspect_since
       END
  FROM counted
  JOIN served USING (job_id)
 WHERE job.job_id = counted.job_id
RETURNING job.job_id
"""

RECORD_DOWNLOADS = _GIVEN + _INSERT_EVENTS + _JOIN_PROGRESS + _COUNT
# Mostly there is no progress to join, and planning that would cost more than the rest. Skips deliveries that
# were taken for lost, because their bytes must join.
RECORD_WHOLE = _GIVEN + _UNLESS_LOST_BEFORE + _INSERT_EVENTS + _JOIN_NOTHING + _COUNT

# In small batches, so that no statement waits for a lock. Locked rows are left for the next run.
_PRUNE_EVENTS = """
WITH old AS (
    SELECT event_id
      FROM download_events
     WHERE started_at < now() - make_interval(days => %s) AND outcome <> 'running'
     ORDER BY started_at
     LIMIT %s
       FOR UPDATE SKIP LOCKED
), pruned AS (
    DELETE FROM download_events USING old WHERE download_events.event_id = old.event_id RETURNING 1
)
SELECT count(*) AS pruned FROM pruned
"""
_PRUNED_AT_ONCE = 5000


async def record_downloads(database: Database, events: Sequence[DownloadEvent]) -> None:
    """Records finished deliveries and counts them, one after the other, in one transaction. Each id occurs
    once.

    Idempotent by ``event_id``. Raises DatabaseError.
    """
    if events:
        columns = columns_of(events)
        columns["is_whole"] = [event.is_whole for event in events]
        is_done = False
        if all(columns["is_whole"]):
            is_done = bool(await database.fetch_all(_LOCK_JOBS + RECORD_WHOLE, columns))
        if not is_done:
            # If all of them were recorded before, this costs a statement and changes nothing.
            await database.fetch_all(_LOCK_JOBS + RECORD_DOWNLOADS, columns)


async def prune_events(database: Database, event_days: int) -> int:
    """Deletes events of deliveries that began more than ``event_days`` ago, and returns their number. Counts
    and progress stay. Raises DatabaseUnavailable.
    """
    total = 0
    while True:
        row = await database.fetch_one(_PRUNE_EVENTS, (event_days, _PRUNED_AT_ONCE))
        assert row is not None
        pruned: int = row.pruned
        total += pruned
        if pruned < _PRUNED_AT_ONCE:
            return total


def columns_of(events: Sequence[DownloadEvent]) -> dict[str, list[object]]:
    """The events as parameters: an array for each column."""
    columns: dict[str, list[object]] = {
        name: [getattr(event, name) for event in events] for name in DownloadEvent.__slots__
    }
    for name in ("requested", "received"):
        columns[name] = [_multirange(getattr(event, name)) for event in events]
    return columns


def _multirange(parts: Sequence[tuple[int, int]]) -> str:
    return "{" + ",".join(f"[{start},{stop})" for start, stop in parts) + "}"

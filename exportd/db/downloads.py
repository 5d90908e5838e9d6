"""Deliveries in SQL: each is one event, and a download is counted when one principal has received every byte
of the package, in one delivery or in several that together cover it.

The rule, event by event and principal by principal: what was received (acknowledged by the client's side)
joins the principal's progress; when that covers the package, the count goes up by one and the progress is
cleared. A statement takes, for each principal and job, either one partial delivery or any number of whole
ones (``one_statement`` judges), so that writing together counts as writing one after the other. Everything is
idempotent by the event's id.

A delivery that runs is an event too, ``running``; it joins no progress, because it is not known where it will
end. When its daemon is killed it is recorded as ``lost``, with what was acknowledged by the last checkpoint.

A client may have more than was acknowledged when its delivery broke off: acknowledgements were on their way,
or the daemon was killed. It says how much when it goes on: where the same principal asks for a range that
begins behind what was acknowledged and not beyond what was sent (after a kill: what was asked for), it has
what lies between.

A delivery that ended because the package was written to (outcome ``changed``) marks the job as suspect: no
download of it starts again until somebody has looked at it.
"""

import re
from collections.abc import Callable, Sequence
from uuid import UUID

from exportd.db.pool import Database, Session
from exportd.db.rows import DownloadEvent

# Idempotent by event_id: everything after the first step sees only the events that this statement inserted.
# Job rows are locked in one order, so that two daemons never wait for each other.
_RECORD_DOWNLOADS = """
WITH given AS (
    SELECT *
      FROM unnest(
        %(event_id)s::uuid[], %(job_id)s::uuid[], %(user_id)s::text[], %(started_at)s::timestamptz[],
        %(duration_seconds)s::double precision[], %(outcome)s::text[], %(http_status)s::smallint[],
        %(requested)s::int8multirange[], %(received)s::int8multirange[], %(bytes_sent)s::bigint[],
        %(package_size_bytes)s::bigint[], %(request_id)s::text[], %(bytes_acknowledged)s::bigint[],
        %(reason)s::text[], %(method)s::text[], %(daemon_id)s::uuid[], %(is_whole)s::boolean[]
      ) AS given(
        event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
        bytes_sent, package_size_bytes, request_id, bytes_acknowledged, reason, method, daemon_id, is_whole
      )
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
    RETURNING event_id
), locked AS (
    SELECT job_id
      FROM export_jobs
     WHERE job_id = ANY (%(job_id)s::uuid[])
     ORDER BY job_id
       FOR NO KEY UPDATE
), event AS (
    SELECT given.*, int8multirange(int8range(0, package_size_bytes)) AS package
      FROM given
      JOIN inserted USING (event_id)
      JOIN locked USING (job_id)
), delivery AS (
    -- What the principals of partial deliveries had before, and these. One that broke off may have brought
    -- more than was acknowledged, up to its reach: what was sent or, after a kill, what was asked for.
    SELECT *,
           CASE
               WHEN requested <> int8multirange(int8range(lower(requested), upper(requested))) THEN NULL
               WHEN outcome = 'aborted' THEN lower(requested) + bytes_sent
               WHEN outcome = 'lost' THEN upper(requested) - 1
           END AS reach
      FROM (
        SELECT job_id, user_id, started_at, outcome, requested, received, bytes_sent, daemon_id,
               now() AS updated_at
          FROM event
         WHERE NOT is_whole
        UNION ALL
        SELECT old.job_id, old.user_id, old.started_at, old.outcome, old.requested, old.received,
               old.bytes_sent, old.daemon_id, old.updated_at
          FROM download_events AS old
          JOIN event ON old.job_id = event.job_id AND old.user_id = event.user_id
         WHERE NOT event.is_whole AND old.event_id <> event.event_id AND old.outcome <> 'running'
      ) AS both_of_them
), progressed AS (
    INSERT INTO download_progress AS progress (job_id, user_id, received, completed_at)
    SELECT job_id, user_id,
           CASE WHEN received @> package THEN '{}' ELSE received END,
           CASE WHEN received @> package THEN now() ELSE '-infinity' END
      FROM event
     WHERE NOT is_whole AND NOT isempty(received)
    ON CONFLICT (job_id, user_id) DO UPDATE
       SET (received, completed_at, updated_at) = (
               SELECT CASE WHEN total @> package THEN '{}' ELSE total END,
                      CASE WHEN total @> package THEN now() ELSE progress.completed_at END,
                      now()
                 FROM (
                   SELECT package, progress.received + event.received + reached AS total
                     FROM event,
                          LATERAL (
                              SELECT coalesce(range_agg(int8range(known, start)), '{}')
                                FROM (
                                  -- For each byte at which one began, the nearest that broke off before it.
                                  SELECT lower(resumed.requested) AS start,
                                         max(upper(broken.received)) AS known
                                    FROM delivery AS resumed
                                    JOIN delivery AS broken
                                      ON upper(broken.received) <= lower(resumed.requested)
                                     AND lower(resumed.requested) <= broken.reach
                                     AND CASE broken.outcome
                                             WHEN 'lost' THEN broken.daemon_id <> resumed.daemon_id
                                                              AND broken.updated_at < resumed.started_at
                                             ELSE broken.started_at < resumed.started_at
                                         END
                                   WHERE resumed.job_id = progress.job_id
                                     AND resumed.user_id = progress.user_id
                                     AND resumed.started_at > progress.completed_at
                                     AND broken.job_id = progress.job_id
                                     AND broken.user_id = progress.user_id
                                     AND broken.started_at > progress.completed_at
                                   GROUP BY 1
                                ) AS pairs
                               WHERE known < start
                          ) AS resumed(reached)
                    WHERE event.job_id = progress.job_id AND event.user_id = progress.user_id
                      AND NOT is_whole
                 ) AS sums
           )
    RETURNING job_id, isempty(received) AS became_whole
), cleared AS (
    UPDATE download_progress AS progress
       SET received = '{}', completed_at = now(), updated_at = now()
      FROM event
     WHERE event.is_whole AND progress.job_id = event.job_id AND progress.user_id = event.user_id
), counted AS (
    SELECT job_id, sum(downloads) AS downloads
      FROM (
        SELECT job_id, is_whole::integer AS downloads FROM event
        UNION ALL
        SELECT job_id, became_whole::integer FROM progressed
      ) AS each
     GROUP BY job_id
), served AS (
    SELECT job_id, sum(bytes_sent) AS bytes, bool_or(outcome = 'changed') AS is_suspect
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
"""

# A delivery under way, as far as it is. One that has ended is left alone.
_CHECKPOINT_DOWNLOADS = """
INSERT INTO download_events AS known (
    event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
    bytes_sent, package_size_bytes, request_id, bytes_acknowledged, reason, method, daemon_id
)
SELECT *
  FROM unnest(
    %(event_id)s::uuid[], %(job_id)s::uuid[], %(user_id)s::text[], %(started_at)s::timestamptz[],
    %(duration_seconds)s::double precision[], %(outcome)s::text[], %(http_status)s::smallint[],
    %(requested)s::int8multirange[], %(received)s::int8multirange[], %(bytes_sent)s::bigint[],
    %(package_size_bytes)s::bigint[], %(request_id)s::text[], %(bytes_acknowledged)s::bigint[],
    %(reason)s::text[], %(method)s::text[], %(daemon_id)s::uuid[]
  )
 ORDER BY 1
ON CONFLICT (event_id) DO UPDATE
   SET duration_seconds = excluded.duration_seconds,
       received = excluded.received,
       bytes_sent = excluded.bytes_sent,
       bytes_acknowledged = excluded.bytes_acknowledged,
       updated_at = now()
 WHERE known.outcome = 'running'
"""

_FIND_RUNNING = """
SELECT event_id, job_id, user_id, started_at, duration_seconds, http_status, requested::text, received::text,
       bytes_sent, package_size_bytes, request_id, bytes_acknowledged, method, daemon_id
  FROM download_events
 WHERE outcome = 'running'
   AND (daemon_id = ANY (%s::uuid[]) OR updated_at < now() - make_interval(secs => %s))
"""

# In small bites, so that nobody waits for a lock; a row that somebody writes is left for the next time.
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
SELECT count(*) FROM pruned
"""
_PRUNED_AT_ONCE = 5000

LARGEST_GROUP = 500


def one_statement() -> Callable[[DownloadEvent], bool]:
    """Judges which events one statement may take, by the module's rule, and keeps each principal's order."""
    taken: set[UUID] = set()
    whole: set[tuple[UUID, str]] = set()
    partial: set[tuple[UUID, str]] = set()
    # Whoever has an event that must wait: what comes later must not overtake it.
    behind: set[tuple[UUID, str]] = set()

    def may_join(event: DownloadEvent) -> bool:
        principal = (event.job_id, event.user_id)
        is_apart = principal in partial or (principal in whole and not event.is_whole)
        if is_apart or principal in behind or event.event_id in taken or len(taken) == LARGEST_GROUP:
            behind.add(principal)
            return False
        (whole if event.is_whole else partial).add(principal)
        taken.add(event.event_id)
        return True

    return may_join


async def record_downloads(database: Database, events: Sequence[DownloadEvent]) -> None:
    """Writes events that have ended and counts them, in one statement. They must keep the module's rule.

    Idempotent by ``event_id``. Raises DatabaseUnavailable.
    """
    if events:
        columns = _columns(events)
        columns["is_whole"] = [event.is_whole for event in events]
        await database.fetch_all(_RECORD_DOWNLOADS, columns)


async def checkpoint_downloads(database: Database | Session, events: Sequence[DownloadEvent]) -> None:
    """Writes how far deliveries are that run; one that has ended stays as it ended.

    Raises DatabaseUnavailable.
    """
    latest = {event.event_id: event for event in events}
    if latest:
        await database.fetch_all(_CHECKPOINT_DOWNLOADS, _columns(list(latest.values())))


async def find_lost(
    database: Database, ended: Sequence[UUID], lost_after_seconds: float
) -> list[DownloadEvent]:
    """The deliveries that the daemons ``ended`` left running, and those that nobody has touched for long.

    As events to record, outcome ``lost``. Raises DatabaseUnavailable.
    """
    rows = await database.fetch_all(_FIND_RUNNING, (list(ended), lost_after_seconds))
    return [
        DownloadEvent(
            event_id=row[0],
            job_id=row[1],
            user_id=row[2],
            started_at=row[3],
            duration_seconds=row[4],
            outcome="lost",
            http_status=row[5],
            requested=_parse_multirange(row[6]),
            received=_parse_multirange(row[7]),
            bytes_sent=row[8],
            package_size_bytes=row[9],
            request_id=row[10],
            bytes_acknowledged=row[11],
            reason="the daemon was killed",
            method=row[12],
            daemon_id=row[13],
        )
        for row in rows
    ]


async def prune_events(database: Database, event_days: int) -> int:
    """Deletes the events of deliveries that began more than so many days ago, and returns how many.

    Counts and progress stay. Raises DatabaseUnavailable.
    """
    total = 0
    while True:
        row = await database.fetch_one(_PRUNE_EVENTS, (event_days, _PRUNED_AT_ONCE))
        assert row is not None
        pruned: int = row[0]
        total += pruned
        if pruned < _PRUNED_AT_ONCE:
            return total


def _columns(events: Sequence[DownloadEvent]) -> dict[str, list[object]]:
    columns: dict[str, list[object]] = {
        name: [getattr(event, name) for event in events] for name in DownloadEvent.__slots__
    }
    for name in ("requested", "received"):
        columns[name] = [_multirange(getattr(event, name)) for event in events]
    return columns


def _multirange(parts: Sequence[tuple[int, int]]) -> str:
    return "{" + ",".join(f"[{start},{stop})" for start, stop in parts) + "}"


def _parse_multirange(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(stop)) for start, stop in re.findall(r"\[(\d+),(\d+)\)", text))

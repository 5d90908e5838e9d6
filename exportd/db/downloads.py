"""The ledger of downloads: each delivery is one event, and a download is counted when one principal has
received every byte of the package, in one delivery or in several that together cover it.

Events that come in together are written together, in one statement and so one transaction: a thousand
downloads of one hot package must not queue on its row. A lone event goes at once.

A delivery that ended because the package was written to (outcome ``changed``) marks the job as suspect: no
download of it starts again until somebody has looked at it.

The rule, event by event and principal by principal: what was received joins the principal's progress; when
that covers the package, the count goes up by one and the progress is cleared. A statement takes, for each
principal and job, either one partial delivery or any number of whole ones, so that writing together counts
as writing one after the other.
"""

import asyncio
from collections.abc import Callable, Sequence
from uuid import UUID

from exportd.db.gather import Gatherer
from exportd.db.pool import Database
from exportd.db.rows import DownloadEvent

# Idempotent by event_id: everything after the first step sees only the events that this statement inserted.
# Job rows are locked in one order, so that two daemons never wait for each other.
_RECORD_DOWNLOADS = """
WITH given AS (
    SELECT *
      FROM unnest(
        %(event_id)s::uuid[], %(job_id)s::uuid[], %(user_id)s::text[], %(started_at)s::timestamptz[],
        %(duration_seconds)s::double precision[], %(outcome)s::text[], %(http_status)s::smallint[],
        %(requested)s::text[], %(received)s::text[], %(bytes_sent)s::bigint[],
        %(package_size_bytes)s::bigint[], %(request_id)s::text[], %(is_whole)s::boolean[]
      ) AS given(
        event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
        bytes_sent, package_size_bytes, request_id, is_whole
      )
), inserted AS (
    INSERT INTO download_events (
        event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
        bytes_sent, package_size_bytes, request_id
    )
    SELECT event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status,
           requested::int8multirange, received::int8multirange, bytes_sent, package_size_bytes, request_id
      FROM given
    ON CONFLICT (event_id) DO NOTHING
    RETURNING event_id
), locked AS (
    SELECT job_id
      FROM export_jobs
     WHERE job_id = ANY (%(job_id)s::uuid[])
     ORDER BY job_id
       FOR NO KEY UPDATE
), event AS (
    SELECT given.*
      FROM given
      JOIN inserted USING (event_id)
      JOIN locked USING (job_id)
), progressed AS (
    INSERT INTO download_progress AS progress (job_id, user_id, received)
    SELECT job_id, user_id, received::int8multirange
      FROM event
     WHERE NOT is_whole AND received <> '{}'
    ON CONFLICT (job_id, user_id) DO UPDATE
       SET updated_at = now(),
           received = CASE
               WHEN progress.received + excluded.received @> (
                   SELECT int8multirange(int8range(0, package_size_bytes))
                     FROM event
                    WHERE event.job_id = progress.job_id AND event.user_id = progress.user_id
               )
               THEN '{}'
               ELSE progress.received + excluded.received
           END
    RETURNING job_id, isempty(received) AS became_whole
), cleared AS (
    UPDATE download_progress AS progress
       SET received = '{}', updated_at = now()
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

_LARGEST_GROUP = 500


class DownloadLedger:
    """Writes events, those that come in together as one statement. One statement is under way at a time."""

    def __init__(self, database: Database) -> None:
        async def write(events: list[DownloadEvent]) -> list[None]:
            await record_downloads(database, events)
            return [None] * len(events)

        self._gatherer = Gatherer(write, _one_statement, at_once=1)

    def record(self, event: DownloadEvent) -> asyncio.Future[None]:
        """Done once the event is durable; fails with DatabaseUnavailable. Idempotent by the event's id."""
        return self._gatherer.submit(event)


def _one_statement() -> Callable[[DownloadEvent], bool]:
    """Judges which events one statement may take, by the module's rule; each principal's order is kept."""
    taken = 0
    whole: set[tuple[UUID, str]] = set()
    partial: set[tuple[UUID, str]] = set()
    # Whoever has an event that must wait: what comes later must not overtake it.
    behind: set[tuple[UUID, str]] = set()

    def may_join(event: DownloadEvent) -> bool:
        nonlocal taken
        principal = (event.job_id, event.user_id)
        is_apart = principal in partial or (principal in whole and not event.is_whole)
        if is_apart or principal in behind or taken == _LARGEST_GROUP:
            behind.add(principal)
            return False
        (whole if event.is_whole else partial).add(principal)
        taken += 1
        return True

    return may_join


async def record_downloads(database: Database, events: Sequence[DownloadEvent]) -> None:
    """Writes events and counts them, in one statement. They must keep the module's rule.

    Idempotent by ``event_id``. Raises DatabaseUnavailable.
    """
    await database.fetch_all(
        _RECORD_DOWNLOADS,
        {
            "event_id": [event.event_id for event in events],
            "job_id": [event.job_id for event in events],
            "user_id": [event.user_id for event in events],
            "started_at": [event.started_at for event in events],
            "duration_seconds": [event.duration_seconds for event in events],
            "outcome": [event.outcome for event in events],
            "http_status": [event.http_status for event in events],
            "requested": [_multirange(event.requested) for event in events],
            "received": [_multirange(event.received) for event in events],
            "bytes_sent": [event.bytes_sent for event in events],
            "package_size_bytes": [event.package_size_bytes for event in events],
            "request_id": [event.request_id for event in events],
            "is_whole": [event.is_whole for event in events],
        },
    )


def _multirange(parts: Sequence[tuple[int, int]]) -> str:
    return "{" + ",".join(f"[{start},{stop})" for start, stop in parts) + "}"

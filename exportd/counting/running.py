"""Running deliveries, in SQL: their checkpoints, and those whose daemon was killed."""

import re
from collections.abc import Sequence
from uuid import UUID

from exportd.counting.record import columns_of
from exportd.db.pool import Database, Session
from exportd.db.rows import read
from exportd.domain.delivery import DownloadEvent, Method, Outcome

# Writes the progress of a running delivery. Does not touch one that has ended.
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


async def checkpoint_downloads(database: Database | Session, events: Sequence[DownloadEvent]) -> None:
    """Writes checkpoints of running deliveries. Does not touch those that have ended.

    Raises DatabaseUnavailable.
    """
    latest = {event.event_id: event for event in events}
    if latest:
        await database.fetch_all(_CHECKPOINT_DOWNLOADS, columns_of(list(latest.values())))


async def find_lost(
    database: Database, ended: Sequence[UUID], lost_after_seconds: float
) -> list[DownloadEvent]:
    """Returns the running deliveries of the daemons ``ended``, and those without a checkpoint for long, as
    events with outcome ``lost``.

    Raises DatabaseUnavailable.
    """
    rows = await database.fetch_all(_FIND_RUNNING, (list(ended), lost_after_seconds))
    return [
        read(
            DownloadEvent,
            row,
            outcome=Outcome.LOST,
            requested=_parse_multirange(row.requested),
            received=_parse_multirange(row.received),
            reason="the daemon was killed",
            method=row.method and Method(row.method),
        )
        for row in rows
    ]


def _parse_multirange(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(start), int(stop)) for start, stop in re.findall(r"\[(\d+),(\d+)\)", text))

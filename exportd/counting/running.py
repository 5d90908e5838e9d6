"""Running deliveries, in SQL: their checkpoints, and those whose daemon was killed."""

from collections.abc import Sequence
from typing import Any
from uuid import UUID

from exportd.counting.rows import EVENT_COLUMNS, parse_multirange, to_json, to_row
from exportd.db.pool import Database, Session
from exportd.db.rows import read
from exportd.domain.delivery import DownloadEvent, Outcome, first_bytes

# Does not touch a delivery that has ended, or was taken for lost.
_WRITE_RUNNING = f"""
INSERT INTO exportd_running (
    event_id, job_id, user_id, daemon_id, started_at, http_status, requested, package_size_bytes,
    package_sha256, request_id, bytes_acknowledged, bytes_sent, duration_seconds
)
SELECT event_id, job_id, user_id, daemon_id, started_at, http_status, requested, package_size_bytes,
       package_sha256, request_id, bytes_acknowledged, bytes_sent, duration_seconds
  FROM json_to_recordset(%(events)s) AS given({EVENT_COLUMNS})
 WHERE NOT EXISTS (SELECT FROM download_events AS ended WHERE ended.event_id = given.event_id)
 ORDER BY event_id
ON CONFLICT (event_id) DO UPDATE
   SET bytes_acknowledged = excluded.bytes_acknowledged, bytes_sent = excluded.bytes_sent,
       duration_seconds = excluded.duration_seconds, seen_at = now()
"""

# The duration is up to the last checkpoint. It may have been spooled, and a daemon's clock may drift.
_FIND_LOST = """
SELECT event_id, job_id, user_id, daemon_id, started_at, http_status, requested, package_size_bytes,
       package_sha256, request_id, bytes_acknowledged, bytes_sent,
       least(duration_seconds, extract(epoch FROM seen_at - started_at))::double precision AS duration_seconds
  FROM exportd_running
 WHERE daemon_id = ANY (%s::uuid[]) OR seen_at < now() - make_interval(secs => %s)
"""


async def write_running(database: Database | Session, events: Sequence[DownloadEvent]) -> None:
    """Writes checkpoints of running deliveries. Does not touch those that have ended.

    Raises DatabaseError.
    """
    latest = {event.event_id: event for event in events}
    if latest:
        await database.fetch_all(_WRITE_RUNNING, {"events": to_json(map(to_row, latest.values()))})


async def find_lost(
    database: Database, ended: Sequence[UUID], lost_after_seconds: float
) -> list[DownloadEvent]:
    """Returns the running deliveries of the daemons ``ended``, and those without a checkpoint for long, as
    events with outcome ``lost``.

    Raises DatabaseUnavailable.
    """
    rows = await database.fetch_all(_FIND_LOST, (list(ended), lost_after_seconds))
    return [_lost(row) for row in rows]


def _lost(row: Any) -> DownloadEvent:
    requested = parse_multirange(row.requested)
    return read(
        DownloadEvent,
        row,
        outcome=Outcome.LOST,
        requested=requested,
        received=first_bytes(requested, row.bytes_acknowledged),
        reason="the daemon was killed",
        method=None,
    )

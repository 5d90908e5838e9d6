"""The ledger of downloads in SQL: one event for each delivery, counted once however often it is written."""

from exportd.db.pool import Database
from exportd.db.rows import DownloadEvent

# The update sees the event only if this statement inserted it, so a retry changes nothing.
_RECORD_DOWNLOAD = """
WITH event AS (
    INSERT INTO download_events (
        event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, bytes_sent,
        package_size_bytes, request_id
    )
    VALUES (
        %(event_id)s, %(job_id)s, %(user_id)s, %(started_at)s, %(duration_seconds)s, %(outcome)s,
        %(http_status)s, %(requested)s::int8multirange, %(bytes_sent)s, %(package_size_bytes)s, %(request_id)s
    )
    ON CONFLICT (event_id) DO NOTHING
    RETURNING job_id, bytes_sent, %(is_whole)s::boolean AS is_whole
)
UPDATE export_jobs AS job
   SET bytes_served = coalesce(job.bytes_served, 0) + event.bytes_sent,
       download_count = coalesce(job.download_count, 0) + event.is_whole::integer,
       last_downloaded_at = CASE WHEN event.is_whole THEN now() ELSE job.last_downloaded_at END
  FROM event
 WHERE job.job_id = event.job_id
"""


async def record_download(database: Database, event: DownloadEvent) -> None:
    """Writes one delivery and counts it, in one statement and so in one transaction.

    Idempotent by ``event_id``. Raises DatabaseUnavailable.
    """
    await database.fetch_all(
        _RECORD_DOWNLOAD,
        {
            "event_id": event.event_id,
            "job_id": event.job_id,
            "user_id": event.user_id,
            "started_at": event.started_at,
            "duration_seconds": event.duration_seconds,
            "outcome": event.outcome,
            "http_status": event.http_status,
            "requested": "{" + ",".join(f"[{start},{stop})" for start, stop in event.requested) + "}",
            "bytes_sent": event.bytes_sent,
            "package_size_bytes": event.package_size_bytes,
            "request_id": event.request_id,
            "is_whole": event.is_whole,
        },
    )

"""What the cleanup does for counting, in SQL: late jobs, old events, and progress that is of no use."""

from uuid import UUID

from exportd.counting.record import record_downloads
from exportd.counting.rows import EVENT_NAMES, event_of_row
from exportd.db.jobs import PACKAGE_SHA256
from exportd.db.pool import Database

_FIND_JUDGEABLE = f"""
SELECT {EVENT_NAMES}
  FROM download_events AS event
 WHERE NOT is_judged AND event_id > %s
   AND EXISTS (SELECT FROM export_jobs AS job WHERE job.job_id = event.job_id)
 ORDER BY event_id
 LIMIT %s
"""
_JUDGED_AT_ONCE = 500

# In small batches, so that no statement waits for a lock. Locked rows are left for the next run.
_PRUNE_EVENTS = """
WITH old AS (
    SELECT event_id
      FROM download_events
     WHERE started_at < now() - make_interval(days => %s)
     ORDER BY started_at
     LIMIT %s
       FOR UPDATE SKIP LOCKED
), pruned AS (
    DELETE FROM download_events USING old WHERE download_events.event_id = old.event_id RETURNING 1
)
SELECT count(*) AS pruned FROM pruned
"""
_PRUNED_AT_ONCE = 5000

# Progress with packages that cannot be downloaded any more.
_PRUNE_PROGRESS = f"""
DELETE FROM download_progress AS progress
 WHERE updated_at < now() - interval '1 day'
   AND NOT EXISTS (
        SELECT FROM export_jobs AS job
         WHERE job.job_id = progress.job_id AND package_path IS NOT NULL
           AND coalesce(job.package_size_bytes, progress.package_size_bytes) = progress.package_size_bytes
           AND coalesce({PACKAGE_SHA256}, '') = progress.package_sha256
   )
"""


async def judge_late_jobs(database: Database) -> None:
    """Counts the recorded deliveries of jobs whose rows came later. Raises DatabaseError."""
    after = UUID(int=0)
    while rows := await database.fetch_all(_FIND_JUDGEABLE, (after, _JUDGED_AT_ONCE)):
        after = rows[-1].event_id
        await record_downloads(database, [event_of_row(row) for row in rows])


async def prune(database: Database, event_days: int) -> int:
    """Deletes progress that is of no use, and events of deliveries that began more than ``event_days`` ago;
    0 keeps events for ever. Returns the number of events. Counts stay. Raises DatabaseUnavailable.
    """
    await database.fetch_all(_PRUNE_PROGRESS)
    total = 0
    while event_days:
        row = await database.fetch_one(_PRUNE_EVENTS, (event_days, _PRUNED_AT_ONCE))
        assert row is not None
        pruned: int = row.pruned
        total += pruned
        if pruned < _PRUNED_AT_ONCE:
            break
    return total

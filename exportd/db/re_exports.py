"""Re-exports, in SQL: all jobs of one export, and a new job for it."""

from uuid import UUID

from exportd.db.job_details import FIND_JOBS, JobDetails, details_of
from exportd.db.packing import CHANNEL
from exportd.db.pool import Session

# Follows re_export_of in both directions. UNION ends a cycle, which an application's own table may hold.
FIND_FAMILY = """
WITH RECURSIVE family (job_id, re_export_of) AS (
    SELECT job_id, re_export_of FROM export_jobs WHERE job_id = %s
    UNION
    SELECT job.job_id, job.re_export_of
      FROM family
      JOIN export_jobs AS job ON job.job_id = family.re_export_of OR job.re_export_of = family.job_id
)
SELECT job_id FROM family
"""
COUNT_WAITING = """
SELECT count(*) AS waiting
  FROM export_jobs
 WHERE user_id::text = %s AND status::text IN ('pending', 'processing') AND re_export_of IS NOT NULL
"""
_EXPORT_AGAIN = """
INSERT INTO export_jobs (
    job_id, user_id, status, tool_data, created_at, package_retention_days, pack_source, re_export_of
)
SELECT %s, user_id, 'pending', tool_data, now(), package_retention_days, pack_source, job_id
  FROM export_jobs
 WHERE job_id = %s
"""


async def lock_re_exports(session: Session, user_id: str) -> None:
    """Serialises the re-exports of a user's jobs until the session's transaction ends. Raises
    DatabaseUnavailable."""
    await session.fetch_all(
        "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", (f"exportd re-exports of {user_id}",)
    )


async def find_family(session: Session, job_id: UUID) -> list[JobDetails]:
    """Returns all jobs of the export that the job belongs to, newest first. Raises DatabaseUnavailable."""
    family = [row.job_id for row in await session.fetch_all(FIND_FAMILY, (job_id,))]
    found = [details_of(row) for row in await session.fetch_all(FIND_JOBS, (family,))]
    # A job without a time, in an application's own table, counts as the oldest.
    return sorted(found, key=lambda job: job.created_at.timestamp() if job.created_at else 0.0, reverse=True)


async def count_waiting_re_exports(session: Session, user_id: str) -> int:
    """The number of the user's re-exports that wait or run. Raises DatabaseUnavailable."""
    row = await session.fetch_one(COUNT_WAITING, (user_id,))
    assert row is not None
    number: int = row.waiting
    return number


async def export_again(session: Session, job_id: UUID, new_id: UUID) -> JobDetails:
    """Records a job that exports the same again, and notifies the packers.

    Raises DatabaseUnavailable, and DatabaseRefused if the application's own table requires more columns.
    """
    await session.fetch_all(_EXPORT_AGAIN, (new_id, job_id))
    await session.fetch_all("SELECT pg_notify(%s, %s)", (CHANNEL, str(new_id)))
    rows = await session.fetch_all(FIND_JOBS, ([new_id],))
    return details_of(rows[0])

"""Statistics of downloads, in SQL: of one job, or of all.

Counts, times and bytes come from the jobs' rows, everything else from the events.
"""

from collections.abc import Sequence
from uuid import UUID

from exportd.db.pool import Database
from exportd.db.rows import read, sum_of
from exportd.domain.statistics import DeliverySummary, DownloadStatistics, FailureCount, SizeSummary

_RECENT_EVENTS = 20

_FIND_JOB = """
SELECT coalesce(user_id::text, '') AS user_id,
       coalesce(download_count, 0)::bigint AS download_count,
       last_downloaded_at::timestamptz,
       coalesce(bytes_served, 0)::bigint AS bytes_served
  FROM export_jobs
 WHERE job_id = %(job_id)s
"""

_SUM_JOBS = f"""
SELECT NULL::text AS user_id,
       {sum_of("download_count")} AS download_count,
       max(last_downloaded_at)::timestamptz AS last_downloaded_at,
       {sum_of("bytes_served")} AS bytes_served
  FROM export_jobs
"""  # noqa: S608  # constants only

# psycopg2 inserts the parameter as a literal, so the planner sees whether there is a job id.

_COUNT_USERS = """
SELECT count(DISTINCT user_id) AS users
  FROM download_events
 WHERE (%(job_id)s::uuid IS NULL OR job_id = %(job_id)s::uuid) AND outcome = 'completed'
"""

# Only downloads in one delivery. The duration of a part would say little.
_SUM_BY_SIZE = """
SELECT width_bucket(package_size_bytes, %(bounds)s::bigint[]) AS range_number,
       count(*) AS downloads,
       avg(duration_seconds)::double precision AS average_duration_seconds,
       (sum(bytes_sent) / greatest(sum(duration_seconds), 1e-6))::double precision AS average_bytes_per_second
  FROM download_events
 WHERE (%(job_id)s::uuid IS NULL OR job_id = %(job_id)s::uuid) AND outcome = 'completed' AND http_status = 200
 GROUP BY 1
 ORDER BY 1
"""

_COUNT_FAILURES = """
SELECT outcome, coalesce(reason, '') AS reason, count(*) AS count
  FROM download_events
 WHERE (%(job_id)s::uuid IS NULL OR job_id = %(job_id)s::uuid) AND outcome <> 'completed'
 GROUP BY 1, 2
 ORDER BY 3 DESC, 1, 2
"""

_LIST_RECENT = """
(
    SELECT job_id, user_id, started_at, outcome, reason, http_status, method, bytes_sent, bytes_acknowledged,
           duration_seconds
      FROM download_events
     WHERE (%(job_id)s::uuid IS NULL OR job_id = %(job_id)s::uuid)
     ORDER BY started_at DESC
     LIMIT %(recent)s
)
UNION ALL
(
    SELECT job_id, user_id, started_at, 'running', NULL, http_status, NULL, bytes_sent, bytes_acknowledged,
           duration_seconds
      FROM exportd_running
     WHERE (%(job_id)s::uuid IS NULL OR job_id = %(job_id)s::uuid)
     ORDER BY started_at DESC
     LIMIT %(recent)s
)
 ORDER BY started_at DESC
 LIMIT %(recent)s
"""


async def find_statistics(
    database: Database, job_id: UUID | None, size_bounds: Sequence[int]
) -> DownloadStatistics | None:
    """Returns the statistics of a job, or of all jobs if ``job_id`` is None. None: there is no such job.

    ``size_bounds``: the bounds between the ranges of package sizes, in bytes, ascending.

    Raises DatabaseUnavailable.
    """
    parameters: dict[str, object] = {
        "job_id": job_id,
        "bounds": list(size_bounds),
        "recent": _RECENT_EVENTS,
    }
    totals = await database.fetch_one(_SUM_JOBS if job_id is None else _FIND_JOB, parameters)
    if totals is None:
        return None
    users = await database.fetch_one(_COUNT_USERS, parameters)
    assert users is not None
    return DownloadStatistics(
        job_id=job_id,
        user_id=totals.user_id,
        download_count=totals.download_count,
        last_downloaded_at=totals.last_downloaded_at,
        bytes_served=totals.bytes_served,
        unique_users=users.users,
        sizes=[read(SizeSummary, row) for row in await database.fetch_all(_SUM_BY_SIZE, parameters)],
        failures=[read(FailureCount, row) for row in await database.fetch_all(_COUNT_FAILURES, parameters)],
        recent=[read(DeliverySummary, row) for row in await database.fetch_all(_LIST_RECENT, parameters)],
    )

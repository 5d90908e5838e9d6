"""Jobs with their history, for people, in SQL: a list in keyset pages, and one job."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from exportd.db.driver import FIRST_TIME
from exportd.db.jobs import JOB_COLUMNS
from exportd.db.pool import Database
from exportd.db.rows import read
from exportd.domain.job import Job

_SELECT = f"""
SELECT {JOB_COLUMNS},
       created_at::timestamptz,
       pack_percent AS percent,
       failure_reason,
       coalesce(download_count, 0)::bigint AS download_count,
       last_downloaded_at::timestamptz,
       re_export_of,
       (SELECT newer.job_id
          FROM export_jobs AS newer
         WHERE newer.re_export_of = job.job_id
         ORDER BY newer.created_at DESC NULLS LAST, newer.job_id DESC
         LIMIT 1) AS re_exported_as
  FROM export_jobs AS job
"""  # noqa: S608  # constants only
FIND_JOBS = _SELECT + " WHERE job_id = ANY (%s::uuid[])"
# In an application's own table a job may lack its time of creation, or have one that Python cannot represent:
# then no page could follow it. Such a job is not listed.
_PAGE = f"""
   AND (job.created_at, job.job_id) < (%(created_at)s, %(job_id)s)
   AND job.created_at > '{FIRST_TIME.date()}'
 ORDER BY job.created_at DESC, job.job_id DESC
 LIMIT %(limit)s
"""
LIST_ALL = _SELECT + " WHERE true" + _PAGE
LIST_BY_STATUS = _SELECT + " WHERE status::text = %(status)s" + _PAGE
LIST_BY_USER = _SELECT + " WHERE user_id::text = %(user_id)s" + _PAGE
LIST_BY_USER_AND_STATUS = _SELECT + " WHERE user_id::text = %(user_id)s AND status::text = %(status)s" + _PAGE

FIND_RUNNING_DOWNLOADS = """
SELECT event_id, job_id, user_id, started_at,
       (SELECT sum(upper(part) - lower(part)) FROM unnest(requested) AS part)::bigint
           AS bytes_requested,
       bytes_acknowledged
  FROM exportd_running
 WHERE job_id = ANY (%s::uuid[])
 ORDER BY started_at
"""

# In one statement, because the record that counts a download clears its progress.
_WITH_PROGRESS = """
SELECT job.*,
       (SELECT coalesce(jsonb_object_agg(user_id, received_bytes), '{}')
          FROM (
            SELECT user_id,
                   (SELECT sum(upper(part) - lower(part)) FROM unnest(received) AS part) AS received_bytes
              FROM download_progress AS progress
             WHERE progress.job_id = job.job_id AND NOT isempty(received)
               AND package_sha256 = coalesce(job.package_sha256, '')
               AND package_size_bytes = coalesce(job.package_size_bytes, package_size_bytes)
          ) AS by_user) AS bytes_by_user
  FROM (
"""
FIND_JOBS_IN_PROGRESS = _WITH_PROGRESS + FIND_JOBS + ") AS job"

_LAST_ID = UUID(int=2**128 - 1)


@dataclass(frozen=True, slots=True)
class JobDetails:
    """A job with its history. ``re_exported_as`` is the newest job that exports this one again."""

    job: Job
    created_at: datetime | None
    percent: int | None
    failure_reason: str | None
    download_count: int
    last_downloaded_at: datetime | None
    re_export_of: UUID | None
    re_exported_as: UUID | None


@dataclass(frozen=True, slots=True)
class RunningDownload:
    """A running delivery. If another process sends it, the numbers are those of its last checkpoint."""

    event_id: UUID
    job_id: UUID
    user_id: str
    started_at: datetime
    bytes_requested: int
    bytes_acknowledged: int


async def find_details(database: Database, job_ids: list[UUID]) -> dict[UUID, JobDetails]:
    """Returns the jobs that exist, by id. Raises DatabaseUnavailable."""
    rows = await database.fetch_all(FIND_JOBS, (job_ids,))
    return {row.job_id: details_of(row) for row in rows}


async def list_jobs(
    database: Database,
    *,
    user_id: str | None,
    status: str | None,
    before: tuple[datetime, UUID] | None,
    limit: int,
) -> list[JobDetails]:
    """Returns the newest jobs, of a user if one is given, that were created before a time and id.

    Raises DatabaseUnavailable.
    """
    match user_id, status:
        case None, None:
            statement = LIST_ALL
        case None, _:
            statement = LIST_BY_STATUS
        case _, None:
            statement = LIST_BY_USER
        case _:
            statement = LIST_BY_USER_AND_STATUS
    created_at, job_id = before or ("infinity", _LAST_ID)
    values = {
        "user_id": user_id,
        "status": status,
        "created_at": created_at,
        "job_id": job_id,
        "limit": limit,
    }
    return [details_of(row) for row in await database.fetch_all(statement, values)]


async def find_running_downloads(database: Database, job_ids: list[UUID]) -> list[RunningDownload]:
    """Returns the running deliveries of the jobs, oldest first. Raises DatabaseUnavailable."""
    rows = await database.fetch_all(FIND_RUNNING_DOWNLOADS, (job_ids,))
    return [read(RunningDownload, row) for row in rows]


async def find_details_in_progress(
    database: Database, job_ids: list[UUID]
) -> dict[UUID, tuple[JobDetails, dict[str, int]]]:
    """Like ``find_details``, with the number of bytes that each user has of the package so far, from
    deliveries that ended, at the same moment. Raises DatabaseUnavailable."""
    rows = await database.fetch_all(FIND_JOBS_IN_PROGRESS, (job_ids,))
    return {row.job_id: (details_of(row), row.bytes_by_user) for row in rows}


def details_of(row: Any) -> JobDetails:
    """The job of a row of ``FIND_JOBS``."""
    return read(JobDetails, row, job=read(Job, row))

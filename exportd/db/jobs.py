"""Export jobs in SQL.

Every column is cast on reading: an application's own table may hold an enum for the status, an integer for
the user, or times without a zone.
"""

from dataclasses import asdict, dataclass
from datetime import datetime
from uuid import UUID

from exportd.db.batcher import Batcher
from exportd.db.pool import Database
from exportd.db.rows import read, sum_of
from exportd.domain.job import Job

# More than one, so that one slow statement does not delay every look-up.
_LOOK_UPS_AT_ONCE = 2

# A SHA-256 is 64 hexadecimal digits, in any case. Any other text is as if there were none.
PACKAGE_SHA256 = "CASE WHEN package_sha256::text ~* '^[0-9a-f]{64}$' THEN lower(package_sha256::text) END"

# Only a column of the type json may hold an escape that fails as text.
_TOOL_NAME = """
CASE
    WHEN pg_typeof(tool_data) = 'json'::regtype THEN exportd_tool_name(tool_data::json)
    ELSE coalesce(tool_data ->> 'name', tool_data ->> 'toolName', '')
END
"""

# The fields of ``Job``.
JOB_COLUMNS = f"""
       job_id,
       coalesce(user_id::text, '') AS user_id,
       status::text,
       {_TOOL_NAME} AS tool_name,
       completed_at::timestamptz,
       package_path::text,
       package_size_bytes::bigint,
       {PACKAGE_SHA256} AS package_sha256,
       package_expires_at::timestamptz,
       package_suspect_since IS NOT NULL AS is_suspect,
       now() AS read_at
"""
_FIND_JOBS = f"SELECT {JOB_COLUMNS} FROM export_jobs WHERE job_id = ANY (%s::uuid[])"  # noqa: S608  # constants only

# The states are those of ``Job.package_state``. An application's own statuses are "other".
_SUM_PACKAGES = f"""
SELECT CASE
           WHEN status::text IN ('pending', 'processing', 'failed') THEN status::text
           WHEN status::text <> 'completed' THEN 'other'
           WHEN package_path IS NULL THEN 'deleted'
           WHEN package_expires_at::timestamptz <= now() THEN 'expired'
           WHEN package_suspect_since IS NOT NULL THEN 'suspect'
           ELSE 'available'
       END AS state,
       count(*) AS jobs,
       {sum_of("package_size_bytes")} AS size_bytes
  FROM export_jobs
 GROUP BY 1
"""  # noqa: S608  # constants only
_PACKAGE_STATES = (
    "pending", "processing", "failed", "other", "available", "suspect", "expired", "deleted",
)  # fmt: skip

# Idempotent: a retry after a lost connection inserts nothing and reads the row back.
_RECORD_COMPLETED = """
WITH inserted AS (
    INSERT INTO export_jobs (
        job_id, user_id, status, tool_data, completed_at, package_path, package_size_bytes, package_sha256,
        package_retention_days, package_expires_at
    )
    VALUES (
        %(job_id)s, %(user_id)s, 'completed', jsonb_build_object('name', %(tool_name)s::text), now(),
        %(package_path)s, %(package_size_bytes)s, %(package_sha256)s,
        %(retention_days)s, now() + make_interval(days => %(retention_days)s)
    )
    ON CONFLICT (job_id) DO NOTHING
    RETURNING package_expires_at
)
SELECT package_expires_at::timestamptz FROM inserted
UNION ALL
SELECT package_expires_at::timestamptz FROM export_jobs WHERE job_id = %(job_id)s
LIMIT 1
"""


_HAS_UUID_USERS = """
SELECT atttypid = 'uuid'::regtype AS is_uuid
  FROM pg_attribute
 WHERE attrelid = 'export_jobs'::regclass AND attname = 'user_id'
"""


async def has_uuid_users(database: Database) -> bool:
    """Whether the creators' ids are UUIDs, which may be written in several ways. Raises DatabaseError."""
    row = await database.fetch_one(_HAS_UUID_USERS)
    return row is not None and bool(row.is_uuid)


class JobFinder:
    """Looks jobs up. Concurrent look-ups share a statement."""

    def __init__(self, database: Database) -> None:
        async def find(job_ids: list[UUID]) -> list[Job | None]:
            rows = await database.fetch_all(_FIND_JOBS, (list(set(job_ids)),))
            jobs = {row.job_id: read(Job, row) for row in rows}
            return [jobs.get(job_id) for job_id in job_ids]

        self._gatherer = Batcher(find, at_once=_LOOK_UPS_AT_ONCE)

    async def find_job(self, job_id: UUID) -> Job | None:
        """Returns the job, or None. Raises DatabaseUnavailable."""
        return await self._gatherer.submit(job_id)


async def sum_packages(database: Database) -> dict[str, tuple[int, int]]:
    """Returns, by state, the number of jobs and the bytes of their packages.

    Reads the whole table. Raises DatabaseUnavailable.
    """
    rows = await database.fetch_all(_SUM_PACKAGES)
    found = {row.state: (row.jobs, row.size_bytes) for row in rows}
    return {state: found.get(state, (0, 0)) for state in _PACKAGE_STATES}


@dataclass(frozen=True, slots=True)
class CompletedJob:
    """A job that is complete from the start."""

    job_id: UUID
    user_id: str
    tool_name: str
    package_path: str
    package_size_bytes: int
    package_sha256: str
    retention_days: int


async def record_completed_job(database: Database, job: CompletedJob) -> datetime:
    """Records the job and returns when its package expires.

    Idempotent by ``job_id``. Raises DatabaseUnavailable.
    """
    row = await database.fetch_one(_RECORD_COMPLETED, asdict(job))
    assert row is not None
    expires_at: datetime = row.package_expires_at
    return expires_at

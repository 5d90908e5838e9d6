"""Jobs that a packer works on, in SQL.

A packer holds one job at a time. ``packer_id`` names the packer, ``packer_seen_at`` is its last heartbeat.
After a minute without a heartbeat any other packer may take the job.
"""

from dataclasses import dataclass
from uuid import UUID

from exportd.db.pool import Database, Session
from exportd.db.rows import read

# Idempotent: a packer that holds a job takes no other.
TAKE_JOB = """
UPDATE export_jobs
   SET status = 'processing',
       packer_id = %(packer_id)s,
       packer_seen_at = now(),
       pack_attempts = pack_attempts + 1,
       pack_percent = 0,
       pack_due_at = NULL,
       failure_reason = NULL
 WHERE job_id = (
       SELECT job_id
         FROM export_jobs
        WHERE pack_source IS NOT NULL
          AND completed_at IS NULL
          AND (status::text = 'pending' AND (pack_due_at IS NULL OR pack_due_at <= now())
               OR status::text = 'processing' AND packer_seen_at < now() - make_interval(secs => 60))
        ORDER BY created_at, job_id
        LIMIT 1
          FOR UPDATE SKIP LOCKED
       )
   AND NOT EXISTS (SELECT FROM export_jobs WHERE packer_id = %(packer_id)s AND completed_at IS NULL
                                             AND pack_source IS NOT NULL AND status::text = 'processing')
"""

_FIND_OWN = """
SELECT job_id, pack_source AS source, pack_attempts AS attempt
  FROM export_jobs
 WHERE packer_id = %s AND completed_at IS NULL AND pack_source IS NOT NULL AND status::text = 'processing'
 ORDER BY created_at, job_id
 LIMIT 1
"""

_NOTE_PROGRESS = """
UPDATE export_jobs
   SET pack_percent = %(percent)s, packer_seen_at = now()
 WHERE job_id = %(job_id)s AND packer_id = %(packer_id)s AND status::text = 'processing'
RETURNING job_id
"""
_LOCK_OWN = """
SELECT job_id
  FROM export_jobs
 WHERE job_id = %(job_id)s AND packer_id = %(packer_id)s AND status::text = 'processing'
   FOR UPDATE
"""
# The trigger sets the expiry.
_COMPLETE = """
UPDATE export_jobs
   SET status = 'completed',
       completed_at = now(),
       package_path = %(package_path)s,
       package_size_bytes = %(package_size_bytes)s,
       package_sha256 = %(package_sha256)s,
       package_deleted_at = NULL,
       package_suspect_since = NULL,
       pack_percent = 100,
       packer_id = NULL,
       packer_seen_at = NULL
 WHERE job_id = %(job_id)s AND packer_id = %(packer_id)s AND status::text = 'processing'
"""
_RETRY = """
UPDATE export_jobs
   SET status = 'pending', pack_percent = NULL, packer_id = NULL, packer_seen_at = NULL,
       pack_due_at = now() + make_interval(secs => %(delay_seconds)s)
 WHERE job_id = %(job_id)s AND packer_id = %(packer_id)s AND status::text = 'processing'
"""
_GIVE_UP = """
UPDATE export_jobs
   SET status = 'failed', failure_reason = %(reason)s, packer_id = NULL, packer_seen_at = NULL
 WHERE job_id = %(job_id)s AND packer_id = %(packer_id)s AND status::text = 'processing'
"""
_GIVE_BACK = """
UPDATE export_jobs
   SET status = 'pending', pack_percent = NULL, packer_id = NULL, packer_seen_at = NULL,
       pack_attempts = greatest(pack_attempts - 1, 0)
 WHERE packer_id = %s AND completed_at IS NULL AND pack_source IS NOT NULL AND status::text = 'processing'
"""
_RELEASE_OWN = """
UPDATE export_jobs
   SET status = 'pending', pack_percent = NULL, packer_id = NULL, packer_seen_at = NULL
 WHERE packer_id = %s AND completed_at IS NULL AND pack_source IS NOT NULL AND status::text = 'processing'
"""
_REQUEST_PACKAGE = """
INSERT INTO export_jobs (job_id, user_id, status, tool_data, pack_source, package_retention_days)
VALUES (%(job_id)s, %(user_id)s, 'pending', jsonb_build_object('name', %(tool_name)s::text), %(source)s,
        %(retention_days)s)
ON CONFLICT (job_id) DO NOTHING
"""

CHANNEL = "export_requested"


@dataclass(frozen=True, slots=True)
class PackingJob:
    """A job that a packer holds. ``attempt`` starts at 1."""

    job_id: UUID
    source: str
    attempt: int


async def take_job(database: Database, packer_id: UUID) -> PackingJob | None:
    """Returns the job that the packer holds, or takes the oldest waiting one. None: no job waits.

    Raises DatabaseError.
    """
    await database.fetch_all(TAKE_JOB, {"packer_id": packer_id})
    row = await database.fetch_one(_FIND_OWN, (packer_id,))
    return read(PackingJob, row) if row else None


async def release_jobs(database: Database, packer_id: UUID) -> None:
    """Lets the job wait again that the packer held when it was killed. The attempt counts. Raises
    DatabaseUnavailable."""
    await database.fetch_all(_RELEASE_OWN, (packer_id,))


async def note_progress(database: Database, job: PackingJob, packer_id: UUID, percent: int) -> bool:
    """Records a heartbeat and the progress. False: the packer no longer holds the job.

    Raises DatabaseUnavailable.
    """
    values = {"job_id": job.job_id, "packer_id": packer_id, "percent": percent}
    return await database.fetch_one(_NOTE_PROGRESS, values) is not None


async def hold_job(session: Session, job: PackingJob, packer_id: UUID) -> bool:
    """Locks the job's row until the transaction ends. False: the packer no longer holds the job."""
    return await session.fetch_one(_LOCK_OWN, {"job_id": job.job_id, "packer_id": packer_id}) is not None


async def complete_job(
    session: Session, job: PackingJob, packer_id: UUID, *, path: str, size_bytes: int, sha256: str
) -> None:
    """Completes the job with its package. Raises DatabaseError."""
    await session.fetch_all(
        _COMPLETE,
        {
            "job_id": job.job_id,
            "packer_id": packer_id,
            "package_path": path,
            "package_size_bytes": size_bytes,
            "package_sha256": sha256,
        },
    )


async def retry_job(database: Database, job: PackingJob, packer_id: UUID, delay_seconds: float) -> None:
    """Lets the job wait for another attempt. Raises DatabaseUnavailable."""
    await database.fetch_all(
        _RETRY, {"job_id": job.job_id, "packer_id": packer_id, "delay_seconds": delay_seconds}
    )


async def fail_job(database: Database, job: PackingJob, packer_id: UUID, reason: str) -> None:
    """Fails the job. ``reason`` is for its user. Raises DatabaseUnavailable."""
    await database.fetch_all(_GIVE_UP, {"job_id": job.job_id, "packer_id": packer_id, "reason": reason})


async def give_back_jobs(database: Database, packer_id: UUID) -> None:
    """Lets the packer's job wait again. The attempt does not count. Raises DatabaseUnavailable."""
    await database.fetch_all(_GIVE_BACK, (packer_id,))


async def request_package(
    database: Database, *, job_id: UUID, user_id: str, tool_name: str, source: str, retention_days: int
) -> None:
    """Records a job that waits for a packer. Idempotent by ``job_id``. Raises DatabaseUnavailable."""
    values = {
        "job_id": job_id,
        "user_id": user_id,
        "tool_name": tool_name,
        "source": source,
        "retention_days": retention_days,
    }
    await database.fetch_all(_REQUEST_PACKAGE, values)
    await database.fetch_all("SELECT pg_notify(%s, %s)", (CHANNEL, str(job_id)))

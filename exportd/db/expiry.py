"""Expired packages, in SQL: which principals may still resume, what the cleanup may delete, and its history.

A principal with an unfinished download of an expired package may resume it for the grace time. No download
starts after the expiry, so every unfinished delivery began before it, whichever node's clock recorded it.
"""

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from uuid import UUID

from exportd.db.pool import Database, DatabaseRefused, DatabaseUnavailable, Session
from exportd.db.rows import read

_FIND_UNFINISHED = """
SELECT 1 FROM exportd_unfinished_downloads(%s) AS unfinished(user_id) WHERE user_id = %s
"""

# The minute is for deliveries that began at the last moment and are not recorded yet.
TAKE_EXPIRED = """
SELECT job_id,
       package_path::text,
       coalesce(package_size_bytes::bigint, 0) AS size_bytes,
       package_expires_at::timestamptz AS expires_at,
       now() < package_expires_at::timestamptz + %(grace)s
           AND EXISTS (SELECT FROM exportd_unfinished_downloads(job_id)) AS is_waiting
  FROM export_jobs AS job
 WHERE status::text = 'completed'
   AND package_path IS NOT NULL
   AND package_expires_at < now() - make_interval(secs => 60)
   AND (package_expires_at, job_id) > (%(expires_at)s, %(job_id)s)
 ORDER BY package_expires_at, job_id
 LIMIT %(limit)s
"""
_LOCKED = " FOR UPDATE SKIP LOCKED"

# The SELECT proves that no trigger or rule of an application changed the row back.
_MARK_DELETED = """
SAVEPOINT package;
UPDATE export_jobs
   SET package_path = NULL, package_size_bytes = NULL, package_deleted_at = now()
 WHERE job_id = %(job_id)s;
SELECT package_path IS NULL AND package_deleted_at IS NOT NULL AS is_marked
  FROM export_jobs
 WHERE job_id = %(job_id)s
"""

FIND_SHARING = "SELECT job_id FROM export_jobs WHERE package_path = ANY (%s) LIMIT 1"

# Reads the whole table.
_LIST_ODD_PATHS = """
SELECT job_id, package_path::text FROM export_jobs WHERE package_path ~ '//|(^|/)\\.(/|$)|/$'
"""

_LIST_PATHS = """
SELECT job_id, package_path::text
  FROM export_jobs
 WHERE package_path IS NOT NULL AND job_id > %s
 ORDER BY job_id
 LIMIT 10000
"""

_NEWEST_PACKAGES = """
SELECT package_path::text
  FROM export_jobs
 WHERE package_path IS NOT NULL
 ORDER BY created_at DESC NULLS LAST, job_id DESC
 LIMIT 20
"""

_RECORD_RUN = """
INSERT INTO exportd_cleanup_runs (
    run_id, started_at, finished_at, packages_deleted, packages_failed, packages_waiting, bytes_freed,
    events_pruned
)
VALUES (
    %(run_id)s, %(started_at)s, now(), %(packages_deleted)s, %(packages_failed)s, %(packages_waiting)s,
    %(bytes_freed)s, %(events_pruned)s
)
ON CONFLICT (run_id) DO NOTHING
"""

FIRST_ID = UUID(int=0)


@dataclass(frozen=True, slots=True)
class ExpiredPackage:
    """An expired package. ``is_waiting``: it may not be deleted yet, because a principal may resume it."""

    job_id: UUID
    package_path: str
    size_bytes: int
    expires_at: datetime
    is_waiting: bool


async def has_unfinished_download(database: Database, job_id: UUID, user_id: str) -> bool:
    """Whether the principal has an unfinished download of the package.

    Raises DatabaseUnavailable.
    """
    return await database.fetch_one(_FIND_UNFINISHED, (job_id, user_id)) is not None


async def take_expired(
    session: Session | Database, after: ExpiredPackage | None, limit: int, grace: timedelta, *, lock: bool
) -> list[ExpiredPackage]:
    """The next expired packages, by expiry. ``lock`` locks their rows until the session's transaction ends,
    and skips rows that are locked already. Raises DatabaseUnavailable."""
    parameters = {
        "expires_at": after.expires_at if after else "-infinity",
        "job_id": after.job_id if after else FIRST_ID,
        "limit": limit,
        "grace": grace,
    }
    rows = await session.fetch_all(TAKE_EXPIRED + (_LOCKED if lock else ""), parameters)
    return [read(ExpiredPackage, row) for row in rows]


@contextlib.asynccontextmanager
async def marked_deleted(session: Session, job_id: UUID) -> AsyncIterator[None]:
    """Marks the package of a job as deleted, before the block. If the block raises, the row stays as it was.

    Raises DatabaseRefused if the database, a constraint or a trigger does not let the row be changed.
    """
    try:
        row = await session.fetch_one(_MARK_DELETED, {"job_id": job_id})
        if row is None or not row.is_marked:
            raise DatabaseRefused("the row does not keep the change: does a trigger undo it?")
        yield
    except Exception as error:
        if not isinstance(error, DatabaseUnavailable):
            await session.fetch_all("ROLLBACK TO SAVEPOINT package")
        raise


async def is_shared(session: Session, paths: Sequence[str]) -> bool:
    """Whether a job has one of the paths. Raises DatabaseUnavailable."""
    return await session.fetch_one(FIND_SHARING, (list(paths),)) is not None


async def list_odd_paths(database: Database | Session) -> list[tuple[UUID, str]]:
    """The jobs whose package's path is spelled in an unusual way, and the paths.

    Reads the whole table. Raises DatabaseUnavailable.
    """
    return [(row.job_id, row.package_path) for row in await database.fetch_all(_LIST_ODD_PATHS)]


async def list_package_paths(database: Database, after: UUID) -> list[tuple[UUID, str]]:
    """The next jobs with a package, by id, and its recorded path; empty at the end.

    Raises DatabaseUnavailable.
    """
    return [(row.job_id, row.package_path) for row in await database.fetch_all(_LIST_PATHS, (after,))]


async def hides_rows(database: Database) -> bool:
    """Whether row level security may hide jobs from this role. Raises DatabaseUnavailable."""
    row = await database.fetch_one("SELECT row_security_active('export_jobs') AS is_active")
    return row is not None and bool(row.is_active)


async def newest_package_paths(database: Database) -> list[str]:
    """The paths of some of the newest packages. Raises DatabaseUnavailable."""
    return [row.package_path for row in await database.fetch_all(_NEWEST_PACKAGES)]


async def database_clock(database: Database | Session) -> datetime:
    """The database's present time. Raises DatabaseUnavailable."""
    row = await database.fetch_one("SELECT now() AS now")
    assert row is not None
    now: datetime = row.now
    return now


async def last_cleanup(database: Database | Session) -> tuple[datetime, datetime] | None:
    """When the last complete cleanup started and finished. Raises DatabaseUnavailable."""
    row = await database.fetch_one(
        "SELECT started_at, finished_at FROM exportd_cleanup_runs ORDER BY started_at DESC LIMIT 1"
    )
    return (row.started_at, row.finished_at) if row else None


async def record_cleanup(database: Database | Session, run: dict[str, object]) -> None:
    """Records a complete cleanup, once for each ``run_id``. Raises DatabaseUnavailable."""
    await database.fetch_all(_RECORD_RUN, run)

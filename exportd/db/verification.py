"""Recorded packages, for their verification, in SQL."""

from dataclasses import dataclass
from uuid import UUID

from exportd.db.jobs import PACKAGE_SHA256
from exportd.db.pool import Database
from exportd.db.rows import read

_LIST_PACKAGES = f"""
SELECT job_id, package_path::text, package_size_bytes::bigint AS size_bytes, {PACKAGE_SHA256} AS sha256,
       package_sha256 IS NOT NULL AS has_digest, package_suspect_since IS NOT NULL AS is_suspect
  FROM export_jobs
 WHERE status::text = 'completed'
   AND package_path IS NOT NULL
   AND {{condition}}
 ORDER BY job_id
 LIMIT 100
"""  # noqa: S608  # constants only
_LIST_ONE = _LIST_PACKAGES.replace("{condition}", "job_id = %s")
_LIST_NEXT = _LIST_PACKAGES.replace("{condition}", "job_id > %s")

# Not if the job got another package, or lost it, while the file was read.
_MARK_SUSPECT = f"""
UPDATE export_jobs
   SET package_suspect_since = coalesce(package_suspect_since, now())
 WHERE job_id = %s AND package_path = %s AND {PACKAGE_SHA256} = %s
"""  # noqa: S608  # constants only
_MARK_SOUND = f"""
UPDATE export_jobs
   SET package_suspect_since = NULL
 WHERE job_id = %s AND package_path = %s AND {PACKAGE_SHA256} = %s
RETURNING job_id
"""  # noqa: S608  # constants only


@dataclass(frozen=True, slots=True)
class RecordedPackage:
    """A package as its job's row describes it. ``sha256`` is None if there is none, or another text in its
    place (``has_digest``)."""

    job_id: UUID
    package_path: str
    size_bytes: int | None
    sha256: str | None
    has_digest: bool
    is_suspect: bool


async def list_packages(database: Database, job_id: UUID | None, after: UUID | None) -> list[RecordedPackage]:
    """Returns the package of ``job_id``, or the next ones by id. Empty at the end. Raises
    DatabaseUnavailable."""
    if job_id is not None:
        rows = [] if after else await database.fetch_all(_LIST_ONE, (job_id,))
    else:
        rows = await database.fetch_all(_LIST_NEXT, (after or UUID(int=0),))
    return [read(RecordedPackage, row) for row in rows]


async def mark_suspect(database: Database, package: RecordedPackage) -> None:
    """Marks the package as suspect, so that it is not served. Raises DatabaseUnavailable."""
    await database.fetch_all(_MARK_SUSPECT, (package.job_id, package.package_path, package.sha256))


async def mark_sound(database: Database, package: RecordedPackage) -> bool:
    """Clears the mark, so that the package is served again. False: the job has another package now.

    Raises DatabaseUnavailable.
    """
    values = (package.job_id, package.package_path, package.sha256)
    return await database.fetch_one(_MARK_SOUND, values) is not None

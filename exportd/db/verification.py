"""What was recorded of packages, for verifying them, in SQL."""

from dataclasses import dataclass
from uuid import UUID

from exportd.db.pool import Database

_LIST_PACKAGES = """
SELECT job_id, package_path::text, package_size_bytes::bigint, package_sha256::text,
       package_suspect_since IS NOT NULL
  FROM export_jobs
 WHERE status::text = 'completed'
   AND package_path IS NOT NULL
   AND {condition}
 ORDER BY job_id
 LIMIT 100
"""
_LIST_ONE = _LIST_PACKAGES.format(condition="job_id = %s")
_LIST_NEXT = _LIST_PACKAGES.format(condition="job_id > %s")

# Not if somebody recorded another package, or deleted it, while it was read.
_MARK_SUSPECT = """
UPDATE export_jobs
   SET package_suspect_since = coalesce(package_suspect_since, now())
 WHERE job_id = %s AND package_path = %s AND package_sha256 = %s
"""
_MARK_SOUND = """
UPDATE export_jobs
   SET package_suspect_since = NULL
 WHERE job_id = %s AND package_path = %s AND package_sha256 = %s
RETURNING job_id
"""


@dataclass(frozen=True, slots=True)
class RecordedPackage:
    """A package as its job's row describes it."""

    job_id: UUID
    package_path: str
    size_bytes: int | None
    sha256: str | None
    is_suspect: bool


async def list_packages(database: Database, job_id: UUID | None, after: UUID | None) -> list[RecordedPackage]:
    """The package of ``job_id``, or the next ones by id; empty at the end. Raises DatabaseUnavailable."""
    if job_id is not None:
        rows = [] if after else await database.fetch_all(_LIST_ONE, (job_id,))
    else:
        rows = await database.fetch_all(_LIST_NEXT, (after or UUID(int=0),))
    return [RecordedPackage(*row) for row in rows]


async def mark_suspect(database: Database, package: RecordedPackage) -> None:
    """The package is served no longer. Raises DatabaseUnavailable."""
    await database.fetch_all(_MARK_SUSPECT, (package.job_id, package.package_path, package.sha256))


async def mark_sound(database: Database, package: RecordedPackage) -> bool:
    """The package is served again; False: another one was recorded since. Raises DatabaseUnavailable."""
    values = (package.job_id, package.package_path, package.sha256)
    return await database.fetch_one(_MARK_SOUND, values) is not None

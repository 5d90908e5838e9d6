"""Publishing: records a finished package as a completed job."""

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from exportd.archive.pack import DraftPackage
from exportd.db.jobs import CompletedJob, record_completed_job
from exportd.db.pool import Database, DatabaseUnavailable


@dataclass(frozen=True, slots=True)
class Publication:
    """The user, the exported tool and the retention of a package."""

    user_id: str
    tool_name: str
    retention_days: int


async def place_and_record(
    database: Database, draft: DraftPackage, job_id: UUID, publication: Publication
) -> datetime:
    """Places the package in the storage, then records its job. Returns when the package expires.

    Raises DatabaseUnavailable. The package is kept then, because its row may have been written before the
    answer was lost: a package without a row wastes space, a row without its package promises what is not
    there.
    """
    draft.place()
    job = CompletedJob(
        job_id,
        publication.user_id,
        publication.tool_name,
        draft.path,
        draft.size_bytes,
        draft.sha256,
        publication.retention_days,
    )
    try:
        expires_at = await record_completed_job(database, job)
    except DatabaseUnavailable as error:
        draft.keep()
        raise DatabaseUnavailable(
            f"{error}; whether job {job_id} was recorded is unknown, so its package {draft.path} was kept"
        ) from error
    draft.keep()
    return expires_at

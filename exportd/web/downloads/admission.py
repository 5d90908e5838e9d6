"""Checks before a delivery: permission, the link, and opening the package."""

import structlog
from aiohttp import web

from exportd.db.expiry import has_unfinished_download
from exportd.db.links import Link
from exportd.domain.job import Job
from exportd.domain.permission import Decision, decide_download
from exportd.domain.principal import Principal
from exportd.storage.files import OpenPackage, PackageMissing, PackageUnusable
from exportd.web.edge.access import refuse, refuse_link
from exportd.web.edge.errors import (
    ApiError,
    FileNotFound,
    LinkExpired,
    PackageExpired,
    PackageNotReady,
    StorageError,
)
from exportd.web.services import SERVICES

log = structlog.get_logger()


async def check_permission(
    request: web.Request, principal: Principal, job: Job, *, may_resume: bool = True
) -> ApiError | None:
    """Raises the error if the principal may not download the package now.

    ``may_resume``: unfinished downloads of an expired package may be resumed for the grace time. Then this
    returns the error in place of raising it. The caller raises it if the request turns out to start over.
    """
    match decide_download(principal, job, request.app[SERVICES].settings.retention.resume_grace):
        case Decision.UNAUTHORIZED:
            raise refuse(request, job.user_id)
        case Decision.NOT_READY:
            raise _denied(PackageNotReady(extra={"jobStatus": job.status}))
        case Decision.EXPIRED | Decision.RESUMABLE as decision:
            expires_at = job.package_expires_at and job.package_expires_at.isoformat()
            expired = PackageExpired(extra={"expiresAt": expires_at})
            if decision is Decision.RESUMABLE and may_resume and await _is_resume(request, principal, job):
                return expired
            raise _denied(expired)
        case Decision.SUSPECT:
            log.error("download_failed", reason="the package is suspect")
            request.app[SERVICES].metrics.download_refused("suspect")
            raise StorageError
        case Decision.ALLOWED:
            return None


async def _is_resume(request: web.Request, principal: Principal, job: Job) -> bool:
    """Whether the request resumes an unfinished download of the principal, or prepares to (HEAD)."""
    if request.method != "HEAD" and "Range" not in request.headers:
        return False
    await request.app[SERVICES].ledger.settle(job.job_id)
    return await has_unfinished_download(request.app[SERVICES].database, job.job_id, principal.user_id)


async def check_link(request: web.Request, link: Link, principal: Principal, job: Job) -> ApiError | None:
    """Raises LinkExpired if the link has expired, or was made for another package.

    Returns the error if the link may only resume.
    """
    if link.package_sha256 != job.package_sha256:
        raise refuse_link(request, "replaced")
    if job.read_at >= link.resume_until:
        raise refuse_link(request, "expired")
    if job.read_at < link.start_until:
        return None
    if not link.is_begun or not await _is_resume(request, principal, job):
        raise refuse_link(request, "too late to start")
    return LinkExpired()


def _denied(error: ApiError) -> ApiError:
    log.info("download_denied", reason=error.code)
    return error


def open_package(request: web.Request, job: Job) -> OpenPackage:
    """Opens the job's package; the caller closes it. Raises FileNotFound and StorageError."""
    assert job.package_path is not None
    try:
        return request.app[SERVICES].storage.open(job.package_path, job.package_size_bytes)
    except PackageMissing as error:
        log.error("download_failed", reason="file not found", package_size_bytes=job.package_size_bytes)
        request.app[SERVICES].metrics.download_refused("missing")
        raise FileNotFound from error
    except PackageUnusable as error:
        log.error("download_failed", reason=str(error), package_size_bytes=job.package_size_bytes)
        request.app[SERVICES].metrics.download_refused("unusable")
        raise StorageError from error

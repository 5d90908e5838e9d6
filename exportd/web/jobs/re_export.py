"""Exporting a job again, once its package is gone."""

import itertools
import uuid
from uuid import UUID

import structlog
from aiohttp import web

from exportd.db.job_details import JobDetails
from exportd.db.pool import DatabaseRefused, Session
from exportd.db.re_exports import count_waiting_re_exports, export_again, find_family, lock_re_exports
from exportd.domain.job import JobStatus, PackageState
from exportd.domain.permission import may_see
from exportd.domain.principal import Principal
from exportd.storage.files import PackageMissing, PackageStore, PackageUnusable
from exportd.web.edge.access import authenticate, refuse, requested_job_id
from exportd.web.edge.errors import ExportInProgress, JobNotFound, PackageAvailable, ReExportUnsupported
from exportd.web.jobs.document import describe_job, job_response
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES

log = structlog.get_logger()

# After a re-export that failed, each further one has to wait twice as long.
_FIRST_RETRY_SECONDS = 60.0
_MAX_RETRY_SECONDS = 86400.0


@documented(operations.RE_EXPORT)
async def export_job_again(request: web.Request) -> web.Response:
    """Requests the export of a job again whose package is gone, for its creator or an admin."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    try:
        async with request.app[SERVICES].database.session() as session, session.transaction():
            await _check_may_ask(request, principal, session, job_id)
            made = await export_again(session, job_id, uuid.uuid4())
    except DatabaseRefused as error:
        log.error("re_export_refused", error=str(error))
        raise ReExportUnsupported from error
    log.info("re_export_requested", new_job_id=str(made.job.job_id))
    path = request.path.removesuffix(f"{request.match_info['job_id']}/re-export")
    return job_response(describe_job(made), status=202, headers={"Location": f"{path}{made.job.job_id}"})


async def _check_may_ask(request: web.Request, principal: Principal, session: Session, job_id: UUID) -> None:
    family = await find_family(session, job_id)
    details = _member(family, job_id)
    if not may_see(principal, details.job.user_id):
        raise refuse(request, details.job.user_id)
    # Of concurrent requests, one makes the job and the others find it.
    await lock_re_exports(session, details.job.user_id)
    family = await find_family(session, job_id)
    _check_gone(family, request.app[SERVICES].storage)
    request.app[SERVICES].limiter.check_re_export(
        principal,
        wait_seconds=_seconds_until_retry(family),
        waiting=await count_waiting_re_exports(session, details.job.user_id),
    )


def _member(family: list[JobDetails], job_id: UUID) -> JobDetails:
    for member in family:
        if member.job.job_id == job_id:
            return member
    raise JobNotFound


def _check_gone(family: list[JobDetails], store: PackageStore) -> None:
    """Raises if any job of the export waits, runs, or still has its package. The error names the newest such
    job."""
    for present in family:
        named: dict[str, object] = {"jobId": present.job.job_id}
        if present.job.status not in (JobStatus.COMPLETED, JobStatus.FAILED):
            raise ExportInProgress(extra=named)
        if present.job.package_state is PackageState.AVAILABLE and _is_there(store, present):
            raise PackageAvailable(extra=named)


def _seconds_until_retry(family: list[JobDetails]) -> float:
    """How long to wait after the consecutive failures of the newest re-exports."""
    newest = family[0]
    failures = itertools.takewhile(
        lambda member: member.re_export_of and member.job.status == JobStatus.FAILED, family
    )
    number = sum(1 for _ in failures)
    if not number or newest.created_at is None:
        return 0.0
    wait: float = min(_FIRST_RETRY_SECONDS * 2 ** (number - 1), _MAX_RETRY_SECONDS)
    return wait - (newest.job.read_at - newest.created_at).total_seconds()


def _is_there(store: PackageStore, details: JobDetails) -> bool:
    assert details.job.package_path is not None
    try:
        with store.open(details.job.package_path, details.job.package_size_bytes):
            return True
    except (PackageMissing, PackageUnusable):
        return False

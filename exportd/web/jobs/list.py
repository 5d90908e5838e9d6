"""Jobs as their creators and admins see them: the list, one of them, and asking for an export again."""

import base64
import binascii
import itertools
import uuid
from datetime import UTC, datetime
from uuid import UUID

import orjson
import structlog
from aiohttp import web

from exportd.db.job_details import JobDetails, find_details, list_jobs
from exportd.db.pool import DatabaseRefused, Session
from exportd.db.re_exports import count_waiting_re_exports, export_again, find_family, lock_re_exports
from exportd.domain.job import JobStatus, PackageState
from exportd.domain.permission import may_see
from exportd.domain.principal import Principal
from exportd.domain.sizes import format_size
from exportd.http.content_disposition import package_filename
from exportd.http.validators import last_modified
from exportd.storage.files import PackageMissing, PackageStore, PackageUnusable
from exportd.web.downloads.handler import STORE
from exportd.web.edge.access import DATABASE, authenticate, refuse, requested_job_id
from exportd.web.edge.errors import (
    ExportInProgress,
    InvalidParameter,
    JobNotFound,
    PackageAvailable,
    ReExportUnsupported,
)
from exportd.web.edge.limits import LIMITER
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented

log = structlog.get_logger()

_PAGE_SIZE = 20
_LARGEST_PAGE = 100
# After a re-export that failed, each next one has to wait twice as long.
_FIRST_RETRY_SECONDS = 60.0
_MAX_RETRY_SECONDS = 86400.0


@documented(operations.LIST_JOBS)
async def list_export_jobs(request: web.Request) -> web.Response:
    """The caller's jobs, newest first; for an admin, everybody's."""
    principal = await authenticate(request)
    limit = _limit(request.query.get("limit"))
    found = await list_jobs(
        request.app[DATABASE],
        user_id=None if principal.is_admin else principal.user_id,
        status=_status(request.query.get("status")),
        before=_parse_cursor(request.query.get("cursor")),
        # One more tells whether there is another page.
        limit=limit + 1,
    )
    page = found[:limit]
    cursor = _cursor(page[-1]) if len(found) > limit else None
    return _answer({"jobs": [describe_job(details) for details in page], "nextCursor": cursor})


@documented(operations.SHOW_JOB)
async def show_export_job(request: web.Request) -> web.Response:
    """One job, for its creator or an admin."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    details = (await find_details(request.app[DATABASE], [job_id])).get(job_id)
    if details is None:
        raise JobNotFound
    if not may_see(principal, details.job.user_id):
        raise refuse(request, details.job.user_id)
    return _answer(describe_job(details))


@documented(operations.RE_EXPORT)
async def export_job_again(request: web.Request) -> web.Response:
    """Asks for the export of a job whose package is gone again, for its creator or an admin."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    try:
        async with request.app[DATABASE].session() as session, session.transaction():
            await _check_may_ask(request, principal, session, job_id)
            made = await export_again(session, job_id, uuid.uuid4())
    except DatabaseRefused as error:
        log.error("re_export_refused", error=str(error))
        raise ReExportUnsupported from error
    log.info("re_export_requested", new_job_id=str(made.job.job_id))
    path = request.path.removesuffix(f"{request.match_info['job_id']}/re-export")
    return _answer(describe_job(made), status=202, headers={"Location": f"{path}{made.job.job_id}"})


async def _check_may_ask(request: web.Request, principal: Principal, session: Session, job_id: UUID) -> None:
    family = await find_family(session, job_id)
    details = _member(family, job_id)
    if not may_see(principal, details.job.user_id):
        raise refuse(request, details.job.user_id)
    # Of several who ask at once, one makes the job and the others see it.
    await lock_re_exports(session, details.job.user_id)
    family = await find_family(session, job_id)
    _check_gone(family, request.app[STORE])
    request.app[LIMITER].check_re_export(
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
    """Raises where any job of the export is under way, or has its package still; the newest is named."""
    for present in family:
        named: dict[str, object] = {"jobId": present.job.job_id}
        if present.job.status not in (JobStatus.COMPLETED, JobStatus.FAILED):
            raise ExportInProgress(extra=named)
        if present.job.package_state is PackageState.AVAILABLE and _is_there(store, present):
            raise PackageAvailable(extra=named)


def _seconds_until_retry(family: list[JobDetails]) -> float:
    """How long to wait since the newest re-exports of the family have failed, one after the other."""
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


def describe_job(details: JobDetails) -> dict[str, object]:
    """A job's JSON document."""
    job = details.job
    state = job.package_state
    return {
        "jobId": job.job_id,
        "userId": job.user_id,
        "tool": job.tool_name,
        "status": job.status,
        "percent": details.percent,
        "failureReason": details.failure_reason,
        "createdAt": details.created_at,
        "completedAt": job.completed_at,
        "downloadCount": details.download_count,
        "lastDownloadedAt": details.last_downloaded_at,
        "reExportOf": details.re_export_of,
        "reExportedAs": details.re_exported_as,
        "package": state
        and {
            "state": state,
            "sizeBytes": job.package_size_bytes,
            "size": None if job.package_size_bytes is None else format_size(job.package_size_bytes),
            "sha256": job.package_sha256,
            "fileName": job.completed_at
            and package_filename(job.tool_name, last_modified(job.completed_at, job.read_at).date()),
            "expiresAt": job.package_expires_at,
        },
    }


def _answer(
    document: dict[str, object], *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store", **(headers or {})},
    )


def _limit(text: str | None) -> int:
    if text is None:
        return _PAGE_SIZE
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= _LARGEST_PAGE):
        raise InvalidParameter(extra={"parameter": "limit"})
    return int(text)


def _status(text: str | None) -> str | None:
    if text is not None and text not in list(JobStatus):
        raise InvalidParameter(extra={"parameter": "status"})
    return text


def _cursor(details: JobDetails) -> str:
    assert details.created_at is not None
    text = f"{details.created_at.isoformat()} {details.job.job_id}"
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def _parse_cursor(text: str | None) -> tuple[datetime, UUID] | None:
    if text is None:
        return None
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
        created_at, _, job_id = decoded.partition(" ")
        before = datetime.fromisoformat(created_at)
        if before.tzinfo is None:
            raise ValueError("no zone")
        # PostgreSQL knows fewer zones than Python: none from +16:00 on.
        return before.astimezone(UTC), UUID(job_id)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise InvalidParameter(extra={"parameter": "cursor"}) from error

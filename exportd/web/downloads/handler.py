"""GET and HEAD of a package: the one handler this project exists for.

It reads as the download flows: who asks, which job, may they, open, plan, deliver, record.
"""

import asyncio
import time
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import structlog
from aiohttp import web

from exportd.counting.ledger import DownloadLedger
from exportd.db.expiry import has_unfinished_download
from exportd.db.jobs import JobFinder
from exportd.db.links import Link, mark_begun
from exportd.delivery.progress import Progress
from exportd.delivery.response import DeliveryOptions, deliver
from exportd.domain.delivery import Delivery, DownloadEvent, Failure, Method, Outcome
from exportd.domain.job import Job
from exportd.domain.permission import Decision, decide_download
from exportd.domain.principal import Principal
from exportd.domain.sizes import format_size, size_range
from exportd.http.body import Segment, frame_body
from exportd.http.content_disposition import content_disposition
from exportd.http.plan import Plan, Representation, RequestFields, plan_response
from exportd.http.validators import (
    entity_tag,
    http_date,
    identity_tag,
    last_modified,
    repr_digest,
    wants_digest,
)
from exportd.limits.board import Entry
from exportd.storage.files import OpenPackage, PackageMissing, PackageStore, PackageUnusable
from exportd.web.edge.access import (
    DATABASE,
    authenticate,
    find_requested_link,
    link_principal,
    refuse,
    refuse_link,
    requested_job_id,
)
from exportd.web.edge.boundary import METRICS, RECEIVED_AT, REQUEST_ID
from exportd.web.edge.errors import (
    ApiError,
    FileNotFound,
    JobNotFound,
    LinkExpired,
    PackageExpired,
    PackageNotReady,
    PreconditionFailed,
    RangeNotSatisfiable,
    StorageError,
)
from exportd.web.edge.limits import CLIENT, LIMITER
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented

log = structlog.get_logger()

JOBS = web.AppKey("jobs", JobFinder)
LEDGER = web.AppKey("ledger", DownloadLedger)
STORE = web.AppKey("store", PackageStore)
DELIVERY_OPTIONS = web.AppKey("delivery_options", DeliveryOptions)
MAX_RANGES = web.AppKey("max_ranges", int)
# How long after its expiry a download of a package may be resumed.
RESUME_GRACE = web.AppKey("resume_grace", timedelta)

# Why downloads fail, as metrics tell it: before their delivery, in it, and by a defect of ours.
FAILURE_REASONS = ("missing", "unusable", "suspect", *Failure, "defect")

_CONTENT_TYPE = "application/gzip"
_LONGEST_USER_AGENT = 256


@documented(operations.DOWNLOAD)
async def download_package(request: web.Request) -> web.StreamResponse:
    """Sends the package of a completed job to its creator or an admin, or by a link that one of them made."""
    job_id = requested_job_id(request)
    link = await find_requested_link(request, job_id)
    principal = link_principal(link) if link else await authenticate(request)
    job = await request.app[JOBS].find_job(job_id)
    if job is None:
        raise JobNotFound
    too_late = await check_permission(request, principal, job)
    if link is not None:
        too_late = await _check_link(request, link, principal, job) or too_late
    with open_package(request, job) as package:
        representation = _describe(job, package)
        fields, max_ranges = _request_fields(request), request.app[MAX_RANGES]
        plan = plan_response(request.method, fields, representation, max_ranges)
        match plan.status:
            case 304:
                headers = _caching_headers(representation, principal) | _sunset(request, job)
                return web.Response(status=304, headers=headers)
            case 412:
                raise PreconditionFailed
            case 416:
                raise RangeNotSatisfiable(headers={"Content-Range": f"bytes */{package.size_bytes}"})
            case 200 if too_late is not None and request.method == "GET":
                raise too_late
        body = frame_body(plan.status, plan.parts, package.size_bytes, _CONTENT_TYPE)
        headers = _package_headers(request, job, representation, principal) | body.headers
        response = web.StreamResponse(status=plan.status, headers=headers)
        if request.method == "HEAD":
            return response
        if link is not None:
            await mark_begun(request.app[DATABASE], link)
        return await _deliver(request, response, principal, job, package, plan, body.segments)


async def check_permission(
    request: web.Request, principal: Principal, job: Job, *, may_resume: bool = True
) -> ApiError | None:
    """Raises what a principal is answered who may not download the package now.

    ``may_resume``: of an expired one, what was begun may be resumed for the grace time. Then this returns
    what to answer should the request turn out to ask for the whole package again.
    """
    match decide_download(principal, job, request.app[RESUME_GRACE]):
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
            request.app[METRICS].download_refused("suspect")
            raise StorageError
        case Decision.ALLOWED:
            return None


async def _is_resume(request: web.Request, principal: Principal, job: Job) -> bool:
    """Whether the request may go on with a download that the principal began, or asks how to (HEAD)."""
    if request.method != "HEAD" and "Range" not in request.headers:
        return False
    await request.app[LEDGER].settle(job.job_id)
    return await has_unfinished_download(request.app[DATABASE], job.job_id, principal.user_id)


async def _check_link(request: web.Request, link: Link, principal: Principal, job: Job) -> ApiError | None:
    """Raises LinkExpired where the link's time is up, or the package is not the one it was made for.

    Returns it where the link may only resume what it began.
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
    """The job's package, for the caller to close. Raises FileNotFound and StorageError."""
    assert job.package_path is not None
    try:
        return request.app[STORE].open(job.package_path, job.package_size_bytes)
    except PackageMissing as error:
        log.error("download_failed", reason="file not found", package_size_bytes=job.package_size_bytes)
        request.app[METRICS].download_refused("missing")
        raise FileNotFound from error
    except PackageUnusable as error:
        log.error("download_failed", reason=str(error), package_size_bytes=job.package_size_bytes)
        request.app[METRICS].download_refused("unusable")
        raise StorageError from error


def _describe(job: Job, package: OpenPackage) -> Representation:
    if job.package_sha256 is None:
        etag = identity_tag(package.device, package.inode, package.size_bytes, package.modified_ns)
    else:
        etag = entity_tag(job.package_sha256)
    modified = job.completed_at or datetime.fromtimestamp(package.modified_ns // 10**9, UTC)
    return Representation(package.size_bytes, etag, last_modified(modified, job.read_at))


def _request_fields(request: web.Request) -> RequestFields:
    return RequestFields(
        range=_field(request, "Range"),
        if_range=_field(request, "If-Range"),
        if_match=_field(request, "If-Match"),
        if_none_match=_field(request, "If-None-Match"),
        if_modified_since=_field(request, "If-Modified-Since"),
        if_unmodified_since=_field(request, "If-Unmodified-Since"),
    )


def _field(request: web.Request, name: str) -> str | None:
    values = request.headers.getall(name, None)
    return None if values is None else ", ".join(values)


def _caching_headers(package: Representation, principal: Principal) -> dict[str, str]:
    """What a 304 must repeat of the 200 (RFC 9110, section 15.4.5)."""
    if principal.by_link:
        # A cache must ask each time: the link may be revoked.
        return {"ETag": package.etag, "Cache-Control": "private, no-cache"}
    # One browser may serve several people: without Vary its cache hands a package to any of them.
    return {"ETag": package.etag, "Cache-Control": "private, max-age=3600", "Vary": "Authorization"}


def _package_headers(
    request: web.Request, job: Job, package: Representation, principal: Principal
) -> dict[str, str]:
    headers = {
        "Content-Disposition": content_disposition(job.tool_name, package.last_modified.date()),
        "Accept-Ranges": "bytes",
        "Last-Modified": http_date(package.last_modified),
        "X-Package-Size": format_size(package.size),
        # nginx in front would otherwise spool the body to disk and cut it at 1 GB.
        "X-Accel-Buffering": "no",
    }
    headers |= _caching_headers(package, principal) | _sunset(request, job)
    if job.package_sha256 is not None and wants_digest(_field(request, "Want-Repr-Digest")):
        headers["Repr-Digest"] = repr_digest(job.package_sha256)
    return headers


def _sunset(request: web.Request, job: Job) -> dict[str, str]:
    """Until when the package is to be had (RFC 8594)."""
    expires_at = job.package_expires_at
    if expires_at is None:
        return {}
    if job.read_at >= expires_at:
        expires_at += request.app[RESUME_GRACE]
    return {"Sunset": http_date(expires_at)}


async def _deliver(
    request: web.Request,
    response: web.StreamResponse,
    principal: Principal,
    job: Job,
    package: OpenPackage,
    plan: Plan,
    segments: Sequence[Segment],
) -> web.StreamResponse:
    limiter = request.app[LIMITER]
    if plan.status == 206:
        limiter.check_range(principal, job.job_id, plan.body_length)
    with limiter.delivery(principal, job.job_id) as entry:
        return await _deliver_recorded(request, response, principal, job, package, plan, segments, entry)


async def _deliver_recorded(
    request: web.Request,
    response: web.StreamResponse,
    principal: Principal,
    job: Job,
    package: OpenPackage,
    plan: Plan,
    segments: Sequence[Segment],
    entry: Entry,
) -> web.StreamResponse:
    progress = Progress()
    started_at, started = datetime.now(UTC), time.monotonic()
    ledger = request.app[LEDGER]
    event_id = uuid.uuid4()

    def describe(outcome: Outcome, reason: str | None, method: Method | None) -> DownloadEvent:
        return DownloadEvent(
            event_id=event_id,
            job_id=job.job_id,
            user_id=principal.user_id,
            started_at=started_at,
            duration_seconds=time.monotonic() - started,
            outcome=outcome,
            http_status=plan.status,
            requested=tuple((part.start, part.stop) for part in plan.parts),
            # Of a package that changed, nothing can be trusted.
            received=() if outcome == Outcome.CHANGED else _first_bytes(plan, progress.bytes_acknowledged),
            bytes_sent=progress.bytes_sent,
            package_size_bytes=package.size_bytes,
            request_id=request[REQUEST_ID],
            bytes_acknowledged=progress.bytes_acknowledged,
            reason=reason,
            method=method,
            daemon_id=ledger.daemon_id,
        )

    running = describe(Outcome.RUNNING, None, None)
    await request.app[LIMITER].reserve(request.app[DATABASE], principal, running)
    log.debug("download_started", package_size_bytes=package.size_bytes, status=plan.status)
    with ledger.checkpoints(lambda: describe(Outcome.RUNNING, None, None), lambda: progress.bytes_sent):
        delivery = await _deliver_counted(request, response, package, segments, progress, entry)
        event = describe(delivery.outcome, delivery.reason, delivery.method)
        recording = ledger.record(event)
    try:
        await _conclude(recording, event)
    finally:
        _log_end(request, plan, delivery, event)
    if delivery.reason == "shutdown":
        raise asyncio.CancelledError
    return response


async def _deliver_counted(
    request: web.Request,
    response: web.StreamResponse,
    package: OpenPackage,
    segments: Sequence[Segment],
    progress: Progress,
    entry: Entry,
) -> Delivery:
    """As ``deliver``, with its start and its end in the metrics."""
    metrics = request.app[METRICS]
    metrics.download_started()
    try:
        delivery = await deliver(
            request, response, package, segments, request.app[DELIVERY_OPTIONS], progress, entry
        )
    except BaseException:
        metrics.download_failed("defect")
        raise
    if delivery.failure is None:
        metrics.download_completed(
            size_range(delivery.bytes_sent), delivery.bytes_sent, delivery.duration_seconds
        )
    else:
        metrics.download_failed(delivery.failure)
    return delivery


def _first_bytes(plan: Plan, count: int) -> tuple[tuple[int, int], ...]:
    """The first ``count`` bytes of the package's parts that were asked for, as (start, stop)."""
    parts = []
    for part in plan.parts:
        length = min(part.length, count)
        if length:
            parts.append((part.start, part.start + length))
        count -= length
    return tuple(parts)


async def _conclude(recording: asyncio.Future[None], event: DownloadEvent) -> None:
    """Waits for the record before the handler ends: nothing else is answered on this connection, and it is
    not closed, until the count is durable. A shutdown may cancel the handler, and not the record.

    Nothing is raised but cancellation: the answer is out, and an error page would become a second one.
    """
    cancelled = False
    while not recording.done():
        try:
            await asyncio.wait([recording])
        except asyncio.CancelledError:
            cancelled = True
    if error := recording.exception():
        log.error("download_not_recorded", exc_info=error, event_id=str(event.event_id))
    elif event.outcome == Outcome.CHANGED:
        log.error("package_suspect")
    if cancelled:
        raise asyncio.CancelledError


def _log_end(request: web.Request, plan: Plan, delivery: Delivery, event: DownloadEvent) -> None:
    first_byte = delivery.first_byte_at and round(delivery.first_byte_at - request[RECEIVED_AT], 6)
    fields = {
        "outcome": event.outcome,
        "status": event.http_status,
        "package_size_bytes": event.package_size_bytes,
        "range": ",".join(f"{part.start}-{part.stop - 1}" for part in plan.parts)
        if plan.status == 206
        else None,
        "bytes_requested": sum(part.length for part in plan.parts),
        "bytes_sent": event.bytes_sent,
        "bytes_acknowledged": event.bytes_acknowledged,
        "duration_seconds": round(delivery.duration_seconds, 6),
        "first_byte_seconds": first_byte,
        "bytes_per_second": round(event.bytes_acknowledged / max(delivery.duration_seconds, 1e-6)),
        "method": delivery.method,
        "client": request[CLIENT],
        "user_agent": request.headers.get("User-Agent", "")[:_LONGEST_USER_AGENT],
    }
    match event.outcome:
        case Outcome.COMPLETED:
            log.info("download_completed", **fields)
        case Outcome.ABORTED:
            log.info("download_aborted", reason=event.reason, **fields)
        case _:
            log.error("download_failed", reason=event.reason, **fields)

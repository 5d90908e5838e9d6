"""GET and HEAD of a package: the one handler this project exists for.

It reads as the download flows: who asks, which job, may they, open, plan, deliver, record.
"""

import asyncio
import uuid
from datetime import UTC, datetime

import structlog
from aiohttp import web

from exportd.api.access import authenticate, refuse, requested_job_id
from exportd.api.errors import (
    ApiError,
    FileNotFound,
    JobNotFound,
    PackageExpired,
    PackageNotReady,
    RangeNotSatisfiable,
    StorageError,
)
from exportd.api.middleware import REQUEST_ID
from exportd.auth.permission import Decision, decide_download
from exportd.auth.principal import Principal
from exportd.db.downloads import record_download
from exportd.db.jobs import find_job
from exportd.db.pool import Database, DatabaseUnavailable
from exportd.db.rows import DownloadEvent, Job
from exportd.delivery.outcome import Delivery
from exportd.delivery.response import DeliveryOptions, deliver
from exportd.http.content_disposition import content_disposition
from exportd.http.plan import Plan, plan_response
from exportd.http.sizes import format_size
from exportd.http.validators import entity_tag, identity_tag, last_modified, repr_digest
from exportd.packages.store import OpenPackage, PackageMissing, PackageStore, PackageUnusable

log = structlog.get_logger()

DATABASE = web.AppKey("database", Database)
STORE = web.AppKey("store", PackageStore)
DELIVERY_OPTIONS = web.AppKey("delivery_options", DeliveryOptions)

# How long the record of a delivery's end may take; it goes on even while the daemon stops.
_RECORD_TIMEOUT_SECONDS = 15.0


async def download_package(request: web.Request) -> web.StreamResponse:
    """Sends the package of a completed job to its creator or an admin."""
    job_id = requested_job_id(request)
    principal = authenticate(request)
    job = await find_job(request.app[DATABASE], job_id)
    if job is None:
        raise JobNotFound
    _check_permission(principal, job)
    with _open_package(request.app[STORE], job) as package:
        plan = plan_response(request.method, request.headers.getall("Range", []), package.size_bytes)
        if plan.status == RangeNotSatisfiable.status:
            raise RangeNotSatisfiable(headers=plan.headers)
        headers = {**_package_headers(job, package), **plan.headers}
        response = web.StreamResponse(status=plan.status, headers=headers)
        if request.method == "HEAD":
            return response
        return await _deliver(request, response, principal, job, package, plan)


def _check_permission(principal: Principal, job: Job) -> None:
    match decide_download(principal, job, job.read_at):
        case Decision.UNAUTHORIZED:
            raise refuse(job.user_id)
        case Decision.NOT_READY:
            raise _denied(PackageNotReady(extra={"jobStatus": job.status}))
        case Decision.EXPIRED:
            expires_at = job.package_expires_at and job.package_expires_at.isoformat()
            raise _denied(PackageExpired(extra={"expiresAt": expires_at}))
        case Decision.ALLOWED:
            pass


def _denied(error: ApiError) -> ApiError:
    log.info("download_denied", reason=error.code)
    return error


def _open_package(store: PackageStore, job: Job) -> OpenPackage:
    assert job.package_path is not None
    try:
        return store.open(job.package_path, job.package_size_bytes)
    except PackageMissing as error:
        log.error("download_failed", reason="file not found", package_size_bytes=job.package_size_bytes)
        raise FileNotFound from error
    except PackageUnusable as error:
        log.error("download_failed", reason=str(error), package_size_bytes=job.package_size_bytes)
        raise StorageError from error


def _package_headers(job: Job, package: OpenPackage) -> dict[str, str]:
    modified = job.completed_at or datetime.fromtimestamp(package.modified_ns // 10**9, UTC)
    headers = {
        "Content-Type": "application/gzip",
        "Content-Disposition": content_disposition(job.tool_name, modified.date()),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
        "Last-Modified": last_modified(min(modified, job.read_at)),
        "X-Package-Size": format_size(package.size_bytes),
        # nginx in front would otherwise spool the body to disk and cut it at 1 GB.
        "X-Accel-Buffering": "no",
    }
    if job.package_sha256 is None:
        headers["ETag"] = identity_tag(package.device, package.inode, package.size_bytes, package.modified_ns)
    else:
        headers["ETag"] = entity_tag(job.package_sha256)
        headers["Repr-Digest"] = repr_digest(job.package_sha256)
    return headers


async def _deliver(
    request: web.Request,
    response: web.StreamResponse,
    principal: Principal,
    job: Job,
    package: OpenPackage,
    plan: Plan,
) -> web.StreamResponse:
    started_at = datetime.now(UTC)
    log.info(
        "download_started",
        package_size_bytes=package.size_bytes,
        bytes_requested=plan.body_length,
        status=plan.status,
    )
    parts = [(part.start, part.length) for part in plan.parts]
    delivery = await deliver(request, response, package.descriptor, parts, request.app[DELIVERY_OPTIONS])
    _log_end(delivery, package, plan)
    event = DownloadEvent(
        event_id=uuid.uuid4(),
        job_id=job.job_id,
        user_id=principal.user_id,
        started_at=started_at,
        duration_seconds=delivery.duration_seconds,
        outcome=delivery.outcome,
        http_status=plan.status,
        requested=tuple((part.start, part.stop) for part in plan.parts),
        bytes_sent=delivery.bytes_sent,
        package_size_bytes=package.size_bytes,
        request_id=request[REQUEST_ID],
        is_whole=delivery.outcome == "completed" and plan.body_length == package.size_bytes,
    )
    await _record(request.app[DATABASE], event)
    if delivery.reason == "shutdown":
        raise asyncio.CancelledError
    return response


async def _record(database: Database, event: DownloadEvent) -> None:
    """Writes the event before the handler ends: nothing else is answered on this connection, and it is not
    closed, until the count is durable. Shielded, because a shutdown may cancel the handler meanwhile."""
    writing = asyncio.ensure_future(
        asyncio.wait_for(record_download(database, event), _RECORD_TIMEOUT_SECONDS)
    )
    try:
        await asyncio.shield(writing)
    except asyncio.CancelledError:
        await asyncio.wait([writing])
        raise
    except (DatabaseUnavailable, TimeoutError) as error:
        log.error(
            "download_not_recorded", error=str(error), event_id=str(event.event_id), outcome=event.outcome
        )


def _log_end(delivery: Delivery, package: OpenPackage, plan: Plan) -> None:
    fields = {
        "package_size_bytes": package.size_bytes,
        "bytes_requested": plan.body_length,
        "bytes_sent": delivery.bytes_sent,
        "duration_seconds": round(delivery.duration_seconds, 6),
        "bytes_per_second": round(delivery.bytes_sent / max(delivery.duration_seconds, 1e-6)),
        "method": delivery.method,
    }
    match delivery.outcome:
        case "completed":
            log.info("download_completed", **fields)
        case "aborted":
            log.info("download_aborted", reason=delivery.reason, **fields)
        case _:
            log.error("download_failed", reason=delivery.reason, **fields)

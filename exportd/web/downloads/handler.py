"""GET and HEAD of a package: the handler that this project exists for.

It reads in the order of a download: authenticate, find the job, check permission, open, plan, deliver,
record.
"""

import asyncio
from datetime import UTC, datetime

from aiohttp import web

from exportd.db.links import mark_begun
from exportd.domain.job import Job
from exportd.http.body import frame_body
from exportd.http.plan import Representation, RequestFields, plan_response
from exportd.http.validators import entity_tag, last_modified, sample_tag
from exportd.storage.files import OpenPackage
from exportd.web.downloads.admission import check_link, check_permission, open_package
from exportd.web.downloads.headers import caching_headers, package_headers, sunset_header
from exportd.web.downloads.recording import RecordedDelivery
from exportd.web.edge.access import (
    authenticate,
    find_requested_link,
    link_principal,
    requested_job_id,
)
from exportd.web.edge.errors import JobNotFound, PreconditionFailed, RangeNotSatisfiable
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES

_CONTENT_TYPE = "application/gzip"


@documented(operations.DOWNLOAD)
async def download_package(request: web.Request) -> web.StreamResponse:
    """Sends the package of a completed job to its creator or an admin, or by a link that one of them made."""
    services = request.app[SERVICES]
    settings, resume_grace = services.settings, services.settings.retention.resume_grace
    job_id = requested_job_id(request)
    link = await find_requested_link(request, job_id)
    principal = link_principal(link) if link else await authenticate(request)
    job = await services.jobs.find_job(job_id)
    if job is None:
        raise JobNotFound
    too_late = await check_permission(request, principal, job)
    if link is not None:
        too_late = await check_link(request, link, principal, job) or too_late
    with open_package(request, job) as package:
        representation = await _describe(job, package)
        plan = plan_response(
            request.method, _request_fields(request), representation, settings.download.max_ranges
        )
        match plan.status:
            case 304:
                headers = caching_headers(representation, principal) | sunset_header(job, resume_grace)
                return web.Response(status=304, headers=headers)
            case 412:
                raise PreconditionFailed
            case 416:
                raise RangeNotSatisfiable(headers={"Content-Range": f"bytes */{package.size_bytes}"})
            case 200 if too_late is not None and request.method == "GET":
                raise too_late
        body = frame_body(plan.status, plan.parts, package.size_bytes, _CONTENT_TYPE)
        wanted = _field(request, "Want-Repr-Digest")
        headers = package_headers(job, representation, principal, resume_grace, wanted) | body.headers
        response = web.StreamResponse(status=plan.status, headers=headers)
        if request.method == "HEAD":
            return response
        if link is not None:
            await mark_begun(services.database, link)
        return await RecordedDelivery(request, principal, job, package, plan).send(response, body.segments)


async def _describe(job: Job, package: OpenPackage) -> Representation:
    if job.package_sha256 is None:
        etag = sample_tag(package.size_bytes, await asyncio.to_thread(package.sample))
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

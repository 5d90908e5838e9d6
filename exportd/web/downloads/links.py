"""Download links: addresses that need no token, for a browser's own download manager."""

import secrets

import orjson
import structlog
from aiohttp import web

from exportd.db.links import make_link, revoke_links
from exportd.domain.permission import may_see
from exportd.web.downloads.admission import check_permission, open_package
from exportd.web.edge.access import authenticate, refuse, requested_job_id, ticket_digest
from exportd.web.edge.errors import JobNotFound
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES

log = structlog.get_logger()

_TICKET_BYTES = 32


@documented(operations.MAKE_LINK)
async def make_download_link(request: web.Request) -> web.Response:
    """Makes a link that downloads the package as the caller, if the caller may download it now."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    job = await request.app[SERVICES].jobs.find_job(job_id)
    if job is None:
        raise JobNotFound
    await check_permission(request, principal, job, may_resume=False)
    with open_package(request, job):
        pass
    # Report now what a download would be rejected for: a browser's download manager does not show it.
    limiter = request.app[SERVICES].limiter
    await limiter.check_quota(request.app[SERVICES].database, principal)
    with limiter.delivery(principal, job_id):
        pass
    ticket = secrets.token_urlsafe(_TICKET_BYTES)
    services = request.app[SERVICES]
    start_until, resume_until = await make_link(
        services.database, ticket_digest(ticket), job, principal, services.settings.links
    )
    log.info("download_link_made", expires_at=start_until.isoformat(), resume_until=resume_until.isoformat())
    document = {
        "url": f"{request.rel_url.raw_path.removesuffix('-link')}?ticket={ticket}",
        "expiresAt": start_until,
        "resumeUntil": resume_until,
    }
    return web.Response(
        status=201,
        body=orjson.dumps(document),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


@documented(operations.REVOKE_LINKS)
async def revoke_download_links(request: web.Request) -> web.Response:
    """Revokes the links to a package: all of them for its creator and for admins; for other users the links
    that they made."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    job = await request.app[SERVICES].jobs.find_job(job_id)
    if job is None:
        raise JobNotFound
    is_entitled = may_see(principal, job.user_id)
    count = await revoke_links(
        request.app[SERVICES].database, job_id, None if is_entitled else principal.user_id
    )
    if not count and not is_entitled:
        raise refuse(request, job.user_id)
    log.info("download_links_revoked", count=count)
    return web.Response(status=204, headers={"Cache-Control": "no-store"})

"""One job."""

from aiohttp import web

from exportd.db.job_details import find_details
from exportd.domain.permission import may_see
from exportd.web.edge.access import authenticate, refuse, requested_job_id
from exportd.web.edge.errors import JobNotFound
from exportd.web.jobs.document import describe_job, job_response
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES


@documented(operations.SHOW_JOB)
async def show_export_job(request: web.Request) -> web.Response:
    """Returns one job, to its creator or an admin."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    details = (await find_details(request.app[SERVICES].database, [job_id])).get(job_id)
    if details is None:
        raise JobNotFound
    if not may_see(principal, details.job.user_id):
        raise refuse(request, details.job.user_id)
    return job_response(describe_job(details))

"""How often a package was downloaded."""

import orjson
from aiohttp import web

from exportd.api.access import authenticate, refuse, requested_job_id
from exportd.api.download import DATABASE, LEDGER
from exportd.api.errors import JobNotFound
from exportd.auth.permission import may_see
from exportd.db.jobs import find_statistics


async def download_statistics(request: web.Request) -> web.Response:
    """The count, the last time and the bytes of a job's downloads, for its creator or an admin."""
    job_id = requested_job_id(request)
    principal = authenticate(request)
    await request.app[LEDGER].settle(job_id)
    statistics = await find_statistics(request.app[DATABASE], job_id)
    if statistics is None:
        raise JobNotFound
    if not may_see(principal, statistics.user_id):
        raise refuse(statistics.user_id)
    body = {
        "jobId": statistics.job_id,
        "downloadCount": statistics.download_count,
        "lastDownloadedAt": statistics.last_downloaded_at,
        "bytesServed": statistics.bytes_served,
    }
    return web.Response(
        body=orjson.dumps(body), content_type="application/json", headers={"Cache-Control": "no-store"}
    )

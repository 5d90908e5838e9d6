"""Download statistics of a package."""

import orjson
from aiohttp import web

from exportd.db.statistics import find_statistics
from exportd.domain.permission import may_see
from exportd.domain.sizes import LOWER_BOUNDS, SIZE_RANGES
from exportd.domain.statistics import DownloadStatistics
from exportd.web.edge.access import authenticate, refuse, requested_job_id
from exportd.web.edge.errors import JobNotFound
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES


@documented(operations.STATISTICS)
async def download_statistics(request: web.Request) -> web.Response:
    """Returns the statistics of a job's package, to its creator or an admin."""
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    await request.app[SERVICES].ledger.settle(job_id)
    statistics = await find_statistics(request.app[SERVICES].database, job_id, LOWER_BOUNDS)
    if statistics is None:
        raise JobNotFound
    assert statistics.user_id is not None
    if not may_see(principal, statistics.user_id):
        raise refuse(request, statistics.user_id)
    return web.Response(
        body=orjson.dumps(describe_statistics(statistics)),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )


def describe_statistics(statistics: DownloadStatistics) -> dict[str, object]:
    """Returns the JSON document."""
    return {
        "jobId": statistics.job_id,
        "downloadCount": statistics.download_count,
        "lastDownloadedAt": statistics.last_downloaded_at,
        "bytesServed": statistics.bytes_served,
        "uniqueUsers": statistics.unique_users,
        "bySize": [
            {
                "size": SIZE_RANGES[item.range_number],
                "downloads": item.downloads,
                "averageDurationSeconds": round(item.average_duration_seconds, 6),
                "averageBytesPerSecond": round(item.average_bytes_per_second),
            }
            for item in statistics.sizes
        ],
        "failures": [
            {"outcome": item.outcome, "reason": item.reason, "count": item.count}
            for item in statistics.failures
        ],
        "recentEvents": [
            {
                "jobId": item.job_id,
                "userId": item.user_id,
                "startedAt": item.started_at,
                "outcome": item.outcome,
                "reason": item.reason,
                "status": item.http_status,
                "method": item.method,
                "bytesSent": item.bytes_sent,
                "bytesAcknowledged": item.bytes_acknowledged,
                "durationSeconds": round(item.duration_seconds, 6),
            }
            for item in statistics.recent
        ],
    }

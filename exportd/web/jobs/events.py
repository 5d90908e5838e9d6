"""The changes of a job's state, as server-sent events.

Each event carries the whole state, so that a slow or returning reader needs no history.
"""

import asyncio
import contextlib
import hashlib
import time

import orjson
import structlog
from aiohttp import web

from exportd.db.job_details import JobDetails, find_details
from exportd.domain.permission import may_see
from exportd.jobs.hub import Watch
from exportd.web.edge.access import authenticate, refuse, requested_job_id
from exportd.web.edge.errors import JobNotFound
from exportd.web.jobs.document import describe_job
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES

log = structlog.get_logger()

# How often the stream checks whether its client is connected.
_WAIT_SECONDS = 1.0
_HEARTBEAT_SECONDS = 15.0
_PATIENCE_SECONDS = 10.0
_RETRY_MILLISECONDS = 2000


@documented(operations.JOB_EVENTS)
async def job_events(request: web.Request) -> web.StreamResponse:
    """Sends a job's state now and at each change, to its creator or an admin.

    The stream ends when the token expires, at a drain, when the job is deleted, and when the client stops
    reading.
    """
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    details = (await find_details(request.app[SERVICES].database, [job_id])).get(job_id)
    if details is None:
        raise JobNotFound
    if not may_see(principal, details.job.user_id):
        raise refuse(request, details.job.user_id)
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/event-stream",
            "Cache-Control": "no-store",
            "X-Accel-Buffering": "no",
        }
    )
    response.force_close()
    hub = request.app[SERVICES].hub
    request.app[SERVICES].limiter.check_streams(principal, hub.streams_of(principal.user_id) + 1)
    with hub.watch(job_id, principal.user_id) as watch:
        # The first event is complete: clients compare later events with it.
        await hub.look([watch])
        with contextlib.suppress(ConnectionResetError):
            await response.prepare(request)
            await _send_changes(request, response, watch, principal.expires_at)
    return response


async def _send_changes(
    request: web.Request, response: web.StreamResponse, watch: Watch, expires_at: float
) -> None:
    lifecycle = request.app[SERVICES].lifecycle
    last_id = request.headers.get("Last-Event-ID")
    await response.write(f"retry: {_RETRY_MILLISECONDS}\n\n".encode())
    written_at = time.monotonic()
    while watch.details is not None and not lifecycle.is_draining and time.time() < expires_at:
        state = orjson.dumps(_describe(watch, watch.details))
        state_id = hashlib.sha256(state).hexdigest()[:16]
        line = None
        if state_id != last_id:
            line = b"event: job\nid: %b\ndata: %b\n\n" % (state_id.encode(), state)
        elif time.monotonic() - written_at >= _HEARTBEAT_SECONDS:
            line = b": still here\n\n"
        if line is not None:
            try:
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await response.write(line)
            except TimeoutError:
                log.info("job_events_reader_dropped")
                if request.transport is not None:
                    request.transport.abort()
                return
            last_id, written_at = state_id, time.monotonic()
        elif request.transport is None or request.transport.is_closing():
            return
        watch.changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_WAIT_SECONDS):
                await watch.changed.wait()


def _describe(watch: Watch, details: JobDetails) -> dict[str, object]:
    return describe_job(details) | {
        "bytesReceived": watch.received,
        "downloads": [
            {
                "downloadId": item.event_id,
                "startedAt": item.started_at,
                "bytesRequested": item.bytes_requested,
                "bytesAcknowledged": item.bytes_acknowledged,
            }
            for item in watch.downloads
        ],
    }

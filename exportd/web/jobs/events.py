"""A job's state as it changes, as server-sent events.

Each event carries the whole present state, so that a reader who is slow, or comes again, needs no history.
One hub in each process looks once a second at all jobs that somebody watches, whatever their number.
"""

import asyncio
import contextlib
import hashlib
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Iterator
from uuid import UUID

import orjson
import structlog
from aiohttp import web

from exportd.counting.ledger import DownloadLedger
from exportd.db.job_details import (
    JobDetails,
    RunningDownload,
    find_details,
    find_details_in_progress,
    find_running_downloads,
)
from exportd.db.pool import Database, DatabaseRefused, DatabaseUnavailable
from exportd.domain.delivery import DownloadEvent
from exportd.domain.permission import may_see
from exportd.web.downloads.handler import LEDGER
from exportd.web.edge.access import DATABASE, authenticate, refuse, requested_job_id
from exportd.web.edge.boundary import LIFECYCLE
from exportd.web.edge.errors import JobNotFound
from exportd.web.edge.limits import LIMITER
from exportd.web.jobs.list import describe_job
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented

log = structlog.get_logger()

_LOOK_SECONDS = 1.0
# Of a job to one user; the newest are told.
_MOST_DOWNLOADS = 32
_HEARTBEAT_SECONDS = 15.0
_PATIENCE_SECONDS = 10.0
_RETRY_MILLISECONDS = 2000


class Watch:
    """One reader's view of a job: the latest that the hub saw."""

    def __init__(self, job_id: UUID, user_id: str) -> None:
        self.job_id = job_id
        self.user_id = user_id
        self.details: JobDetails | None = None
        self.downloads: list[RunningDownload] = []
        # What the reader has of the package, of deliveries that ended.
        self.received = 0
        self.changed = asyncio.Event()


class JobHub:
    """Looks at the jobs that are watched. Idle while none is."""

    def __init__(self, database: Database, ledger: DownloadLedger) -> None:
        self._database = database
        self._ledger = ledger
        self._watches: set[Watch] = set()
        self._is_watched = asyncio.Event()

    @contextlib.contextmanager
    def watch(self, job_id: UUID, user_id: str) -> Iterator[Watch]:
        """A user's view of the job that is kept up to date while the block lasts."""
        watch = Watch(job_id, user_id)
        self._watches.add(watch)
        self._is_watched.set()
        try:
            yield watch
        finally:
            self._watches.discard(watch)
            if not self._watches:
                self._is_watched.clear()

    async def run(self) -> None:
        """Looks until it is cancelled."""
        while True:
            await self._is_watched.wait()
            try:
                await self.look(self._watches)
            except (DatabaseUnavailable, DatabaseRefused) as error:
                # Readers keep what they have; it goes on when the database is back.
                log.warning("job_events_delayed", error=str(error))
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self, watches: Collection[Watch]) -> None:
        """Brings those views up to date. Raises DatabaseUnavailable."""
        watched = list({watch.job_id for watch in watches})
        # In this order: one that ends meanwhile may seem to run for a moment longer, and never to have ended
        # with nothing to show for it. This process's own are known to the moment, and before they are rows.
        own = [_as_it_runs(event) for event in self._ledger.running(watched)]
        written = await find_running_downloads(self._database, watched)
        await self._ledger.finish_recording(watched)
        found = await find_details_in_progress(self._database, watched)
        downloads: dict[tuple[UUID, str], list[RunningDownload]] = defaultdict(list)
        for item in {item.event_id: item for item in [*written, *own]}.values():
            downloads[item.job_id, item.user_id].append(item)
        for watch in watches:
            if watch.job_id in watched:
                watch.details, received = found.get(watch.job_id, (None, {}))
                watch.downloads = downloads[watch.job_id, watch.user_id][-_MOST_DOWNLOADS:]
                watch.received = received.get(watch.user_id, 0)
                watch.changed.set()

    def streams_of(self, user_id: str) -> int:
        """How many views the user has at the moment."""
        return sum(watch.user_id == user_id for watch in self._watches)


def _as_it_runs(event: DownloadEvent) -> RunningDownload:
    return RunningDownload(
        event.event_id,
        event.job_id,
        event.user_id,
        event.started_at,
        event.bytes_requested,
        event.bytes_acknowledged,
    )


HUB = web.AppKey("job_hub", JobHub)


async def watch_jobs(app: web.Application) -> AsyncIterator[None]:
    """Runs the hub while the application runs. Needs the database and the ledger."""
    app[HUB] = JobHub(app[DATABASE], app[LEDGER])
    task = asyncio.create_task(app[HUB].run())
    yield
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@documented(operations.JOB_EVENTS)
async def job_events(request: web.Request) -> web.StreamResponse:
    """A job's state now and at each change, for its creator or an admin.

    The stream ends with the token, at a drain, when the job is gone, and where the reader takes nothing.
    """
    job_id = requested_job_id(request)
    principal = await authenticate(request)
    details = (await find_details(request.app[DATABASE], [job_id])).get(job_id)
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
    hub = request.app[HUB]
    request.app[LIMITER].check_streams(principal, hub.streams_of(principal.user_id) + 1)
    with hub.watch(job_id, principal.user_id) as watch:
        # What is told first is whole: readers measure by it what comes after.
        await hub.look([watch])
        with contextlib.suppress(ConnectionResetError):
            await response.prepare(request)
            await _send_changes(request, response, watch, principal.expires_at)
    return response


async def _send_changes(
    request: web.Request, response: web.StreamResponse, watch: Watch, expires_at: float
) -> None:
    lifecycle = request.app[LIFECYCLE]
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
            async with asyncio.timeout(_LOOK_SECONDS):
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

"""The hub: follows the jobs that event streams watch.

Each process has one hub. It queries all watched jobs together, once a second.
"""

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from uuid import UUID

import structlog

from exportd.counting.ledger import DownloadLedger
from exportd.db.job_details import (
    JobDetails,
    RunningDownload,
    find_details_in_progress,
    find_running_downloads,
)
from exportd.db.pool import Database, DatabaseError
from exportd.domain.delivery import DownloadEvent

log = structlog.get_logger()

_LOOK_SECONDS = 1.0
# Of one job to one user; the newest are reported.
_MAX_DOWNLOADS = 32


class Watch:
    """One stream's view of a job, as of the hub's last query."""

    def __init__(self, job_id: UUID, user_id: str) -> None:
        self.job_id = job_id
        self.user_id = user_id
        self.details: JobDetails | None = None
        self.downloads: list[RunningDownload] = []
        # Bytes of the package that the user has, from deliveries that ended.
        self.received = 0
        self.changed = asyncio.Event()


class JobHub:
    """Queries the watched jobs. Idle while there are none."""

    def __init__(self, database: Database, ledger: DownloadLedger) -> None:
        self._database = database
        self._ledger = ledger
        self._watches: set[Watch] = set()
        self._is_watched = asyncio.Event()

    @contextlib.contextmanager
    def watch(self, job_id: UUID, user_id: str) -> Iterator[Watch]:
        """A user's view of the job, kept up to date while the block runs."""
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
        """Queries until it is cancelled."""
        while True:
            await self._is_watched.wait()
            try:
                await self.look(self._watches)
            except DatabaseError as error:
                # The views stay as they are until the database is back.
                log.warning("job_events_delayed", error=str(error))
            await asyncio.sleep(_LOOK_SECONDS)

    async def look(self, watches: Collection[Watch]) -> None:
        """Updates the views. Raises DatabaseUnavailable."""
        watched = list({watch.job_id for watch in watches})
        # The order matters: a delivery that ends meanwhile may seem to run for a moment longer, but its bytes
        # are never missing. The ledger knows this process's own deliveries to the byte, even before they are
        # rows.
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
                watch.downloads = downloads[watch.job_id, watch.user_id][-_MAX_DOWNLOADS:]
                watch.received = received.get(watch.user_id, 0)
                watch.changed.set()

    def streams_of(self, user_id: str) -> int:
        """The number of the user's views."""
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

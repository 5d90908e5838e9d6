"""Replays spooled events, job by job, and finishes the deliveries of processes that were killed.

If the database rejects the events of a job, or its row is locked, the events of other jobs do not wait.
"""

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import structlog

from exportd.counting.record import record_downloads
from exportd.counting.running import find_lost, write_running
from exportd.counting.spool import Spool
from exportd.db.batcher import MAX_BATCH_SIZE
from exportd.db.pool import Database, DatabaseError, DatabaseUnavailable, ValueRefused
from exportd.domain.delivery import DownloadEvent, Outcome

log = structlog.get_logger()

# The time limit of a batch. After it, the database counts as unavailable.
WRITE_TIMEOUT_SECONDS = 2.0
# A delivery of another machine's daemon is lost after this time without a checkpoint.
_LOST_AFTER_SECONDS = 600.0
_LOOK_FOR_LOST_SECONDS = 60.0
_LOG_AGAIN_SECONDS = 60.0


class Replay:
    """The spools of this process and of processes that have ended. ``running_ids`` returns the deliveries
    that this process is sending."""

    def __init__(
        self, database: Database, spool: Spool, folder: Path, running_ids: Callable[[], Collection[UUID]]
    ) -> None:
        # While True, no statement has succeeded since one failed.
        self.is_away = False
        self._database = database
        self._spool = spool
        self._folder = folder
        self._running_ids = running_ids
        self._adopted: list[Spool] = []
        # The names of unreadable files.
        self._passed_over: set[str] = set()
        # Jobs whose events the database rejected.
        self._rejected: set[UUID] = set()
        self._looked_for_lost_at = float("-inf")
        self._logged_at = float("-inf")

    @property
    def spools(self) -> Sequence[Spool]:
        """In the order in which the events of one job must be recorded."""
        return *self._adopted, self._spool

    @property
    def job_ids(self) -> set[UUID]:
        """The jobs whose events wait in a spool."""
        return {job_id for spool in self.spools for job_id in spool.job_ids}

    def __len__(self) -> int:
        """The number of spooled events."""
        return sum(map(len, self.spools))

    async def put_aside(self, events: Sequence[DownloadEvent]) -> None:
        """Spools events. If the disk does not take them, keeps them in memory and raises its error."""
        try:
            await self._spool.append(events)
        except Exception:
            self._spool.keep(events)
            raise

    async def run_once(self) -> None:
        """Replays every spool, and looks for killed processes. Logs why spooled events stay."""
        try:
            for spool in self.spools:
                await self._replay(spool)
            if self._adopted or time.monotonic() - self._looked_for_lost_at >= _LOOK_FOR_LOST_SECONDS:
                await self._finish_for_others()
        except DatabaseUnavailable as error:
            self._log_waiting(error)

    async def _replay(self, spool: Spool) -> None:
        """Of the jobs whose events the database rejected before, one is tried, last and with the full time
        limit of a statement. Raises DatabaseUnavailable if the database takes no event at all."""
        before = len(spool)
        for job_id in [job_id for job_id in spool.job_ids if job_id not in self._rejected]:
            await self._replay_job(spool, job_id, WRITE_TIMEOUT_SECONDS)
        if rejected := [job_id for job_id in spool.job_ids if job_id in self._rejected]:
            self.is_away = False
            await self._replay_job(spool, random.choice(rejected), None)  # noqa: S311  # each comes in turn
        if len(spool) < before:
            of_whom = {} if spool is self._spool else {"daemon_id": str(spool.owner)}
            log.info("spool_replayed", count=before - len(spool), **of_whom)

    async def _replay_job(self, spool: Spool, job_id: UUID, timeout_seconds: float | None) -> None:
        # The job's events in earlier spools come first.
        earlier = self.spools[: self.spools.index(spool)]
        if any(job_id in other.job_ids for other in earlier):
            return
        try:
            while events := spool.waiting(job_id)[:MAX_BATCH_SIZE]:
                async with asyncio.timeout(timeout_seconds):
                    await self._write(events)
                await spool.written(job_id, len(events))
                self.is_away = False
                if job_id in self._rejected:
                    # The cause is gone, perhaps for the other jobs too.
                    self._rejected.clear()
        except Exception as error:  # noqa: BLE001  # whatever it is, it must not hold up other jobs
            await self._check_answers()
            self._rejected.add(job_id)
            self._log_waiting(error, [job_id])

    async def _write(self, events: Sequence[DownloadEvent]) -> None:
        ends = [event for event in events if event.outcome is not Outcome.RUNNING]
        ended = {event.event_id for event in ends}
        with contextlib.suppress(ValueRefused):
            await write_running(self._database, [event for event in events if event.event_id not in ended])
        await record_or_drop(self._database, ends)

    async def _check_answers(self) -> None:
        """Raises DatabaseUnavailable."""
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_SECONDS):
                await self._database.fetch_all("SELECT 1")
        except TimeoutError as error:
            raise DatabaseUnavailable("no answer in time") from error

    async def _finish_for_others(self) -> None:
        """Replays the spools of processes that have ended, and records their running deliveries as lost.

        Raises DatabaseUnavailable and OSError. The next call retries.
        """
        found = await asyncio.to_thread(Spool.adopt, self._folder, self._passed_over)
        self._adopted += found
        for spool in found:
            await self._replay(spool)
        ended = [spool.owner for spool in self._adopted]
        lost = await find_lost(self._database, ended, _LOST_AFTER_SECONDS)
        waiting = (event for spool in self.spools for job in spool.job_ids for event in spool.waiting(job))
        known = {event.event_id for event in waiting} | set(self._running_ids())
        if lost := [event for event in lost if event.event_id not in known]:
            await self.put_aside(lost)
            for event in lost:
                log.warning("download_lost", **describe(event))
            await self._replay(self._spool)
        for spool in [spool for spool in self._adopted if not len(spool)]:
            self._adopted.remove(spool)
            spool.close()
        self._looked_for_lost_at = time.monotonic()

    def _log_waiting(self, error: BaseException, job_ids: Sequence[UUID] = ()) -> None:
        now = time.monotonic()
        if len(self) and now - self._logged_at >= _LOG_AGAIN_SECONDS:
            self._logged_at = now
            some = [str(job_id) for job_id in job_ids]
            log.warning("spool_not_drained", count=len(self), job_ids=some, **explain(error))


def explain(error: BaseException) -> dict[str, object]:
    """Describes an error in a log line. Unforeseen ones get a traceback."""
    is_foreseen = isinstance(error, DatabaseError | TimeoutError)
    return {"error": str(error) or "no answer in time"} | ({} if is_foreseen else {"exc_info": error})


async def record_or_drop(database: Database, events: Sequence[DownloadEvent]) -> None:
    """As ``record_downloads``, but logs and drops an event whose values the database rejects: a retry would
    fail again, and it must not fail the others. Raises DatabaseError.

    A text that the database's encoding cannot hold is escaped, so that the download counts.
    """
    try:
        await record_downloads(database, events)
    except ValueRefused:
        if len(events) == 1:
            escaped = _escaped(events[0])
            if escaped != events[0]:
                await record_or_drop(database, [escaped])
            else:
                log.exception("download_not_recorded", **describe(events[0]))
            return
        middle = len(events) // 2
        await record_or_drop(database, events[:middle])
        await record_or_drop(database, events[middle:])


def _escaped(event: DownloadEvent) -> DownloadEvent:
    return replace(
        event,
        user_id=_ascii(event.user_id),
        request_id=_ascii(event.request_id),
        reason=None if event.reason is None else _ascii(event.reason),
    )


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode().replace("\0", "\\x00")


def describe(event: DownloadEvent) -> dict[str, object]:
    """The event, for a log line."""
    return {
        "event_id": str(event.event_id),
        "job_id": str(event.job_id),
        "user_id": event.user_id,
        "outcome": event.outcome,
        "received": [list(part) for part in event.received],
        "bytes_sent": event.bytes_sent,
        "request_id": event.request_id,
    }

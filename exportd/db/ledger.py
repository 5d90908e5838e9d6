"""The ledger of one process: every delivery that ends is written, whatever happens to the database.

Events that come in together are written together, in one statement and so one transaction: a thousand
downloads of one hot package must not queue on its row. A lone event goes at once. Where the database is away
or takes long, events go to the spool (``db/spool.py``) and from there to the database later; each process
also finishes what processes that were killed have left. ``db/downloads.py`` holds the rule of counting.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from uuid import UUID, uuid4

import structlog

from exportd.db.downloads import (
    LARGEST_GROUP,
    checkpoint_downloads,
    find_lost,
    one_statement,
    record_downloads,
)
from exportd.db.gather import Gatherer, Observe
from exportd.db.pool import Database, DatabaseRefused, DatabaseUnavailable
from exportd.db.rows import DownloadEvent
from exportd.db.spool import Spool

log = structlog.get_logger()

# An event that is not in the database by then goes to the spool.
_SPOOL_AFTER_SECONDS = 2.0
# A delivery is written down when it has run this long, and again each time its age has grown by half, up to
# the longest pause.
_FIRST_CHECKPOINT_SECONDS = 1.0
_LONGEST_PAUSE_SECONDS = 10.0
# How often the background work looks round.
_TURN_SECONDS = 1.0
# A delivery of another machine's daemon that was not heard of for this long is lost.
_LOST_AFTER_SECONDS = 600.0
_LOOK_FOR_LOST_SECONDS = 60.0
_SETTLING_SECONDS = 0.25

Snapshot = Callable[[], DownloadEvent]


class _Running:
    """A delivery under way, and when it is due to be written down."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.began_at = time.monotonic()
        self.due_at = self.began_at + _FIRST_CHECKPOINT_SECONDS

    def put_off(self, now: float) -> None:
        self.due_at = now + min((now - self.began_at) / 2, _LONGEST_PAUSE_SECONDS)


class DownloadLedger:
    """Writes events, those that come in together as one statement. One statement is under way at a time.

    Made by ``open_ledger``.
    """

    def __init__(self, database: Database, spool: Spool, folder: Path, observe: Observe) -> None:
        self.daemon_id = spool.owner
        self._database = database
        self._spool = spool
        self._folder = folder
        self._gatherer: Gatherer[DownloadEvent, None] = Gatherer(
            self._write, one_statement, at_once=1, observe=observe
        )
        self._recording: set[asyncio.Future[None]] = set()
        self._running: set[_Running] = set()
        # What neither the database nor the disk took.
        self._homeless: list[DownloadEvent] = []
        self._looked_for_lost_at = float("-inf")
        self._background = asyncio.create_task(self._work_in_background())

    @property
    def waiting(self) -> int:
        """How many events are not written yet, and not spooled."""
        return self._gatherer.waiting

    @property
    def spooled(self) -> int:
        """How many events wait for the database."""
        return len(self._spool) + len(self._homeless)

    def record(self, event: DownloadEvent) -> asyncio.Future[None]:
        """Done once the event is durable, in the database or in the spool. Idempotent by the event's id.

        Fails with OSError where neither takes it: it is then kept in memory, and tried again.
        """
        recording = self._gatherer.submit(event)
        self._recording.add(recording)
        recording.add_done_callback(self._recording.discard)
        return recording

    @contextlib.contextmanager
    def checkpoints(self, snapshot: Snapshot) -> Iterator[None]:
        """While the block lasts, ``snapshot``'s event (outcome ``running``) is written now and then."""
        running = _Running(snapshot)
        self._running.add(running)
        try:
            yield
        finally:
            self._running.discard(running)

    def running(self, job_ids: Collection[UUID]) -> list[DownloadEvent]:
        """This process's deliveries of those jobs that are under way, as they are now."""
        events = (running.snapshot() for running in self._running)
        return [event for event in events if event.job_id in job_ids]

    async def settle(self, job_id: UUID) -> None:
        """Waits for the job's deliveries that the client has whole, so that who reads afterwards sees them.

        A client may ask for the count as soon as it has the last byte: its acknowledgement is on its way,
        or the statement. Never raises.
        """
        deadline = time.monotonic() + _SETTLING_SECONDS
        while self._is_about_to_end(job_id) and time.monotonic() < deadline:  # noqa: ASYNC110  # in the kernel
            await asyncio.sleep(0.002)
        await self.finish_recording()

    def _is_about_to_end(self, job_id: UUID) -> bool:
        return any(event.bytes_sent == event.bytes_requested for event in self.running([job_id]))

    async def finish_recording(self) -> None:
        """Waits until the deliveries that ended until now are written, in the database or the spool."""
        if self._recording:
            await asyncio.wait(set(self._recording))

    async def close(self) -> None:
        """Ends the background work. What is spooled stays there for the next process."""
        self._background.cancel()
        await asyncio.gather(self._background, return_exceptions=True)
        await self.finish_recording()
        for event in self._homeless:
            log.error("download_not_recorded", **_describe(event))
        self._spool.close()

    async def _write(self, events: list[DownloadEvent]) -> list[None]:
        if not self.spooled:
            try:
                async with asyncio.timeout(_SPOOL_AFTER_SECONDS):
                    await self._write_to_database(events)
                return [None] * len(events)
            except (DatabaseUnavailable, TimeoutError) as error:
                log.warning("events_spooled", count=len(events), error=str(error) or "no answer in time")
        try:
            await self._spool.append(events)
        except OSError:
            self._homeless += events
            raise
        return [None] * len(events)

    async def _write_to_database(self, events: list[DownloadEvent]) -> None:
        try:
            await record_downloads(self._database, events)
        except DatabaseRefused:
            if len(events) == 1:
                # Nothing that is tried later would go better; the log has it whole.
                log.exception("download_not_recorded", **_describe(events[0]))
                return
            # One that cannot be written must not cost the others.
            for event in events:
                await self._write_to_database([event])

    async def _work_in_background(self) -> None:
        while True:
            await asyncio.sleep(_TURN_SECONDS)
            try:
                await self._replay()
                await self._write_checkpoints()
                if time.monotonic() - self._looked_for_lost_at >= _LOOK_FOR_LOST_SECONDS:
                    await self.finish_for_others()
            except DatabaseUnavailable:
                pass  # told where it hurts; this is tried again
            except Exception:  # the only task that would do it must go on
                log.exception("ledger_background_failed")

    async def _replay(self) -> None:
        if not self.spooled:
            return
        count = self.spooled
        await self._spool.replay(self._write_in_groups)
        homeless = list(self._homeless)
        await self._write_in_groups(homeless)
        del self._homeless[: len(homeless)]
        log.info("spool_replayed", count=count)

    async def _write_in_groups(self, events: Sequence[DownloadEvent]) -> None:
        running = [event for event in events if event.outcome == "running"]
        for start in range(0, len(running), LARGEST_GROUP):
            await checkpoint_downloads(self._database, running[start : start + LARGEST_GROUP])
        left = [event for event in events if event.outcome != "running"]
        while left:
            may_join = one_statement()
            group = [event for event in left if may_join(event)]
            taken = {id(event) for event in group}
            left = [event for event in left if id(event) not in taken]
            await self._write_to_database(group)

    async def _write_checkpoints(self) -> None:
        now = time.monotonic()
        due = [running for running in self._running if running.due_at <= now]
        events = [running.snapshot() for running in due]
        for running in due:
            running.put_off(now)
        for start in range(0, len(events), LARGEST_GROUP):
            group = events[start : start + LARGEST_GROUP]
            try:
                await checkpoint_downloads(self._database, group)
            except DatabaseUnavailable:
                with contextlib.suppress(OSError):
                    await self._spool.append(group)
                raise

    async def finish_for_others(self) -> None:
        """Replays the spools of processes that have ended, and records the deliveries they left running.

        Raises DatabaseUnavailable, and does it all again next time.
        """
        ended: list[UUID] = []
        with contextlib.ExitStack() as stack:
            for spool in Spool.adopt(self._folder):
                stack.callback(spool.close)
                if count := len(spool):
                    await spool.replay(self._write_in_groups)
                    log.info("spool_replayed", count=count, daemon_id=str(spool.owner))
                ended.append(spool.owner)
            lost = await find_lost(self._database, ended, _LOST_AFTER_SECONDS)
            await self._write_in_groups(lost)
            for event in lost:
                log.warning("download_lost", **_describe(event))
        self._looked_for_lost_at = time.monotonic()


async def open_ledger(database: Database, folder: Path, observe: Observe = lambda *_: None) -> DownloadLedger:
    """The ledger of this process, its spool in ``folder``, once what others have left is finished.

    ``observe`` is told of each statement.

    Raises OSError and DatabaseUnavailable.
    """
    ledger = DownloadLedger(database, Spool.create(folder, uuid4()), folder, observe)
    try:
        await ledger.finish_for_others()
    except BaseException:
        await ledger.close()
        raise
    return ledger


def _describe(event: DownloadEvent) -> dict[str, object]:
    return {
        "event_id": str(event.event_id),
        "job_id": str(event.job_id),
        "user_id": event.user_id,
        "outcome": event.outcome,
        "received": [list(part) for part in event.received],
        "bytes_sent": event.bytes_sent,
        "request_id": event.request_id,
    }

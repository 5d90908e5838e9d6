"""The ledger of one process: records every delivery that ends, even while the database is unavailable.

The ledger sends events in batches: a thousand downloads of one package must not queue on its row. If no batch
is under way, it sends an event immediately. If the database is unavailable or slow, events go to the spool
(``counting/spool.py``), and from there to the database later (``counting/replay.py``).

A delivery of a large package is written down when it starts, and every long delivery at intervals. Each
process also finishes the deliveries of processes that were killed.
"""

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Collection, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import structlog

from exportd.counting.replay import WRITE_TIMEOUT_SECONDS, Replay, describe, explain, record_or_drop
from exportd.counting.running import write_running
from exportd.counting.spool import Spool
from exportd.db.batcher import Batcher, Observe
from exportd.db.pool import Database, ValueRefused
from exportd.domain.delivery import DownloadEvent

log = structlog.get_logger()

# A delivery of a larger package is written down when it starts. A smaller one fits into a socket's buffer.
_LARGE_BYTES = 1024 * 1024
# A delivery gets a checkpoint after this time, and another one each time its age has grown by half, or after
# the longest pause.
_FIRST_CHECKPOINT_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 10.0
# The interval of the background work.
_TURN_SECONDS = 1.0
# How long a reader waits for deliveries that are about to end, and for running records.
_SETTLING_SECONDS = 0.25
_RECORDING_SECONDS = 3.0
# How long a start waits for the work of killed processes. The rest is done in the background.
_START_SECONDS = 5.0

Snapshot = Callable[[], DownloadEvent]


class _Running:
    """A running delivery, and the time of its next checkpoint."""

    def __init__(self, snapshot: Snapshot, bytes_sent: Callable[[], int]) -> None:
        begun = snapshot()
        self.event_id = begun.event_id
        self.job_id = begun.job_id
        self.is_large = begun.package_size_bytes > _LARGE_BYTES
        self.snapshot = snapshot
        self._bytes_requested = begun.bytes_requested
        self._bytes_sent = bytes_sent
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._began_at = time.monotonic()
        self.due_at = self._began_at + _FIRST_CHECKPOINT_SECONDS

    def put_off(self, now: float) -> None:
        self.due_at = now + min((now - self._began_at) / 2, _MAX_PAUSE_SECONDS)

    @property
    def is_sent(self) -> bool:
        """Whether every byte is sent, and only acknowledgements are missing."""
        return self._bytes_sent() == self._bytes_requested


class DownloadLedger:
    """Records events in batches, one at a time. Made by ``open_ledger``."""

    def __init__(self, database: Database, spool: Spool, folder: Path, observe: Observe) -> None:
        self.daemon_id = spool.owner
        self._database = database
        self._spool = spool
        self._ends: Batcher[DownloadEvent, None] = Batcher(self._write_ends, at_once=1, observe=observe)
        self._checkpoints: Batcher[_Running, None] = Batcher(self._write_checkpoints, at_once=1)
        # The deliveries whose checkpoints are being written.
        self._checkpointing: set[UUID] = set()
        self._checkpoint_lock = asyncio.Lock()
        # The records that are not durable yet, with their jobs.
        self._recording: dict[asyncio.Future[None], UUID] = {}
        self._running: set[_Running] = set()
        self._replay = Replay(database, spool, folder, self._running_ids)
        self._first_turn_ended = asyncio.Event()
        self._background = [
            asyncio.create_task(self._repeat(self._run_replay)),
            asyncio.create_task(self._repeat(self._submit_checkpoints)),
        ]

    @property
    def waiting(self) -> int:
        """The number of events that are neither recorded nor spooled."""
        return self._ends.waiting

    @property
    def spooled(self) -> int:
        """The number of spooled events."""
        return len(self._replay)

    def record(self, event: DownloadEvent) -> asyncio.Future[None]:
        """Returns a future that is done when the event is durable, in the database or in the spool.
        Idempotent by the event's id.

        If neither takes the event, the future fails with the spool's error, mostly OSError. The ledger then
        keeps the event in memory and retries it.
        """
        recording = self._ends.submit(event)
        self._recording[recording] = event.job_id
        recording.add_done_callback(self._recording.pop)
        return recording

    @contextlib.contextmanager
    def checkpoints(self, snapshot: Snapshot, bytes_sent: Callable[[], int] | None = None) -> Iterator[None]:
        """Writes down the event of ``snapshot`` (outcome ``running``) at intervals while the block runs, and
        at its start if the package is large.

        ``bytes_sent`` returns the snapshot's value more cheaply.
        """
        running = _Running(snapshot, bytes_sent or (lambda: snapshot().bytes_sent))
        self._running.add(running)
        if running.is_large:
            self._checkpoints.submit(running)
        try:
            yield
        finally:
            self._running.discard(running)
            running.ended.set_result(None)

    def running(self, job_ids: Collection[UUID]) -> list[DownloadEvent]:
        """This process's running deliveries of the jobs, as they are now."""
        wanted = set(job_ids)
        return [running.snapshot() for running in self._running if running.job_id in wanted]

    async def settle(self, job_id: UUID) -> None:
        """Waits for the records of deliveries whose clients have every byte, so that a reader sees them.

        A client may request the count as soon as it has the last byte, when its acknowledgement or the
        statement is still on its way. Never raises.
        """
        if ending := [item.ended for item in self._running if item.job_id == job_id and item.is_sent]:
            await asyncio.wait(ending, timeout=_SETTLING_SECONDS)
        await self.finish_recording([job_id])

    async def finish_recording(self, job_ids: Collection[UUID]) -> None:
        """Waits a moment until the finished deliveries of the jobs are in the database or the spool."""
        wanted = set(job_ids)
        if recording := [future for future, job_id in self._recording.items() if job_id in wanted]:
            await asyncio.wait(recording, timeout=_RECORDING_SECONDS)

    async def catch_up(self) -> None:
        """Waits a moment until the work of killed processes is finished."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                await self._first_turn_ended.wait()

    async def close(self) -> None:
        """Ends the background work. Spooled events stay for the next process."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self._recording:
            await asyncio.wait(list(self._recording))
        async with self._checkpoint_lock:
            # The spool must not be closed before a checkpoint that may go there.
            pass
        for event in self._spool.unsaved:
            log.error("download_not_recorded", **describe(event))
        for spool in self._replay.spools:
            spool.close()

    async def _write_ends(self, events: list[DownloadEvent]) -> list[None]:
        # An event waits behind the spooled events of its job. While the database is away, all events wait.
        spooled, is_away = self._replay.job_ids, self._replay.is_away
        delayed = [event for event in events if is_away or event.job_id in spooled]
        direct = [event for event in events if not is_away and event.job_id not in spooled]
        try:
            async with asyncio.timeout(WRITE_TIMEOUT_SECONDS):
                if any(event.event_id in self._checkpointing for event in direct):
                    # A checkpoint that is written after the end would stay.
                    async with self._checkpoint_lock:
                        pass
                await record_or_drop(self._database, direct)
        except Exception as error:  # noqa: BLE001  # whatever it is, no event may be lost
            log.warning("events_spooled", count=len(direct), **explain(error))
            self._replay.is_away = True
            delayed = events
        if delayed:
            await self._replay.put_aside(delayed)
        return [None] * len(events)

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except Exception:  # the task must continue
                log.exception("ledger_background_failed")
            await asyncio.sleep(_TURN_SECONDS)

    async def _run_replay(self) -> None:
        try:
            await self._replay.run_once()
        finally:
            self._first_turn_ended.set()

    def _running_ids(self) -> set[UUID]:
        return {running.event_id for running in self._running}

    async def _submit_checkpoints(self) -> None:
        now = time.monotonic()
        for running in [running for running in self._running if running.due_at <= now]:
            running.put_off(now)
            self._checkpoints.submit(running)

    async def _write_checkpoints(self, batch: list[_Running]) -> list[None]:
        async with self._checkpoint_lock:
            events = [running.snapshot() for running in batch if not running.ended.done()]
            self._checkpointing = {event.event_id for event in events}
            try:
                async with asyncio.timeout(WRITE_TIMEOUT_SECONDS):
                    await write_running(self._database, events)
            except ValueRefused:
                # The record of the delivery's end will log it.
                pass
            except Exception as error:  # noqa: BLE001  # whatever it is, the delivery goes on
                log.warning("events_spooled", count=len(events), **explain(error))
                with contextlib.suppress(OSError):
                    await self._spool.append(events)
            finally:
                self._checkpointing = set()
        return [None] * len(batch)


async def open_ledger(database: Database, folder: Path, observe: Observe = lambda *_: None) -> DownloadLedger:
    """Opens the ledger of this process, with its spool in ``folder``, and waits some seconds for the work of
    killed processes.

    ``observe`` is called after each statement. Raises OSError.
    """
    ledger = DownloadLedger(database, Spool.create(folder, uuid4()), folder, observe)
    try:
        await ledger.catch_up()
    except BaseException:
        await ledger.close()
        raise
    return ledger

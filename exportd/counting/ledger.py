"""The ledger of one process: records every delivery that ends, even while the database is unavailable.

The ledger sends events in batches, each in one statement and so in one transaction: a thousand downloads of
one package must not queue on its row. If no statement is running, it sends an event immediately. If the
database is unavailable or slow, events go to the spool (``counting/spool.py``) and from there to the database
later. Each process also finishes the deliveries of processes that were killed. If the database rejects the
events of one job, or its row is locked, the events of other jobs do not wait. ``counting/record.py`` holds
the rule of counting.
"""

import asyncio
import contextlib
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TypeVar
from uuid import UUID, uuid4

import structlog

from exportd.counting.grouping import MAX_BATCH_SIZE, next_group, one_statement
from exportd.counting.record import record_downloads
from exportd.counting.running import checkpoint_downloads, find_lost
from exportd.counting.spool import Spool
from exportd.db.batcher import Batcher, Observe
from exportd.db.pool import Database, DatabaseError, DatabaseUnavailable, ValueRefused
from exportd.domain.delivery import DownloadEvent, Outcome

log = structlog.get_logger()

# An event that is not recorded by then goes to the spool.
_SPOOL_AFTER_SECONDS = 2.0
# A delivery gets its first checkpoint after this time, and further ones each time its age has grown by half,
# up to the longest pause.
_FIRST_CHECKPOINT_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 10.0
# The interval of the background work.
_TURN_SECONDS = 1.0
# A delivery of another machine's daemon is lost after this time without a checkpoint.
_LOST_AFTER_SECONDS = 600.0
_LOOK_FOR_LOST_SECONDS = 60.0
# How long a reader waits for deliveries that are about to end, and for running records.
_SETTLING_SECONDS = 0.25
_RECORDING_SECONDS = 3.0
# How long a start waits for the work of killed processes. The rest is done in the background.
_START_SECONDS = 5.0
_LOG_AGAIN_SECONDS = 60.0

Item = TypeVar("Item")
Snapshot = Callable[[], DownloadEvent]


class _Running:
    """A running delivery, and the time of its next checkpoint."""

    def __init__(self, snapshot: Snapshot, bytes_sent: Callable[[], int]) -> None:
        begun = snapshot()
        self.job_id = begun.job_id
        self.snapshot = snapshot
        self._bytes_requested = begun.bytes_requested
        self._bytes_sent = bytes_sent
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.began_at = time.monotonic()
        self.due_at = self.began_at + _FIRST_CHECKPOINT_SECONDS

    def put_off(self, now: float) -> None:
        self.due_at = now + min((now - self.began_at) / 2, _MAX_PAUSE_SECONDS)

    @property
    def is_sent(self) -> bool:
        """Whether every byte is sent, and only acknowledgements are missing."""
        return self._bytes_sent() == self._bytes_requested


class DownloadLedger:
    """Records events in batches. One statement runs at a time. Made by ``open_ledger``."""

    def __init__(self, database: Database, spool: Spool, folder: Path, observe: Observe) -> None:
        self.daemon_id = spool.owner
        self._database = database
        self._spool = spool
        self._folder = folder
        self._gatherer: Batcher[DownloadEvent, None] = Batcher(
            self._write, one_statement, at_once=1, observe=observe
        )
        # By job: its running records, and its running deliveries.
        self._recording: dict[UUID, set[asyncio.Future[None]]] = {}
        self._running: dict[UUID, set[_Running]] = {}
        # Held while events are written to the database, or delayed ones to the spool.
        self._write_lock = asyncio.Lock()
        # While True, every event goes to the spool, until a statement succeeds.
        self._is_away = False
        # Spools of processes that have ended, and the names of unreadable files.
        self._adopted: list[Spool] = []
        self._passed_over: set[str] = set()
        self._looked_for_lost_at = float("-inf")
        self._logged_at = float("-inf")
        self._first_turn_ended = asyncio.Event()
        self._background = [
            asyncio.create_task(self._repeat(self._drain_spools)),
            asyncio.create_task(self._repeat(self._write_checkpoints)),
        ]

    @property
    def waiting(self) -> int:
        """The number of events that are neither recorded nor spooled."""
        return self._gatherer.waiting

    @property
    def spooled(self) -> int:
        """The number of spooled events."""
        return sum(len(spool) for spool in self._spools)

    @property
    def _spools(self) -> Sequence[Spool]:
        """In the order in which the events of one job must be recorded."""
        return *self._adopted, self._spool

    def record(self, event: DownloadEvent) -> asyncio.Future[None]:
        """Returns a future that is done when the event is durable, in the database or in the spool.
        Idempotent by the event's id.

        If neither takes the event, the future fails with the spool's error, mostly OSError. The ledger then
        keeps the event in memory and retries it.
        """
        recording = self._gatherer.submit(event)
        _add(self._recording, event.job_id, recording)
        recording.add_done_callback(lambda done: _discard(self._recording, event.job_id, done))
        return recording

    @contextlib.contextmanager
    def checkpoints(self, snapshot: Snapshot, bytes_sent: Callable[[], int] | None = None) -> Iterator[None]:
        """Records the event of ``snapshot`` (outcome ``running``) at intervals while the block runs.

        ``bytes_sent`` returns the snapshot's value more cheaply.
        """
        running = _Running(snapshot, bytes_sent or (lambda: snapshot().bytes_sent))
        _add(self._running, running.job_id, running)
        try:
            yield
        finally:
            _discard(self._running, running.job_id, running)
            running.ended.set_result(None)

    def running(self, job_ids: Collection[UUID]) -> list[DownloadEvent]:
        """This process's running deliveries of the jobs, as they are now."""
        return [running.snapshot() for job_id in set(job_ids) for running in self._running.get(job_id, ())]

    async def settle(self, job_id: UUID) -> None:
        """Waits for the records of deliveries whose clients have every byte, so that a reader sees them.

        A client may request the count as soon as it has the last byte, when its acknowledgement or the
        statement is still on its way. Never raises.
        """
        ending = [running.ended for running in self._running.get(job_id, ()) if running.is_sent]
        if ending:
            await asyncio.wait(ending, timeout=_SETTLING_SECONDS)
        await self.finish_recording([job_id])

    async def finish_recording(self, job_ids: Collection[UUID]) -> None:
        """Waits a moment until the finished deliveries of the jobs are in the database or the spool."""
        recording = [future for job_id in set(job_ids) for future in self._recording.get(job_id, ())]
        if recording:
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
        if recording := [future for futures in self._recording.values() for future in futures]:
            await asyncio.wait(recording)
        for event in self._spool.unsaved:
            log.error("download_not_recorded", **_describe(event))
        for spool in self._spools:
            spool.close()

    async def _write(self, events: list[DownloadEvent]) -> list[None]:
        async with self._write_lock:
            # An event waits behind the spooled events of its job, to keep the order.
            direct: list[DownloadEvent] = []
            delayed: list[DownloadEvent] = []
            for event in events:
                is_behind = self._is_away or any(event.job_id in spool.job_ids for spool in self._spools)
                (delayed if is_behind else direct).append(event)
            if direct:
                try:
                    async with asyncio.timeout(_SPOOL_AFTER_SECONDS):
                        await self._write_to_database(direct)
                except Exception as error:  # noqa: BLE001  # whatever it is, no event may be lost
                    log.warning("events_spooled", count=len(direct), **_explain(error))
                    self._is_away = True
                    delayed = events
            if delayed:
                await self._put_aside(delayed)
        return [None] * len(events)

    async def _put_aside(self, events: Sequence[DownloadEvent]) -> None:
        try:
            await self._spool.append(events)
        except Exception:
            await self._spool.keep(events)
            raise

    async def _write_to_database(self, events: Sequence[DownloadEvent]) -> None:
        """Writes checkpoints, or finished events that ``one_statement`` allows together."""
        write = checkpoint_downloads if events[0].outcome == Outcome.RUNNING else record_downloads
        try:
            await write(self._database, events)
        except ValueRefused:
            if len(events) == 1:
                # A retry would fail again. The log has the whole event.
                log.exception("download_not_recorded", **_describe(events[0]))
                return
            # An event that is rejected must not fail the others.
            middle = len(events) // 2
            await self._write_to_database(events[:middle])
            await self._write_to_database(events[middle:])

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except DatabaseUnavailable as error:
                self._log_not_drained(error)
            except Exception:  # the task must continue
                log.exception("ledger_background_failed")
            await asyncio.sleep(_TURN_SECONDS)

    async def _drain_spools(self) -> None:
        try:
            for spool in self._spools:
                await self._drain(spool)
            if self._adopted or time.monotonic() - self._looked_for_lost_at >= _LOOK_FOR_LOST_SECONDS:
                await self._finish_for_others()
        finally:
            self._first_turn_ended.set()

    async def _drain(self, spool: Spool) -> None:
        """Writes the events of a spool, except for jobs whose events the database rejects. If a batch fails,
        each of its jobs is tried by itself.

        Raises DatabaseUnavailable if the database takes no event at all.
        """
        count = 0
        # Jobs with events in earlier spools must wait.
        earlier = itertools.takewhile(lambda other: other is not spool, self._spools)
        earlier_jobs = {job_id for other in earlier for job_id in other.job_ids}
        suspect: set[UUID] = set()
        rejected: dict[UUID, BaseException] = {}
        while len(spool) > 0:
            # With the lock held, so that draining makes progress while new events arrive.
            async with self._write_lock:
                waiting = [event for event in await spool.waiting() if event.job_id not in earlier_jobs]
                group = next_group(waiting, suspect, rejected)
                if not group:
                    break
                try:
                    async with asyncio.timeout(_SPOOL_AFTER_SECONDS):
                        await self._write_to_database(group)
                except Exception as error:  # noqa: BLE001  # whatever it is, it must not hold up other jobs
                    failure = error
                else:
                    await spool.written(group)
                    count += len(group)
                    self._is_away = False
                    continue
            await self._check_answers()
            jobs = {event.job_id for event in group}
            if len(jobs) == 1:
                rejected |= dict.fromkeys(jobs, failure)
            suspect |= jobs
        if count:
            of_whom = {} if spool is self._spool else {"daemon_id": str(spool.owner)}
            log.info("spool_replayed", count=count, **of_whom)
        if rejected:
            self._is_away = False
            self._log_not_drained(next(iter(rejected.values())), list(rejected))
            await self._try_one(spool, random.choice(list(rejected)))  # noqa: S311  # each comes in turn

    async def _try_one(self, spool: Spool, job_id: UUID) -> None:
        """Writes the first event of a job alone, with the full time limit of a statement."""
        event = next((event for event in await spool.waiting() if event.job_id == job_id), None)
        if event is not None:
            with contextlib.suppress(DatabaseError):
                await self._write_to_database([event])
                await spool.written([event])

    async def _check_answers(self) -> None:
        """Raises DatabaseUnavailable."""
        try:
            async with asyncio.timeout(_SPOOL_AFTER_SECONDS):
                await self._database.fetch_all("SELECT 1")
        except TimeoutError as error:
            raise DatabaseUnavailable("no answer in time") from error

    def _log_not_drained(self, error: BaseException, job_ids: Sequence[UUID] = ()) -> None:
        now = time.monotonic()
        if self.spooled and now - self._logged_at >= _LOG_AGAIN_SECONDS:
            self._logged_at = now
            some = [str(job_id) for job_id in job_ids[:10]]
            log.warning("spool_not_drained", count=self.spooled, job_ids=some, **_explain(error))

    async def _write_checkpoints(self) -> None:
        now = time.monotonic()
        due = [item for running in self._running.values() for item in running if item.due_at <= now]
        events = [running.snapshot() for running in due]
        for running in due:
            running.put_off(now)
        for start in range(0, len(events), MAX_BATCH_SIZE):
            group = events[start : start + MAX_BATCH_SIZE]
            try:
                await self._write_to_database(group)
            except DatabaseError as error:
                with contextlib.suppress(OSError):
                    await self._spool.append(group)
                if isinstance(error, DatabaseUnavailable):
                    raise

    async def _finish_for_others(self) -> None:
        """Writes the spools of processes that have ended, and records their running deliveries as lost.

        Raises DatabaseUnavailable and OSError. The next call retries.
        """
        found = await asyncio.to_thread(Spool.adopt, self._folder, self._passed_over)
        self._adopted += found
        for spool in found:
            await self._drain(spool)
        ended = [spool.owner for spool in self._adopted]
        lost = await find_lost(self._database, ended, _LOST_AFTER_SECONDS)
        known = {event.event_id for spool in self._spools for event in await spool.waiting()}
        if lost := [event for event in lost if event.event_id not in known]:
            await self._put_aside(lost)
            for event in lost:
                log.warning("download_lost", **_describe(event))
            await self._drain(self._spool)
        for spool in [spool for spool in self._adopted if not len(spool)]:
            self._adopted.remove(spool)
            spool.close()
        self._looked_for_lost_at = time.monotonic()


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


def _add(sets: dict[UUID, set[Item]], job_id: UUID, item: Item) -> None:
    sets.setdefault(job_id, set()).add(item)


def _discard(sets: dict[UUID, set[Item]], job_id: UUID, item: Item) -> None:
    sets[job_id].discard(item)
    if not sets[job_id]:
        del sets[job_id]


def _explain(error: BaseException) -> dict[str, object]:
    """Describes an error in a log line. Unforeseen ones get a traceback."""
    is_foreseen = isinstance(error, DatabaseError | TimeoutError)
    return {"error": str(error) or "no answer in time"} | ({} if is_foreseen else {"exc_info": error})


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

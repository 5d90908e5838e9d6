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

from exportd.counting.record import (
    MAX_BATCH_SIZE,
    checkpoint_downloads,
    find_lost,
    one_statement,
    record_downloads,
)
from exportd.counting.spool import Spool
from exportd.db.batcher import Batcher, Observe
from exportd.db.pool import Database, DatabaseError, DatabaseUnavailable, ValueRefused
from exportd.domain.delivery import DownloadEvent, Outcome

log = structlog.get_logger()

# An event that is not in the database by then goes to the spool.
_SPOOL_AFTER_SECONDS = 2.0
# A delivery is written down when it has run this long, and again each time its age has grown by half, up to
# the longest pause.
_FIRST_CHECKPOINT_SECONDS = 1.0
_MAX_PAUSE_SECONDS = 10.0
# How often the background work looks round.
_TURN_SECONDS = 1.0
# A delivery of another machine's daemon that was not heard of for this long is lost.
_LOST_AFTER_SECONDS = 600.0
_LOOK_FOR_LOST_SECONDS = 60.0
# How long a reader waits for deliveries that are about to end, and for records under way.
_SETTLING_SECONDS = 0.25
_RECORDING_SECONDS = 3.0
# How long a start waits for what others have left to be finished; the rest is done while it serves.
_START_SECONDS = 5.0
_TELL_AGAIN_SECONDS = 60.0

Item = TypeVar("Item")
Snapshot = Callable[[], DownloadEvent]


class _Running:
    """A delivery under way, and when it is due to be written down."""

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
        """Whether only acknowledgements are missing."""
        return self._bytes_sent() == self._bytes_requested


class DownloadLedger:
    """Writes events, those that come in together as one statement. One statement is under way at a time.

    Made by ``open_ledger``.
    """

    def __init__(self, database: Database, spool: Spool, folder: Path, observe: Observe) -> None:
        self.daemon_id = spool.owner
        self._database = database
        self._spool = spool
        self._folder = folder
        self._gatherer: Batcher[DownloadEvent, None] = Batcher(
            self._write, one_statement, at_once=1, observe=observe
        )
        # Of each job: its records under way, and its deliveries.
        self._recording: dict[UUID, set[asyncio.Future[None]]] = {}
        self._running: dict[UUID, set[_Running]] = {}
        # Held while events go to the database, or delayed others into the spool.
        self._write_lock = asyncio.Lock()
        # Until a statement goes well again, everything goes to the spool.
        self._is_away = False
        # Of processes that have ended; and the files that could not be taken for such.
        self._adopted: list[Spool] = []
        self._passed_over: set[str] = set()
        self._looked_for_lost_at = float("-inf")
        self._told_at = float("-inf")
        self._looked_round = asyncio.Event()
        self._background = [
            asyncio.create_task(self._repeat(self._drain_spools)),
            asyncio.create_task(self._repeat(self._write_checkpoints)),
        ]

    @property
    def waiting(self) -> int:
        """How many events are not written yet, and not spooled."""
        return self._gatherer.waiting

    @property
    def spooled(self) -> int:
        """How many events wait for the database."""
        return sum(len(spool) for spool in self._spools)

    @property
    def _spools(self) -> Sequence[Spool]:
        """In the order in which what waits of one job goes to the database."""
        return *self._adopted, self._spool

    def record(self, event: DownloadEvent) -> asyncio.Future[None]:
        """Done once the event is durable, in the database or in the spool. Idempotent by the event's id.

        Fails with what the spool met, most often OSError, where neither takes it: it is then kept in memory,
        and tried again.
        """
        recording = self._gatherer.submit(event)
        _add(self._recording, event.job_id, recording)
        recording.add_done_callback(lambda done: _discard(self._recording, event.job_id, done))
        return recording

    @contextlib.contextmanager
    def checkpoints(self, snapshot: Snapshot, bytes_sent: Callable[[], int] | None = None) -> Iterator[None]:
        """While the block lasts, ``snapshot``'s event (outcome ``running``) is written now and then.

        ``bytes_sent`` tells the same as the snapshot's, for less.
        """
        running = _Running(snapshot, bytes_sent or (lambda: snapshot().bytes_sent))
        _add(self._running, running.job_id, running)
        try:
            yield
        finally:
            _discard(self._running, running.job_id, running)
            running.ended.set_result(None)

    def running(self, job_ids: Collection[UUID]) -> list[DownloadEvent]:
        """This process's deliveries of those jobs that are under way, as they are now."""
        return [running.snapshot() for job_id in set(job_ids) for running in self._running.get(job_id, ())]

    async def settle(self, job_id: UUID) -> None:
        """Waits for the job's deliveries that the client has whole, so that who reads afterwards sees them.

        A client may ask for the count as soon as it has the last byte: its acknowledgement is on its way,
        or the statement. Never raises.
        """
        ending = [running.ended for running in self._running.get(job_id, ()) if running.is_sent]
        if ending:
            await asyncio.wait(ending, timeout=_SETTLING_SECONDS)
        await self.finish_recording([job_id])

    async def finish_recording(self, job_ids: Collection[UUID]) -> None:
        """Waits, not for long, until those jobs' deliveries that ended until now are written, in the database
        or the spool."""
        recording = [future for job_id in set(job_ids) for future in self._recording.get(job_id, ())]
        if recording:
            await asyncio.wait(recording, timeout=_RECORDING_SECONDS)

    async def catch_up(self) -> None:
        """Waits, not for long, until what others have left is finished."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_START_SECONDS):
                await self._looked_round.wait()

    async def close(self) -> None:
        """Ends the background work. What is spooled stays there for the next process."""
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
            # What comes later of a job waits delayed what is in the spool of it, so that the order is kept.
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
        """Events that run, or that have ended and that ``one_statement`` takes."""
        write = checkpoint_downloads if events[0].outcome == Outcome.RUNNING else record_downloads
        try:
            await write(self._database, events)
        except ValueRefused:
            if len(events) == 1:
                # Nothing that is tried later would go better; the log has it whole.
                log.exception("download_not_recorded", **_describe(events[0]))
                return
            # One that cannot be written must not cost the others.
            middle = len(events) // 2
            await self._write_to_database(events[:middle])
            await self._write_to_database(events[middle:])

    async def _repeat(self, work: Callable[[], Awaitable[None]]) -> None:
        while True:
            try:
                await work()
            except DatabaseUnavailable as error:
                self._log_not_drained(error)
            except Exception:  # the only task that would do it must go on
                log.exception("ledger_background_failed")
            await asyncio.sleep(_TURN_SECONDS)

    async def _drain_spools(self) -> None:
        try:
            for spool in self._spools:
                await self._drain(spool)
            if self._adopted or time.monotonic() - self._looked_for_lost_at >= _LOOK_FOR_LOST_SECONDS:
                await self._finish_for_others()
        finally:
            self._looked_round.set()

    async def _drain(self, spool: Spool) -> None:
        """Writes what waits in a spool, but for jobs whose events the database does not take. What came in
        together may wait for one of them: so each job of a group that failed is tried by itself.

        Raises DatabaseUnavailable where it takes nothing at all.
        """
        count = 0
        # Whose turn is not yet.
        earlier = itertools.takewhile(lambda other: other is not spool, self._spools)
        earlier_jobs = {job_id for other in earlier for job_id in other.job_ids}
        suspect: set[UUID] = set()
        rejected: dict[UUID, BaseException] = {}
        while len(spool) > 0:
            # In the lane, so that the end of the spool comes in sight while others keep coming in.
            async with self._write_lock:
                waiting = [event for event in await spool.waiting() if event.job_id not in earlier_jobs]
                group = _next_group(waiting, suspect, rejected)
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
        """The first event of a job by itself, in all the time that a statement may take."""
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
        if self.spooled and now - self._told_at >= _TELL_AGAIN_SECONDS:
            self._told_at = now
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
        """Writes the spools of processes that have ended, and records the deliveries they left running.

        Raises DatabaseUnavailable and OSError, and does it all again next time.
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
    """The ledger of this process, its spool in ``folder``, once what others have left is finished, or some
    seconds later.

    ``observe`` is told of each statement.

    Raises OSError.
    """
    ledger = DownloadLedger(database, Spool.create(folder, uuid4()), folder, observe)
    try:
        await ledger.catch_up()
    except BaseException:
        await ledger.close()
        raise
    return ledger


def _next_group(
    waiting: Sequence[DownloadEvent], suspect: Collection[UUID], rejected: Collection[UUID]
) -> list[DownloadEvent]:
    """What one statement may take next: no job that is rejected, and one that is suspect only by itself."""
    chosen = list(
        itertools.islice((event for event in waiting if event.job_id not in suspect), MAX_BATCH_SIZE)
    )
    if not chosen:
        alone = next((event.job_id for event in waiting if event.job_id not in rejected), None)
        chosen = list(itertools.islice((event for event in waiting if event.job_id == alone), MAX_BATCH_SIZE))
    if running := [event for event in chosen if event.outcome == Outcome.RUNNING]:
        return running
    may_join = one_statement()
    return [event for event in chosen if may_join(event)]


def _add(sets: dict[UUID, set[Item]], job_id: UUID, item: Item) -> None:
    sets.setdefault(job_id, set()).add(item)


def _discard(sets: dict[UUID, set[Item]], job_id: UUID, item: Item) -> None:
    sets[job_id].discard(item)
    if not sets[job_id]:
        del sets[job_id]


def _explain(error: BaseException) -> dict[str, object]:
    """For a log line; what was not foreseen with its traceback."""
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

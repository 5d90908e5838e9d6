"""The packer: a process that makes the packages of waiting jobs, one at a time.

Its id is in the data folder, under a lock that only a running process holds. So a packer that starts after a
kill knows the job of its predecessor and continues with it. Packers on other machines take the job after a
minute without a heartbeat.
"""

import asyncio
import contextlib
import fcntl
import os
import threading
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import structlog

from exportd.archive.pack import DraftPackage, draft_package
from exportd.archive.source import PackError, Source, open_source
from exportd.db.packing import (
    CHANNEL,
    PackingJob,
    complete_job,
    fail_job,
    give_back_jobs,
    hold_job,
    note_progress,
    release_jobs,
    retry_job,
    take_job,
)
from exportd.db.pool import Database, DatabaseError, DatabaseUnavailable

log = structlog.get_logger()

_HEARTBEAT_SECONDS = 2.0
_FIRST_DELAY_SECONDS = 30.0
_NICENESS = 10


class JobLost(Exception):
    """Another packer has the job now, or this packer must stop. The draft is discarded."""


@contextlib.contextmanager
def packer_identity(data_dir: Path) -> Iterator[uuid.UUID]:
    """The packer's id, reserved while the block runs. Waits for a packer that still holds it.

    Raises OSError.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(data_dir / "packer", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    with open(descriptor, "r+", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.warning("packer_waiting", reason="another packer uses this data folder")
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            packer_id = uuid.UUID(file.read().strip())
        except ValueError:
            packer_id = uuid.uuid4()
            file.seek(0)
            file.truncate()
            file.write(str(packer_id))
            file.flush()
            os.fsync(file.fileno())
        yield packer_id


class Packer:
    """Packs waiting jobs into the storage at ``root``. Sources must lie in one of ``source_roots``."""

    def __init__(
        self,
        database: Database,
        packer_id: uuid.UUID,
        root: Path,
        source_roots: Sequence[Path],
        *,
        max_attempts: int,
        poll_seconds: float,
    ) -> None:
        self._database = database
        self._id = packer_id
        self._root = root
        self._source_roots = [path.resolve() for path in source_roots]
        self._max_attempts = max_attempts
        self._poll_seconds = poll_seconds

    async def run(self) -> None:
        """Packs until it is cancelled, and gives back the job that it holds then."""
        os.nice(_NICENESS)
        log.info("packer_started", packer_id=str(self._id), source_roots=[str(p) for p in self._source_roots])
        is_released = False
        try:
            while True:
                try:
                    if not is_released:
                        await release_jobs(self._database, self._id)
                        is_released = True
                    await self._pack_and_listen()
                except DatabaseError as error:
                    log.error("packer_without_database", error=str(error))
                    await asyncio.sleep(self._poll_seconds)
        finally:
            with contextlib.suppress(DatabaseError):
                await give_back_jobs(self._database, self._id)
            log.info("packer_stopped")

    async def _pack_and_listen(self) -> None:
        async with self._database.listening(CHANNEL) as wait:
            while True:
                while (job := await take_job(self._database, self._id)) is not None:
                    await self._pack(job)
                await wait(self._poll_seconds)

    async def _pack(self, job: PackingJob) -> None:
        fields = {"job_id": str(job.job_id), "attempt": job.attempt}
        started = time.monotonic()
        try:
            if job.attempt > self._max_attempts:
                raise PackError("every attempt was killed", is_final=True)
            with open_source(Path(job.source), self._source_roots) as source:
                total = await asyncio.to_thread(source.measure)
                async with self._drafted(job, source, total) as draft:
                    await self._complete(job, draft)
        except JobLost:
            log.warning("package_discarded", **fields)
        except DatabaseUnavailable:
            raise
        except Exception as error:  # noqa: BLE001  whatever is wrong with one source, the others' turn comes
            await self._note_failure(job, error)
        else:
            log.info(
                "package_packed",
                source_bytes=total,
                package_size_bytes=draft.size_bytes,
                duration_seconds=round(time.monotonic() - started, 6),
                **fields,
            )

    @contextlib.asynccontextmanager
    async def _drafted(self, job: PackingJob, source: Source, total: int) -> AsyncIterator[DraftPackage]:
        """The job's draft. A thread packs it while this task sends heartbeats. Raises JobLost and
        PackError."""
        read, is_over = 0, threading.Event()

        def progress(count: int) -> None:
            nonlocal read
            read += count
            if is_over.is_set():
                raise JobLost

        async def show_life() -> None:
            while True:
                percent = min(99, read * 100 // total) if total else 0
                with contextlib.suppress(DatabaseUnavailable):
                    if not await note_progress(self._database, job, self._id, percent):
                        is_over.set()
                await asyncio.sleep(_HEARTBEAT_SECONDS)

        stack = contextlib.ExitStack()
        drafting = draft_package(source, self._root, job.job_id, progress)
        filling = asyncio.ensure_future(asyncio.to_thread(stack.enter_context, drafting))
        life = asyncio.create_task(show_life())
        try:
            draft = await asyncio.shield(filling)
            yield draft
        except BaseException:
            is_over.set()
            # The thread notices it at its next read and removes the draft.
            await asyncio.wait([filling])
            raise
        finally:
            life.cancel()
            await asyncio.gather(life, return_exceptions=True)
            if filling.exception() is None:
                await asyncio.to_thread(stack.close)

    async def _complete(self, job: PackingJob, draft: DraftPackage) -> None:
        """Places the package and records it, with the job's row locked. Raises JobLost and PackError."""
        async with self._database.session() as session, session.transaction():
            if not await hold_job(session, job, self._id):
                raise JobLost
            await asyncio.to_thread(draft.place)
            await complete_job(
                session,
                job,
                self._id,
                path=draft.path,
                size_bytes=draft.size_bytes,
                sha256=draft.sha256,
            )
            # If the answer to COMMIT is lost, the outcome is unknown. A package without a row wastes space; a
            # row without its package promises what is not there.
            draft.keep()

    async def _note_failure(self, job: PackingJob, error: Exception) -> None:
        is_last = job.attempt >= self._max_attempts or (isinstance(error, PackError) and error.is_final)
        log.error(
            "package_failed",
            job_id=str(job.job_id),
            attempt=job.attempt,
            error=str(error) or type(error).__name__,
            is_last=is_last,
            exc_info=None if isinstance(error, PackError | OSError) else error,
        )
        if is_last:
            public = error.public if isinstance(error, PackError) else PackError.public
            await fail_job(self._database, job, self._id, public)
        else:
            delay = _FIRST_DELAY_SECONDS * 4 ** (job.attempt - 1)
            await retry_job(self._database, job, self._id, delay)

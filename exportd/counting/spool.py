"""The spool: an append-only file of events that the database cannot take now, one checksummed line each.

Each process writes and locks its own file. A file whose lock is free belongs to a process that has ended, and
another process finishes its work. When ``append`` returns, the events are on the disk (fsync).
"""

import asyncio
import contextlib
import fcntl
import os
import zlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self
from uuid import UUID

import orjson
import structlog

from exportd.domain.delivery import DownloadEvent, Method, Outcome

log = structlog.get_logger()

_SUFFIX = ".spool"
_DAMAGED_SUFFIX = ".damaged"


class Spool:
    """The spool file of one process, ``<folder>/<owner>.spool``, created and locked."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.owner = UUID(path.stem)
        # Events that the disk did not take. They are only in memory.
        self.unsaved: list[DownloadEvent] = []
        self._path = path
        self._descriptor = descriptor
        self._access = asyncio.Lock()
        # By job, in order.
        self._waiting: dict[UUID, list[DownloadEvent]] = {}

    @classmethod
    def create(cls, folder: Path, owner: UUID) -> Self:
        """Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{owner}{_SUFFIX}"
        while True:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            # Another process may have adopted and removed the empty file before it was locked.
            if os.fstat(descriptor).st_nlink > 0:
                return cls(path, descriptor)
            os.close(descriptor)

    @classmethod
    def adopt(cls, folder: Path, passed_over: set[str]) -> list[Self]:
        """Returns the spools of processes that have ended, locked for the caller.

        Logs an unreadable file once, and adds its name to ``passed_over``.
        """
        found = []
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            try:
                if (spool := cls._take(path)) is not None:
                    found.append(spool)
            except (OSError, ValueError) as error:
                if path.name not in passed_over:
                    passed_over.add(path.name)
                    log.error("spool_not_adopted", file=path.name, error=str(error))
        return found

    @classmethod
    def _take(cls, path: Path) -> Self | None:
        """None: its process runs. Raises OSError, and ValueError for a name that is not a spool's."""
        UUID(path.stem)
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return None
            if os.fstat(descriptor).st_nlink == 0:
                return None
            spool = cls(path, descriptor)
            spool._add(spool.read())
            stack.pop_all()
            return spool

    def __len__(self) -> int:
        """The number of waiting events."""
        return sum(map(len, self._waiting.values()))

    @property
    def job_ids(self) -> Collection[UUID]:
        """The jobs whose events wait here, in the order of their first events."""
        return self._waiting.keys()

    def waiting(self, job_id: UUID) -> Sequence[DownloadEvent]:
        """The waiting events of a job, in order."""
        return tuple(self._waiting.get(job_id, ()))

    async def append(self, events: Sequence[DownloadEvent]) -> None:
        """Returns when the events are on the disk. Raises OSError, and then none of them is in the file."""
        # Starts with a newline, so that the rest of a failed append does not corrupt the first line.
        block = b"\n" + b"".join(_to_line(event) for event in events)
        async with self._access:
            await asyncio.to_thread(self._append, block)
            self._add(events)

    def keep(self, events: Sequence[DownloadEvent]) -> None:
        """Keeps events that the disk does not take in memory."""
        new = [event for event in events if not any(event is kept for kept in self.unsaved)]
        self.unsaved += new
        self._add(new)

    async def written(self, job_id: UUID, count: int) -> None:
        """Removes the first events of a job, which are recorded. The file is emptied when no event waits.
        After a kill before that, the next process records some events again, which is idempotent."""
        async with self._access:
            waiting = self._waiting[job_id]
            done = {id(event) for event in waiting[:count]}
            self.unsaved = [event for event in self.unsaved if id(event) not in done]
            del waiting[:count]
            if not waiting:
                del self._waiting[job_id]
            if not self._waiting:
                await asyncio.to_thread(os.ftruncate, self._descriptor, 0)

    def _add(self, events: Iterable[DownloadEvent]) -> None:
        for event in events:
            self._waiting.setdefault(event.job_id, []).append(event)

    def read(self) -> Iterator[DownloadEvent]:
        """Yields the events in the file. An incomplete last line was never acknowledged, so it is dropped.
        Any other damage is logged."""
        content = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            if line == b"\n":
                continue
            event = _from_line(line)
            if event is not None:
                yield event
            elif line.endswith(b"\n"):
                log.error("spool_line_damaged", file=self._path.name, line=number)
                with contextlib.suppress(OSError):
                    self._path.with_suffix(_DAMAGED_SUFFIX).write_bytes(content)

    def close(self) -> None:
        """Closes the file, and removes it if no event waits."""
        if not self._waiting:
            self._path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _append(self, block: bytes) -> None:
        before = os.fstat(self._descriptor).st_size
        try:
            left = memoryview(block)
            while left:
                left = left[os.write(self._descriptor, left) :]
            os.fsync(self._descriptor)
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._descriptor, before)
            raise


def _to_line(event: DownloadEvent) -> bytes:
    content = orjson.dumps(event)
    return b"%08x %b\n" % (zlib.crc32(content), content)


def _from_line(line: bytes) -> DownloadEvent | None:
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
        return None
    try:
        fields = orjson.loads(content)
        for name in ("event_id", "job_id", "daemon_id"):
            fields[name] = UUID(fields[name])
        for name in ("requested", "received"):
            fields[name] = tuple((start, stop) for start, stop in fields[name])
        fields["started_at"] = datetime.fromisoformat(fields["started_at"])
        fields["outcome"] = Outcome(fields["outcome"])
        fields["method"] = fields["method"] and Method(fields["method"])
        return DownloadEvent(**fields)
    except (KeyError, TypeError, ValueError):
        # A complete line of a version with other fields.
        return None

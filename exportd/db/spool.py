"""Events that the database cannot take now wait in a file: append-only, one checksummed line each.

Each process writes a file of its own and holds a lock on it, so a file whose lock is free belongs to a
process that has ended: whoever finds it first finishes its work. What was appended is on the disk (fsync)
when ``append`` returns.
"""

import asyncio
import contextlib
import fcntl
import os
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Self
from uuid import UUID

import orjson
import structlog

from exportd.db.rows import DownloadEvent

log = structlog.get_logger()

_SUFFIX = ".spool"
_DAMAGED_SUFFIX = ".damaged"


class Spool:
    """The spool file of one process, ``<folder>/<owner>.spool``. Opening it makes it and takes its lock."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.owner = UUID(path.stem)
        self._path = path
        self._descriptor = descriptor
        self._access = asyncio.Lock()
        self._waiting = 0

    @classmethod
    def create(cls, folder: Path, owner: UUID) -> Self:
        """Raises OSError."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = folder / f"{owner}{_SUFFIX}"
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return cls(path, descriptor)

    @classmethod
    def adopt(cls, folder: Path) -> Iterator[Self]:
        """The spools whose processes have ended, each locked for the caller. Raises OSError."""
        for path in sorted(folder.glob(f"*{_SUFFIX}")):
            try:
                descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
            except FileNotFoundError:
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                is_there = os.fstat(descriptor).st_nlink > 0
            except BlockingIOError:
                is_there = False
            if is_there:
                spool = cls(path, descriptor)
                spool._waiting = sum(1 for _ in spool.read())
                yield spool
            else:
                os.close(descriptor)

    def __len__(self) -> int:
        """How many events wait here."""
        return self._waiting

    async def append(self, events: Sequence[DownloadEvent]) -> None:
        """Returns once the events are on the disk. Raises OSError, and then none of them is in the file."""
        # It begins with a line's end: what a failed append may have left must not spoil the first line.
        block = b"\n" + b"".join(_to_line(event) for event in events)
        async with self._access:
            await asyncio.to_thread(self._append, block)
            self._waiting += len(events)

    async def replay(self, write: Callable[[list[DownloadEvent]], Awaitable[None]]) -> None:
        """Hands every event to ``write``, in order, and empties the file once all are written.

        A file that was cut off in the middle of this is handed over again from its beginning. Raises what
        ``write`` raises; the file is then as it was.
        """
        while self._waiting:
            events = await asyncio.to_thread(lambda: list(self.read()))
            await write(events)
            async with self._access:
                # What came in meanwhile stays, and everything with it: written twice is written once.
                if self._waiting == len(events):
                    await asyncio.to_thread(self._empty)
                    self._waiting = 0

    def read(self) -> Iterator[DownloadEvent]:
        """The events in the file. A torn last line was promised to nobody; damage elsewhere is told."""
        size = os.fstat(self._descriptor).st_size
        content = os.pread(self._descriptor, size, 0)
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
        """Removes the file if nothing waits in it, and lets go of it."""
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

    def _empty(self) -> None:
        os.ftruncate(self._descriptor, 0)


def _to_line(event: DownloadEvent) -> bytes:
    content = orjson.dumps(event)
    return b"%08x %b\n" % (zlib.crc32(content), content)


def _from_line(line: bytes) -> DownloadEvent | None:
    checksum, _, content = line.removesuffix(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
        return None
    fields = orjson.loads(content)
    for name in ("event_id", "job_id", "daemon_id"):
        fields[name] = UUID(fields[name])
    for name in ("requested", "received"):
        fields[name] = tuple((start, stop) for start, stop in fields[name])
    fields["started_at"] = datetime.fromisoformat(fields["started_at"])
    return DownloadEvent(**fields)

"""Log lines leave by a thread of their own: a slow pipe or a full disk holds up no download.

A lone line is written at once, the lines of a busy moment together. What cannot be written in time is shed
and counted, and the count is logged as soon as there is room again.
"""

import atexit
import os
import select
import stat
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path

# At some 400 bytes a line this is ten thousand of them.
_MAX_WAITING_BYTES = 4 * 1024 * 1024
# Lines that come within this time of the last ones are written together.
_PAUSE_SECONDS = 0.01
_CLOSING_SECONDS = 2.0
_OPEN_FILE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY

_writers: "weakref.WeakSet[LineWriter]" = weakref.WeakSet()


class LineWriter:
    """Writes lines to ``target``: a descriptor, which is left open, or a file's path, opened to append.

    ``describe_shed`` makes the line that tells how many were shed. Several processes may write to one target:
    their lines stay whole.
    """

    def __init__(self, target: int | Path, describe_shed: Callable[[int], bytes]) -> None:
        """Raises OSError where the file cannot be opened."""
        self.shed_lines = 0
        self._target = target
        self._describe_shed = describe_shed
        self._descriptor = target if isinstance(target, int) else os.open(target, _OPEN_FILE, 0o640)
        self._reset()
        _writers.add(self)
        atexit.register(self.close)

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._closing = threading.Event()
        self._lines: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._shed_since = 0
        self._must_reopen = False
        self._thread: threading.Thread | None = None

    def write(self, line: bytes) -> None:
        """Takes a line without its end. Never blocks, never raises."""
        with self._lock:
            if self._waiting_bytes + len(line) > _MAX_WAITING_BYTES:
                self._count_shed(1)
                return
            self._lines.append(line)
            self._waiting_bytes += len(line)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="exportd-log", daemon=True)
                self._thread.start()
        self._wake.set()

    def reopen(self) -> None:
        """Before the next line, opens the file by its name again: logrotate has moved it."""
        self._must_reopen = isinstance(self._target, Path)

    def close(self) -> None:
        """Writes what is waiting, and gives up on a target that does not take it in two seconds."""
        atexit.unregister(self.close)
        self._closing.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(_CLOSING_SECONDS)

    def _run(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            is_last = self._closing.is_set()
            if self._must_reopen:
                self._reopen()
            self._write_out(self._take())
            if is_last:
                return
            self._closing.wait(_PAUSE_SECONDS)

    def _take(self) -> list[bytes]:
        with self._lock:
            lines = list(self._lines)
            self._lines.clear()
            self._waiting_bytes = 0
            if self._shed_since:
                lines.append(self._describe_shed(self._shed_since))
                self._shed_since = 0
            return lines

    def _write_out(self, lines: list[bytes]) -> None:
        for count, block in _blocks(lines, self._most_at_once()):
            try:
                _write_whole(self._descriptor, block)
            except OSError:
                with self._lock:
                    self._count_shed(count)

    def _most_at_once(self) -> int:
        """A pipe keeps what several processes write apart only up to PIPE_BUF."""
        try:
            is_file = stat.S_ISREG(os.fstat(self._descriptor).st_mode)
        except OSError:
            is_file = False
        return 1024 * 1024 if is_file else select.PIPE_BUF

    def _reopen(self) -> None:
        self._must_reopen = False
        assert isinstance(self._target, Path)
        try:
            opened = os.open(self._target, _OPEN_FILE, 0o640)
        except OSError:
            return  # the old file is better than none
        os.dup2(opened, self._descriptor, inheritable=False)
        os.close(opened)

    def _count_shed(self, count: int) -> None:
        self.shed_lines += count
        self._shed_since += count


def _blocks(lines: list[bytes], max_bytes: int) -> list[tuple[int, bytes]]:
    """Lines joined to blocks of at most ``max_bytes`` (a longer line is one), and how many each holds."""
    blocks: list[tuple[int, bytes]] = []
    block: list[bytes] = []
    size = 0
    for line in lines:
        if block and size + len(line) + 1 > max_bytes:
            blocks.append((len(block), b"\n".join(block) + b"\n"))
            block, size = [], 0
        block.append(line)
        size += len(line) + 1
    if block:
        blocks.append((len(block), b"\n".join(block) + b"\n"))
    return blocks


def _write_whole(descriptor: int, block: bytes) -> None:
    """Raises OSError."""
    left = memoryview(block)
    while left:
        try:
            left = left[os.write(descriptor, left) :]
        except BlockingIOError:
            # Somebody made the pipe non-blocking; this thread may wait.
            select.select([], [descriptor], [])


def _start_anew_in_child() -> None:
    """A forked process has none of its parent's threads, and must not write the parent's lines again."""
    for writer in _writers:
        writer._reset()
        writer.reopen()


os.register_at_fork(after_in_child=_start_anew_in_child)

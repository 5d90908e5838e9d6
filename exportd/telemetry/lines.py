"""Writes log lines in a thread, so that a slow pipe or a full disk does not delay downloads.

A single line is written immediately, the lines of a busy moment together. If the target is too slow, lines
are dropped and counted, and the count is logged when there is room again.
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

# About ten thousand lines of 400 bytes.
_MAX_WAITING_BYTES = 4 * 1024 * 1024
# Lines that arrive within this time are written together.
_PAUSE_SECONDS = 0.01
_CLOSING_SECONDS = 2.0
_OPEN_FILE = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOCTTY

_writers: "weakref.WeakSet[LineWriter]" = weakref.WeakSet()


class LineWriter:
    """Writes lines to ``target``: a descriptor, which stays open, or the path of a file, opened to append.

    ``describe_shed`` returns the line that reports dropped lines. Several processes may write to one target
    without mixing their lines.
    """

    def __init__(self, target: int | Path, describe_shed: Callable[[int], bytes]) -> None:
        """Raises OSError if the file cannot be opened."""
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
        """Queues a line, given without its line end. Never blocks, never raises."""
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
        """Reopens the file before the next line, after logrotate has moved it."""
        self._must_reopen = isinstance(self._target, Path)

    def close(self) -> None:
        """Writes the queued lines, for two seconds at most."""
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
        """Writes of several processes to a pipe are atomic only up to PIPE_BUF."""
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
            return  # keep the old file
        os.dup2(opened, self._descriptor, inheritable=False)
        os.close(opened)

    def _count_shed(self, count: int) -> None:
        self.shed_lines += count
        self._shed_since += count


def _blocks(lines: list[bytes], max_bytes: int) -> list[tuple[int, bytes]]:
    """Joins lines to blocks of at most ``max_bytes`` (a longer line is its own block), each with its number
    of lines."""
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
            # The pipe is non-blocking. This thread may wait.
            select.select([], [descriptor], [])


def _start_anew_in_child() -> None:
    """A forked process lacks its parent's thread, and must not write the parent's lines again."""
    for writer in _writers:
        writer._reset()
        writer.reopen()


os.register_at_fork(after_in_child=_start_anew_in_child)

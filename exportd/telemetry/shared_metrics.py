"""The files through which several processes share their metrics.

Each process writes its own file, and any of them answers ``/metrics`` for all.
"""

import fcntl
import itertools
import os
import shutil
import tempfile
from pathlib import Path

from prometheus_client.multiprocess import mark_process_dead


class SharedMetrics:
    """A folder for the metrics of forked processes. Their parent makes it before it forks them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="exportd-metrics-"))
        self._parent = os.getpid()
        self._number: int | None = None
        # prometheus_client reads the folder from this variable.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(self.folder)

    def remove(self) -> None:
        """Removes the folder when the parent ends. Does nothing in a forked process."""
        if os.getpid() == self._parent:
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
            shutil.rmtree(self.folder, ignore_errors=True)

    def own_number(self) -> int:
        """Reserves the smallest free number for this process, until it ends.

        Files are named by it and not by the process id, so that a new process continues in the files of one
        that ended. Otherwise each reload would add files to read.
        """
        if self._number is None:
            # The lock stays open. The kernel frees it when the process ends.
            self._number = next(n for n in itertools.count() if _lock(self.folder / f"{n}.lock") is not None)
            mark_process_dead(self._number, str(self.folder))
        return self._number

    def forget_dead_processes(self) -> None:
        """Removes the gauges of processes that have ended. Their counts stay."""
        for path in self.folder.glob("*.lock"):
            lock = _lock(path)
            if lock is not None:
                mark_process_dead(int(path.stem), str(self.folder))
                os.close(lock)


def _lock(path: Path) -> int | None:
    """Returns the descriptor that holds the lock, or None if a running process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock

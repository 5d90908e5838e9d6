"""A process that is kept running beside the server."""

import os
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Self

import structlog

log = structlog.get_logger()

# How long the companion may take to end, and how long to wait before it is started again.
_STOP_SECONDS = 10.0
_FIRST_RESTART_SECONDS = 1.0
_MAX_RESTART_SECONDS = 60.0


class Companion:
    """Keeps ``command`` running while its block runs. The command's stdin ends when this process does."""

    def __init__(self, command: Sequence[str], environ: Mapping[str, str]) -> None:
        self._command = command
        self._environ = environ
        self._is_over = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        # A worker that is forked while Popen starts the command would inherit the pipe by which Popen learns
        # that the command runs, and Popen would wait until that worker ends.
        self._starting = threading.Lock()
        self._thread = threading.Thread(target=self._keep_running, name="companion", daemon=True)

    def __enter__(self) -> Self:
        os.register_at_fork(
            before=self._starting.acquire,
            after_in_parent=self._starting.release,
            after_in_child=self._starting.release,
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        if self._process is not None:
            self._process.terminate()
        self._thread.join(_STOP_SECONDS)
        if self._process is not None:
            self._process.kill()

    def _keep_running(self) -> None:
        delay = _FIRST_RESTART_SECONDS
        while not self._is_over.is_set():
            started = time.monotonic()
            with self._starting:
                process = subprocess.Popen(  # noqa: S603
                    self._command, stdin=subprocess.PIPE, env=self._environ
                )
            self._process = process
            if self._is_over.is_set():
                process.terminate()
            status = process.wait()
            if self._is_over.is_set():
                return
            if time.monotonic() - started > _MAX_RESTART_SECONDS:
                delay = _FIRST_RESTART_SECONDS
            log.error("companion_ended", status=status, restart_in_seconds=delay)
            self._is_over.wait(delay)
            delay = min(2 * delay, _MAX_RESTART_SECONDS)

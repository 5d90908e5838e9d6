"""Several processes that serve, under gunicorn."""

import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from exportd.settings import ServerSettings
from exportd.telemetry.shared_metrics import SharedMetrics

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After a drain: how long aborted downloads may take to be recorded.
ABORT_SECONDS = 20.0
# gunicorn kills and replaces a worker whose event loop was blocked for the time of a drain and this long.
_HUNG_SECONDS = 60


def serve_by_workers(
    make_runner: Callable[[SharedMetrics], web.AppRunner],
    settings: ServerSettings,
    sockets: list[socket.socket],
    started: Callable[[], None],
) -> int:
    """Serves in ``settings.workers`` processes until a signal stops them. Returns the exit status."""
    # A worker has gunicorn's signal handlers at first, and then none until its event loop runs. It would miss
    # a signal meanwhile, so signals are blocked until then.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS),
    )

    metrics = SharedMetrics()

    async def load() -> web.AppRunner:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        return make_runner(metrics)

    stopping_seconds = int(settings.drain_timeout_seconds + ABORT_SECONDS) + 1
    options = {
        # gunicorn takes over the descriptors and closes them.
        "bind": [f"fd://{opened.detach()}" for opened in sockets],
        "workers": settings.workers,
        "worker_class": "aiohttp.GunicornUVLoopWebWorker",
        "graceful_timeout": stopping_seconds,
        "timeout": stopping_seconds + _HUNG_SECONDS,
        "certfile": str(settings.tls_cert) if settings.tls_cert else None,
        "keyfile": str(settings.tls_key) if settings.tls_key else None,
        "logger_class": _GunicornLogger,
        "when_ready": lambda _: started(),
        "child_exit": lambda _, __: metrics.forget_dead_processes(),
        "control_socket_disable": True,
    }
    try:
        _Gunicorn(options, load).run()
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
    finally:
        metrics.remove()
    return 0


class _Gunicorn(BaseApplication):  # type: ignore[misc]  # gunicorn has no types
    def __init__(self, options: dict[str, Any], load: Callable[[], Awaitable[web.AppRunner]]) -> None:
        self._options = options
        self._load = load
        super().__init__()

    def load_config(self) -> None:
        for name, value in self._options.items():
            self.cfg.set(name, value)

    def load(self) -> Callable[[], Awaitable[web.AppRunner]]:
        return self._load


class _GunicornLogger(Logger):  # type: ignore[misc]
    """Sends gunicorn's messages to exportd's log. gunicorn would set up streams of its own."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
        self.access_log.disabled = True

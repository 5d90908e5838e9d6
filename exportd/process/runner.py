"""The processes that serve: signals and draining. One process runs by itself, several under gunicorn."""

import asyncio
import contextlib
import signal
import socket
import sys
from collections.abc import Callable, Coroutine
from typing import Any

import structlog
import uvloop
from aiohttp import web

from exportd.process.companion import Companion
from exportd.process.listeners import (
    BACKLOG,
    address_of,
    limit_handshakes,
    listen,
    room_for_connections,
    tls_context,
)
from exportd.process.systemd import notify
from exportd.process.workers import ABORT_SECONDS, STOP_SIGNALS, serve_by_workers
from exportd.settings import ServerSettings
from exportd.telemetry.shared_metrics import SharedMetrics
from exportd.web.edge.connection import ConnectionServer
from exportd.web.services import SERVICES

log = structlog.get_logger()

MakeApp = Callable[[SharedMetrics | None], web.Application]


def serve(
    make_app: MakeApp,
    settings: ServerSettings,
    *,
    on_hangup: Callable[[], None],
    on_started: Callable[[str], None] = lambda _: None,
    companion: Companion | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit status: 0 after a drain, 1 after one cut short.

    The first signal stops accepting, and running requests may finish within ``drain_timeout_seconds``. A
    second one aborts them. ``make_app`` is called in each process that serves, ``on_started`` with the
    address. ``companion`` runs beside the server. With one process, SIGHUP calls ``on_hangup``. With several,
    it replaces all of them. ``max_connections`` 0 is as many as the limit on open files allows. Raises
    ServerError, and the exceptions of the application's start-up.
    """
    tls_context(settings)  # an unusable certificate is reported before the server starts
    room = room_for_connections()
    max_connections = min(settings.max_connections or room, room)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(opened) for opened in listen(settings)]
        url = address_of(settings, sockets[0])
        if companion:
            stack.enter_context(companion)

        def make_runner(metrics: SharedMetrics | None = None) -> DrainingRunner:
            return DrainingRunner(make_app(metrics), settings.drain_timeout_seconds, max_connections)

        def started() -> None:
            notify("READY=1")
            log.info("server_started", url=url, workers=settings.workers)
            on_started(url)

        if settings.workers == 1:
            return uvloop.run(_serve(make_runner, settings, sockets, on_hangup, started))
        return serve_by_workers(make_runner, settings, sockets, started)


def run_until_stopped(work: Coroutine[Any, Any, None], *, ends_with_stdin: bool) -> None:
    """Runs ``work`` and cancels it at SIGTERM, SIGINT or, if ``ends_with_stdin``, at the end of stdin.

    Raises the exceptions of ``work``.
    """

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, task.cancel)

        def stdin_ended() -> None:
            loop.remove_reader(sys.stdin)
            task.cancel()

        if ends_with_stdin:
            loop.add_reader(sys.stdin, stdin_ended)
        with contextlib.suppress(asyncio.CancelledError):
            await task

    uvloop.run(run())


class DrainingRunner(web.AppRunner):
    """A runner whose clean-up waits for running requests first."""

    def __init__(self, app: web.Application, drain_timeout_seconds: float, max_connections: int) -> None:
        super().__init__(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
        self._drain_timeout_seconds = drain_timeout_seconds
        self._max_connections = max_connections
        self.abort = asyncio.Event()

    async def _make_server(self) -> web.Server:
        return ConnectionServer(self.app, await super()._make_server(), self._max_connections)

    async def setup(self) -> None:
        await super().setup()
        seconds = self.app[SERVICES].settings.server.head_timeout_seconds
        limit_handshakes(asyncio.get_running_loop(), seconds)

    async def cleanup(self) -> None:
        if self.server is not None:
            await self._drain()
        await super().cleanup()

    async def _drain(self) -> None:
        lifecycle = self.app[SERVICES].lifecycle
        lifecycle.is_draining = True
        notify("STOPPING=1")
        log.info("server_draining", timeout_seconds=self._drain_timeout_seconds)
        for site in list(self.sites):
            await site.stop()
        idle = asyncio.ensure_future(lifecycle.wait_until_idle(self._drain_timeout_seconds))
        second_signal = asyncio.ensure_future(self.abort.wait())
        await asyncio.wait([idle, second_signal], return_when=asyncio.FIRST_COMPLETED)
        second_signal.cancel()
        idle.cancel()
        aborted = lifecycle.cancel_all()
        if aborted:
            await lifecycle.wait_until_idle(ABORT_SECONDS)
        log.info("server_stopped", requests_aborted=aborted)


async def _serve(
    make_runner: Callable[[], DrainingRunner],
    settings: ServerSettings,
    sockets: list[socket.socket],
    on_hangup: Callable[[], None],
    started: Callable[[], None],
) -> int:
    runner = make_runner()
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in STOP_SIGNALS:
        loop.add_signal_handler(number, lambda: (runner.abort if stop.is_set() else stop).set())
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        await runner.setup()
        for opened in sockets:
            await web.SockSite(runner, opened, ssl_context=tls_context(settings), backlog=BACKLOG).start()
        started()
        await stop.wait()
    finally:
        await runner.cleanup()
    return 1 if runner.abort.is_set() else 0

"""The processes: sockets, signals, draining. One process runs by itself, several under gunicorn."""

import asyncio
import contextlib
import logging
import os
import resource
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import uvloop
from aiohttp import web
from gunicorn.app.base import BaseApplication
from gunicorn.glogging import Logger

from exportd.errors import OperatorError
from exportd.settings import ServerSettings
from exportd.telemetry.metrics import forget_dead_processes, shared_metrics
from exportd.web.edge.connection import ConnectionServer
from exportd.web.services import SERVICES

log = structlog.get_logger()

MakeApp = Callable[[], web.Application]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_BACKLOG = 1024
_ENOUGH_DESCRIPTORS = 65536
# For the database, logs, metrics and the loop.
_SPARE_DESCRIPTORS = 128
# After a drain: how long aborted downloads may take to be recorded.
_ABORT_SECONDS = 20.0
# A worker that has not turned its loop for this long, beyond what a drain takes, is replaced.
_HUNG_SECONDS = 60
# How long the companion may take to end, and how long it stays away after it died.
_COMPANION_SECONDS = 10.0
_FIRST_RESTART_SECONDS = 1.0
_LONGEST_RESTART_SECONDS = 60.0


class ServerError(OperatorError):
    """The server cannot start. The message is for the operator."""


@dataclass(frozen=True, slots=True)
class Companion:
    """A command that is kept running beside the server, and its environment."""

    command: Sequence[str]
    environ: Mapping[str, str]


def serve(
    make_app: MakeApp,
    settings: ServerSettings,
    *,
    on_hangup: Callable[[], None],
    on_started: Callable[[str], None] = lambda _: None,
    companion: Companion | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit status: 0 after a drain, 1 after one cut short.

    The first signal stops accepting and lets running requests finish for ``drain_timeout_seconds``; a second
    one aborts them at once. ``make_app`` is called in each process that serves; ``on_started`` is told the
    address. ``companion`` runs beside; its stdin ends when this process does. SIGHUP calls ``on_hangup``
    where one process serves, and replaces the processes where several do. ``max_connections`` 0 is as
    many as the limit on open files has room for. Raises ServerError, and whatever the application's
    start-up raises.
    """
    _tls_context(settings)  # a certificate that cannot be used is told before anything starts
    room = _room_for_connections()
    max_connections = min(settings.max_connections or room, room)
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(opened) for opened in _listen(settings)]
        url = _address(settings, sockets[0])
        if companion:
            stack.enter_context(_accompanied(companion))

        def make_runner() -> DrainingRunner:
            return DrainingRunner(make_app(), settings.drain_timeout_seconds, max_connections)

        def started() -> None:
            _notify("READY=1")
            log.info("server_started", url=url, workers=settings.workers)
            on_started(url)

        if settings.workers == 1:
            return uvloop.run(_serve(make_runner, settings, sockets, on_hangup, started))
        return _serve_by_workers(make_runner, settings, sockets, started)


def run_until_stopped(work: Coroutine[Any, Any, None], *, ends_with_stdin: bool) -> None:
    """Runs ``work`` and cancels it at SIGTERM, SIGINT or, if so asked, when stdin ends.

    Raises what it raises.
    """

    async def run() -> None:
        loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
        for number in _SIGNALS:
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
    """A runner whose clean-up first lets running requests finish."""

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
        _limit_handshakes(asyncio.get_running_loop(), seconds)

    async def cleanup(self) -> None:
        if self.server is not None:
            await self._drain()
        await super().cleanup()

    async def _drain(self) -> None:
        lifecycle = self.app[SERVICES].lifecycle
        lifecycle.is_draining = True
        _notify("STOPPING=1")
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
            await lifecycle.wait_until_idle(_ABORT_SECONDS)
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
    for number in _SIGNALS:
        loop.add_signal_handler(number, lambda: (runner.abort if stop.is_set() else stop).set())
    loop.add_signal_handler(signal.SIGHUP, on_hangup)
    try:
        await runner.setup()
        for opened in sockets:
            await web.SockSite(runner, opened, ssl_context=_tls_context(settings), backlog=_BACKLOG).start()
        started()
        await stop.wait()
    finally:
        await runner.cleanup()
    return 1 if runner.abort.is_set() else 0


def _serve_by_workers(
    make_runner: Callable[[], DrainingRunner],
    settings: ServerSettings,
    sockets: list[socket.socket],
    started: Callable[[], None],
) -> int:
    # A worker that is told to stop before it can hear it would not: it runs gunicorn's own handlers, and then
    # none, until its loop does. So signals wait for that.
    os.register_at_fork(
        before=lambda: signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS),
        after_in_parent=lambda: signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS),
    )

    async def load() -> web.AppRunner:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
        return make_runner()

    stopping_seconds = int(settings.drain_timeout_seconds + _ABORT_SECONDS) + 1
    options = {
        # gunicorn makes the descriptors its own, and closes them.
        "bind": [f"fd://{opened.detach()}" for opened in sockets],
        "workers": settings.workers,
        "worker_class": "aiohttp.GunicornUVLoopWebWorker",
        "graceful_timeout": stopping_seconds,
        "timeout": stopping_seconds + _HUNG_SECONDS,
        "certfile": str(settings.tls_cert) if settings.tls_cert else None,
        "keyfile": str(settings.tls_key) if settings.tls_key else None,
        "logger_class": _GunicornLogger,
        "when_ready": lambda _: started(),
        "child_exit": lambda _, __: forget_dead_processes(),
        "control_socket_disable": True,
    }
    try:
        with shared_metrics():
            _Gunicorn(options, load).run()
    except SystemExit as exit_request:
        return int(exit_request.code or 0)
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
    """gunicorn's messages go where all others go; it would set up streams of its own."""

    def setup(self, cfg: Any) -> None:
        self.error_log.propagate = True
        self.error_log.setLevel(logging.WARNING)
        self.access_log.disabled = True


@contextlib.contextmanager
def _accompanied(companion: Companion) -> Iterator[None]:
    """Keeps a process running while the block lasts."""
    is_over = threading.Event()
    present: list[subprocess.Popen[bytes]] = []
    # A worker that is forked meanwhile would inherit the pipe by which Popen learns that the command runs,
    # and Popen would wait until that worker ends.
    starting = threading.Lock()
    os.register_at_fork(
        before=starting.acquire, after_in_parent=starting.release, after_in_child=starting.release
    )

    def keep_running() -> None:
        delay = _FIRST_RESTART_SECONDS
        while not is_over.is_set():
            started = time.monotonic()
            # However this process ends, the pipe does with it.
            with starting:
                process = subprocess.Popen(  # noqa: S603
                    companion.command, stdin=subprocess.PIPE, env=companion.environ
                )
            present[:] = [process]
            if is_over.is_set():
                process.terminate()
            status = process.wait()
            if is_over.is_set():
                return
            if time.monotonic() - started > _LONGEST_RESTART_SECONDS:
                delay = _FIRST_RESTART_SECONDS
            log.error("companion_ended", status=status, restart_in_seconds=delay)
            is_over.wait(delay)
            delay = min(2 * delay, _LONGEST_RESTART_SECONDS)

    thread = threading.Thread(target=keep_running, name="companion", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        for process in present:
            process.terminate()
        thread.join(_COMPANION_SECONDS)
        for process in present:
            process.kill()


def _limit_handshakes(loop: asyncio.AbstractEventLoop, seconds: float) -> None:
    """aiohttp's sites, and gunicorn's worker with them, know no limit on the time of TLS's handshake but the
    loop's own minute, in which connections are counted nowhere."""
    create_server = loop.create_server

    async def limited(*arguments: Any, ssl: ssl.SSLContext | None = None, **options: Any) -> asyncio.Server:
        if ssl is not None:
            options |= {"ssl": ssl, "ssl_handshake_timeout": seconds}
        return await create_server(*arguments, **options)

    loop.create_server = limited  # type: ignore[method-assign, assignment]


def _notify(state: str) -> None:
    """Tells systemd, where it asked to be told (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address.startswith(("/", "@")):
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notifier:
            notifier.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)


def _room_for_connections() -> int:
    """How many connections a process has descriptors for; its limit is raised where it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _ENOUGH_DESCRIPTORS and soft < hard:
        soft = min(hard, _ENOUGH_DESCRIPTORS)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    # A download takes three: its connection, a second handle on it, and the package.
    return max(1, (soft - _SPARE_DESCRIPTORS) // 3)


def _listen(settings: ServerSettings) -> list[socket.socket]:
    """A listening socket for each address of the host, all on one port. Raises ServerError."""
    port = settings.port
    sockets: list[socket.socket] = []
    try:
        found = socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        for family, host in dict.fromkeys((entry[0], str(entry[4][0])) for entry in found):
            sockets.append(socket.create_server((host, port), family=family, backlog=_BACKLOG))
            port = sockets[0].getsockname()[1]
    except OSError as error:
        for opened in sockets:
            opened.close()
        # The loops' and getaddrinfo's own texts say too much or too little.
        reason = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
        raise ServerError(f"cannot listen on {settings.host}:{settings.port}: {reason}") from error
    return sockets


def _address(settings: ServerSettings, opened: socket.socket) -> str:
    host, port = opened.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _tls_context(settings: ServerSettings) -> ssl.SSLContext | None:
    if settings.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(settings.tls_cert, settings.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ServerError(f"the TLS certificate or key cannot be used: {error}") from error
    return context

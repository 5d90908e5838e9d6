"""The process: sockets, signals, draining."""

import asyncio
import os
import signal
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog
import uvloop
from aiohttp import web

from exportd.api.middleware import LIFECYCLE

log = structlog.get_logger()

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# After a drain: how long aborted downloads may take to be recorded.
_ABORT_SECONDS = 20.0


class ServerError(Exception):
    """The server cannot start. The message is for the operator."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where to listen, and with which certificate."""

    host: str
    port: int
    tls_cert: Path | None
    tls_key: Path | None


def serve(
    app: web.Application,
    listener: Listener,
    drain_timeout_seconds: float,
    on_started: Callable[[str], None] | None = None,
) -> int:
    """Serves until SIGTERM or SIGINT and returns the exit status: 0 after a drain, 1 after one cut short.

    The first signal stops accepting and lets running requests finish for ``drain_timeout_seconds``; a second
    one aborts them at once. ``on_started`` is told the address. Raises ServerError, and whatever the
    application's start-up raises.
    """
    return uvloop.run(_serve(app, listener, drain_timeout_seconds, on_started))


async def _serve(
    app: web.Application,
    listener: Listener,
    drain_timeout_seconds: float,
    on_started: Callable[[str], None] | None,
) -> int:
    stop, abort = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, _on_signal, stop, abort)
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1.0)
    try:
        await runner.setup()
        site = web.TCPSite(
            runner, listener.host, listener.port, ssl_context=_tls_context(listener), backlog=1024
        )
        try:
            await site.start()
        except OSError as error:
            # The loop's own text repeats the address.
            reason = os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
            raise ServerError(f"cannot listen on {listener.host}:{listener.port}: {reason}") from error
        scheme = "https" if listener.tls_cert else "http"
        host, port = runner.addresses[0][:2]
        url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        log.info("server_started", url=url)
        if on_started is not None:
            on_started(url)
        await stop.wait()
        return await _drain(app, site, abort, drain_timeout_seconds)
    finally:
        await runner.cleanup()


def _on_signal(stop: asyncio.Event, abort: asyncio.Event) -> None:
    (abort if stop.is_set() else stop).set()


async def _drain(
    app: web.Application, site: web.TCPSite, abort: asyncio.Event, drain_timeout_seconds: float
) -> int:
    lifecycle = app[LIFECYCLE]
    lifecycle.is_draining = True
    log.info("server_draining", timeout_seconds=drain_timeout_seconds)
    await site.stop()
    idle = asyncio.ensure_future(lifecycle.wait_until_idle(drain_timeout_seconds))
    second_signal = asyncio.ensure_future(abort.wait())
    await asyncio.wait([idle, second_signal], return_when=asyncio.FIRST_COMPLETED)
    cut_short = second_signal.done()
    second_signal.cancel()
    idle.cancel()
    aborted = lifecycle.cancel_all()
    if aborted:
        await lifecycle.wait_until_idle(_ABORT_SECONDS)
    log.info("server_stopped", requests_aborted=aborted)
    return 1 if cut_short else 0


def _tls_context(listener: Listener) -> ssl.SSLContext | None:
    if listener.tls_cert is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    try:
        context.load_cert_chain(listener.tls_cert, listener.tls_key)
    except (OSError, ssl.SSLError) as error:
        raise ServerError(f"the TLS certificate or key cannot be used: {error}") from error
    return context

"""One asynchronous connection by libpq and aiopg, without their faults.

aiopg does not notice that libpq opens a new socket for each try, so libpq is started here and aiopg gets the
established connection. The sockets are watched by an epoll of exportd's own.
"""

import asyncio
import contextlib
import ctypes
import functools
import re
import select
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import aiopg
import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ, PYDATETIMETZ

# SQLSTATE classes of errors that may be gone soon: connections, resources, an operator's intervention, the
# server's system. pgbouncer reports nearly everything as 08P01.
_TRANSIENT_CLASSES = ("08", "53", "57", "58", "XX")

# PostgreSQL's times have years beyond Python's. A year is left for sums.
FIRST_TIME = datetime(2, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 1, 1, tzinfo=UTC)

_libpq = ctypes.CDLL(psycopg2._psycopg.__file__)
_libpq.PQsetErrorVerbosity.argtypes = [ctypes.c_void_p, ctypes.c_int]
_libpq.PQconnectionNeedsPassword.argtypes = [ctypes.c_void_p]
_DEFAULT, _VERBOSE = 1, 2


class ConnectFailed(psycopg2.OperationalError):
    """There is no connection. The message is the server's or libpq's.

    ``sqlstate`` is None if the server did not answer. ``is_transient``: waiting may help.
    """

    sqlstate: str | None = None
    is_transient = True


async def start_connection(dsn: str, timeout_seconds: float) -> Any:
    """Returns an aiopg connection, whose statements have the time limit by default. It reads times beyond
    Python's as FIRST_TIME and LAST_TIME.

    The host of the string must be one address. Raises ConnectFailed and psycopg2.Error.
    """
    raw = _Connection(dsn, 1)
    try:
        await raw.start()
        psycopg2.extensions.register_type(_TIMES, raw)
    except BaseException:
        raw.close()
        raise
    # The connection is there, so aiopg does not wait.
    return await _AiopgConnection(
        None, timeout_seconds, enable_hstore=False, connection_factory=lambda *_: raw
    )


class _Connection(psycopg2.extensions.connection):
    """An asynchronous connection that is started before aiopg gets it.

    A start that fails is reported with its SQLSTATE, which psycopg2 does not have: libpq writes it into the
    message if it is asked to.
    """

    def __init__(self, dsn: str, is_async: int) -> None:
        super().__init__(dsn, is_async)  # type: ignore[call-arg]  # by position, as psycopg2 passes it
        _libpq.PQsetErrorVerbosity(self.pgconn_ptr, _VERBOSE)
        self._is_new = True

    async def start(self) -> None:
        """Raises ConnectFailed."""
        try:
            with contextlib.closing(_SocketWatcher(asyncio.get_running_loop())) as watcher:
                while (state := self.poll()) != POLL_OK:
                    await watcher.wait_until_ready(state, self.fileno())
        except psycopg2.OperationalError as error:
            failure = ConnectFailed(re.sub(r"\nLOCATION:.*", "", str(error)))
            if found := re.search(r": +([0-9A-Z]{5}): ", str(error)):
                failure.sqlstate = found[1]
                failure.is_transient = failure.sqlstate.startswith(_TRANSIENT_CLASSES)
            elif _libpq.PQconnectionNeedsPassword(self.pgconn_ptr):
                failure.is_transient = False
            raise failure from None
        _libpq.PQsetErrorVerbosity(self.pgconn_ptr, _DEFAULT)

    def isexecuting(self) -> bool:
        """True at first: aiopg expects a connection that is being established."""
        is_new, self._is_new = self._is_new, False
        return is_new or bool(super().isexecuting())


class _AiopgConnection(aiopg.Connection):
    _watcher: "_SocketWatcher"

    # aiopg watches its socket by the event loop that it sets here.
    @property  # type: ignore[override]
    def _loop(self) -> "_SocketWatcher":
        return self._watcher

    @_loop.setter
    def _loop(self, loop: asyncio.AbstractEventLoop) -> None:
        self._watcher = _SocketWatcher(loop)

    def _close(self) -> None:
        super()._close()
        self._watcher.close()


class _SocketWatcher:
    """An event loop that watches sockets by an epoll of its own.

    uvloop stops watching a socket that has an error, such as one whose peer no longer answers, and calls no
    callback. If libpq closes its socket at the wrong moment, uvloop also refuses every later socket with that
    descriptor.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._real_loop = loop
        self._epoll = select.epoll()
        self._callbacks: dict[int, dict[int, Callable[[], object]]] = {}
        loop.add_reader(self._epoll.fileno(), self._call_back)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real_loop, name)

    def add_reader(self, descriptor: int, callback: Callable[..., object], *arguments: object) -> None:
        self._watch(descriptor, select.EPOLLIN, functools.partial(callback, *arguments))

    def add_writer(self, descriptor: int, callback: Callable[..., object], *arguments: object) -> None:
        self._watch(descriptor, select.EPOLLOUT, functools.partial(callback, *arguments))

    def remove_reader(self, descriptor: int) -> None:
        self._watch(descriptor, select.EPOLLIN, None)

    def remove_writer(self, descriptor: int) -> None:
        self._watch(descriptor, select.EPOLLOUT, None)

    async def wait_until_ready(self, state: int, descriptor: int) -> None:
        """Waits for what libpq waits for. ``state`` is the result of ``poll``."""
        is_ready = asyncio.Event()
        event = select.EPOLLIN if state == POLL_READ else select.EPOLLOUT
        self._watch(descriptor, event, is_ready.set)
        try:
            await is_ready.wait()
        finally:
            self._watch(descriptor, event, None)

    def close(self) -> None:
        if not self._epoll.closed:
            if not self._real_loop.is_closed():
                self._real_loop.remove_reader(self._epoll.fileno())
            self._epoll.close()

    def _watch(self, descriptor: int, event: int, callback: Callable[[], object] | None) -> None:
        if self._epoll.closed:
            return
        callbacks = self._callbacks.setdefault(descriptor, {})
        callbacks.pop(event, None)
        if callback is not None:
            callbacks[event] = callback
        # The kernel has forgotten a descriptor that was closed, and may know it again by another socket.
        with contextlib.suppress(OSError):
            self._epoll.unregister(descriptor)
        if callbacks:
            self._epoll.register(descriptor, sum(callbacks))

    def _call_back(self) -> None:
        for descriptor, events in self._epoll.poll(0):
            for event, callback in list(self._callbacks.get(descriptor, {}).items()):
                if events & (event | select.EPOLLERR | select.EPOLLHUP):
                    callback()


def _read_time(text: Any, cursor: Any) -> datetime | None:
    if text is None:
        return None
    try:
        found: datetime = PYDATETIMETZ(text, cursor).astimezone(UTC)
    except (ValueError, OverflowError, psycopg2.Error):
        return FIRST_TIME if text.endswith("BC") or text.startswith("-") else LAST_TIME
    return min(max(found, FIRST_TIME), LAST_TIME)


_TIMES = psycopg2.extensions.new_type(PYDATETIMETZ.values, "EXPORTD_TIMES", _read_time)

"""Connections: to the first server of a connection string that accepts writes, and a pool of them.

libpq would resolve names in the event loop, and give a server that is silent all the time there is. So this
module makes a list of addresses, and hands them to libpq one by one. It also waits for libpq in place of
aiopg, which does not notice that libpq opens a new socket for each try.

Nothing is set for a session, because a pooler hands sessions to other clients. ``ServerConnection.prefix``
holds what a transaction must set.
"""

import asyncio
import contextlib
import ctypes
import functools
import os
import random
import re
import select
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

import aiopg
import psycopg2
import psycopg2.extensions
from psycopg2.extensions import POLL_OK, POLL_READ, PYDATETIMETZ, TRANSACTION_STATUS_IDLE, make_dsn, parse_dsn

from exportd.db.dsn import check_dsn, complete_dsn
from exportd.errors import OperatorError

MINIMUM_SERVER_VERSION = 140000

# libpq reads these variables for what the string does not say.
_VARIABLES = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "sslmode": "PGSSLMODE",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
# SQLSTATE classes of errors that may be gone soon: connections, resources, an operator's intervention, the
# server's system. pgbouncer reports nearly everything as 08P01.
_TRANSIENT_CLASSES = ("08", "53", "57", "58", "XX")

# Settings of a role, a database or a pooler's server connection that would change what a statement does.
_WANTED = {
    "transaction_isolation": "read committed",
    "transaction_read_only": "off",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "transaction_timeout": "0",
}
_PRESENT = ", ".join(f"current_setting('{name}', true)" for name in _WANTED)
_LOOK = f"SELECT pg_is_in_recovery(), pg_backend_pid(), version() LIKE '%linux%', {_PRESENT}"
# An abandoned statement must not hold its locks while it waits for other locks. Not every system can do that.
_NOTICE_ABANDONMENT = "SET LOCAL client_connection_check_interval = 250; "
# For a transaction without time limits, on a server that accepts writes.
WITHOUT_LIMITS = """
SET LOCAL transaction_isolation = 'read committed';
SET LOCAL transaction_read_only = off;
SET LOCAL lock_timeout = 0;
SET LOCAL statement_timeout = 0;
SET LOCAL idle_in_transaction_session_timeout = 0;
"""

# Older connections are closed: after a failover or a change of names they may be to the wrong server.
_MAX_AGE_SECONDS = 600.0
# How long a closing pool waits for the blocks that hold a connection.
_CLOSING_SECONDS = 5.0
# Of the start: the limit of one attempt, and the pause after it.
_ATTEMPT_SECONDS = 5.0
_PAUSE_SECONDS = 0.25

# PostgreSQL's times have years beyond Python's. A year is left for sums.
FIRST_TIME = datetime(2, 1, 1, tzinfo=UTC)
LAST_TIME = datetime(9999, 1, 1, tzinfo=UTC)

# The message that asks a server for TLS: its length and a code.
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)

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


class DatabaseNotReachable(OperatorError):
    """The database cannot be reached. The message is for the operator, on one line."""


class DatabaseTooOld(OperatorError):
    """The server's version is not supported."""


@dataclass(slots=True, eq=False)
class ServerConnection:
    """A connection, and what the server said about it."""

    aiopg: Any
    opened_at: float
    is_standby: bool
    # A pooler's connection may be to another session for each transaction.
    is_pooled: bool
    prefix: str

    @property
    def is_usable(self) -> bool:
        """Whether it may be used again: it is open, not too old, and not to a standby, which may lag behind a
        new primary."""
        is_young = time.monotonic() - self.opened_at < _MAX_AGE_SECONDS
        return is_young and not self.is_standby and not self.aiopg.closed

    def close(self) -> None:
        """Closes it immediately."""
        self.aiopg.close()


class _Server(NamedTuple):
    """``address`` is empty for a Unix socket, which ``host`` names."""

    host: str
    address: str
    port: str

    def __str__(self) -> str:
        return ":".join(filter(None, (self.address or self.host, self.port)))


class Connector:
    """Connects with one connection string, within a time limit for all its servers together."""

    def __init__(self, dsn: str, timeout_seconds: float, statement_timeout_seconds: float) -> None:
        given = {
            name: os.environ[variable] for name, variable in _VARIABLES.items() if variable in os.environ
        }
        fields = {
            "fallback_application_name": "exportd",
            "gssencmode": "disable",
            **given,
            **parse_dsn(complete_dsn(dsn)),
        }
        self._hosts = fields.pop("host", "").split(",")
        self._addresses = fields.pop("hostaddr", "").split(",")
        self._ports = fields.pop("port", "").split(",")
        self._needs_primary = fields.pop("target_session_attrs", "any") in ("read-write", "primary")
        self._is_random = fields.pop("load_balance_hosts", "disable") == "random"
        self._fields = fields
        self._timeout_seconds = timeout_seconds
        self._limit = f"SET LOCAL statement_timeout = {int(statement_timeout_seconds * 1000)}; "
        self._resolved: dict[str, list[str]] = {}
        self._last: _Server | None = None

    async def connect(self) -> ServerConnection:
        """Returns a connection to a server that accepts writes; to a standby if no other server answers, and
        the string does not demand a primary.

        Raises ConnectFailed, with the message of each server.
        """
        deadline = time.monotonic() + self._timeout_seconds
        servers, failures = await self._list_servers()
        standby: ServerConnection | None = None
        try:
            for number, server in enumerate(servers):
                share = max(0.05, deadline - time.monotonic()) / (len(servers) - number)
                try:
                    connection = await self._attempt(server, share)
                except ConnectFailed as error:
                    failures.append(error)
                    continue
                if not connection.is_standby:
                    self._last = server
                    return connection
                if standby is not None:
                    standby.close()
                standby = connection
            if standby is not None and not self._needs_primary:
                found, standby = standby, None
                return found
        finally:
            if standby is not None:
                standby.close()
        if standby is not None:
            failures.append(ConnectFailed("the server accepts no writes"))
        raise _joined(failures)

    async def _list_servers(self) -> tuple[list[_Server], list[ConnectFailed]]:
        """The servers in order, and a failure for each name that cannot be resolved."""
        servers: list[_Server] = []
        failures: list[ConnectFailed] = []
        for number in range(max(len(self._hosts), len(self._addresses))):
            host = self._hosts[number % len(self._hosts)]
            port = self._ports[number % len(self._ports)]
            given = self._addresses[number % len(self._addresses)]
            try:
                addresses = [given] if given else await self._resolve(host)
            except (OSError, TimeoutError) as error:
                reason = str(error) or "no answer of the name server in time"
                failures.append(ConnectFailed(f"the name {host} cannot be resolved: {reason}"))
            else:
                servers += [_Server(host, address, port) for address in addresses]
        if self._is_random:
            random.shuffle(servers)
        # The last server that accepted writes probably still does.
        servers.sort(key=lambda server: server != self._last)
        return servers, failures

    async def _resolve(self, host: str) -> list[str]:
        """The addresses of a name; "" for a Unix socket. If the name server fails, those it gave last time.

        Raises OSError and TimeoutError."""
        if not host or host.startswith(("/", "@")):
            return [""]
        try:
            async with asyncio.timeout(self._timeout_seconds / 2):
                found = await asyncio.get_running_loop().getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, TimeoutError):
            if host not in self._resolved:
                raise
        else:
            self._resolved[host] = list(dict.fromkeys(str(address[0]) for *_, address in found))
        return self._resolved[host]

    async def _attempt(self, server: _Server, seconds: float) -> ServerConnection:
        """Raises ConnectFailed."""
        place = {"host": server.host, "hostaddr": server.address, "port": server.port}
        fields = {**self._fields, **{name: value for name, value in place.items() if value}}
        try:
            async with asyncio.timeout(seconds):
                raw = _Connection(make_dsn(**fields), 1)
                try:
                    await raw.start()
                except BaseException:
                    raw.close()
                    raise
                connection = _AiopgConnection(
                    None, seconds, enable_hstore=False, connection_factory=lambda *_: raw
                )
                try:
                    # The connection is there, so aiopg does not wait.
                    await connection
                    return await self._look(connection)
                except BaseException:
                    connection.close()
                    raise
        except TimeoutError:
            raise ConnectFailed(f"{server}: no answer in time") from None
        except ConnectFailed as error:
            is_demanded = fields.get("sslmode") in ("require", "verify-ca", "verify-full")
            if is_demanded and error.sqlstate is None and await _answers_request_for_tls(server, seconds):
                # The server is there, and has no TLS, or not as demanded.
                error.is_transient = False
            raise
        except psycopg2.Error as error:
            raise ConnectFailed(f"{server}: {error}") from error

    async def _look(self, connection: Any) -> ServerConnection:
        psycopg2.extensions.register_type(_TIMES, connection.raw)
        async with connection.cursor() as cursor:
            await cursor.execute(self._limit + _LOOK)
            ((is_standby, backend_pid, is_linux, *settings),) = await cursor.fetchall()
        overrides = [
            f"SET LOCAL {name} = '{wanted}'; "
            for (name, wanted), setting in zip(_WANTED.items(), settings, strict=True)
            if setting not in (None, wanted) and not (name == "transaction_read_only" and is_standby)
        ]
        return ServerConnection(
            connection,
            time.monotonic(),
            is_standby,
            backend_pid != connection.raw.info.backend_pid,
            "".join(overrides) + self._limit + (_NOTICE_ABANDONMENT if is_linux else ""),
        )


class ConnectionPool:
    """Up to ``max_size`` connections. Broken, old and dropped ones are replaced on demand."""

    def __init__(self, connector: Connector, max_size: int, timeout_seconds: float) -> None:
        self.max_size = max_size
        self._connector = connector
        self._timeout_seconds = timeout_seconds
        self._places = asyncio.Semaphore(max_size)
        self._idle: list[ServerConnection] = []
        self._held: set[ServerConnection] = set()
        self._released = asyncio.Event()
        self._dropped_at = 0.0
        self._is_closing = False
        self.in_use = 0

    @property
    def idle(self) -> int:
        """The number of connections that nobody uses."""
        return len(self._idle)

    async def open(self, count: int) -> None:
        """Opens connections. Raises ConnectFailed."""
        while self.idle < count:
            self._idle.append(await self._connector.connect())

    @contextlib.asynccontextmanager
    async def acquire(self) -> AsyncIterator[ServerConnection]:
        """A connection for the block. Raises TimeoutError, ConnectFailed, and RuntimeError if the pool is
        closing."""
        if self._is_closing:
            raise RuntimeError("the pool is closing")
        async with asyncio.timeout(self._timeout_seconds):
            await self._places.acquire()
        self.in_use += 1
        try:
            connection = self._take_idle() or await self._connector.connect()
            self._held.add(connection)
            try:
                yield connection
            finally:
                self._held.discard(connection)
                self._give_back(connection)
        finally:
            self.in_use -= 1
            self._places.release()
            self._released.set()

    def drop(self) -> None:
        """Closes every connection: idle ones immediately, the others when their block ends."""
        self._dropped_at = time.monotonic()
        while self._idle:
            self._idle.pop().close()

    async def close(self) -> None:
        """As ``drop``, but waits some seconds for the blocks that run, and then closes their connections."""
        self._is_closing = True
        self.drop()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSING_SECONDS):
                while self.in_use:
                    self._released.clear()
                    await self._released.wait()
        for connection in self._held:
            connection.close()

    def _take_idle(self) -> ServerConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable:
                return connection
            connection.close()
        return None

    def _give_back(self, connection: ServerConnection) -> None:
        is_between_transactions = not connection.aiopg.closed and (
            connection.aiopg.raw.get_transaction_status() == TRANSACTION_STATUS_IDLE
        )
        if is_between_transactions and connection.is_usable and connection.opened_at > self._dropped_at:
            self._idle.append(connection)
        else:
            connection.close()


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
            while (state := self.poll()) != POLL_OK:
                await _ready_for(state, self.fileno())
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

    uvloop stops watching a socket that has an error, such as one whose peer does not answer any more, and
    tells nobody. It also refuses a descriptor for ever if libpq closed its socket at the wrong moment.
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


async def _ready_for(state: int, descriptor: int) -> None:
    """Waits until libpq can go on."""
    watcher = _SocketWatcher(asyncio.get_running_loop())
    is_ready = asyncio.Event()
    try:
        (watcher.add_reader if state == POLL_READ else watcher.add_writer)(descriptor, is_ready.set)
        await is_ready.wait()
    finally:
        watcher.close()


def wait_for_database(dsn: str, timeout_seconds: float, on_wait: Callable[[str], None]) -> None:
    """Returns when a server accepts a connection. Calls ``on_wait`` with the reason of the first failure.

    Does not wait after an error that waiting cannot cure, such as a wrong password.
    Raises DsnRefused, DatabaseNotReachable and DatabaseTooOld.
    """
    check_dsn(dsn)
    version = asyncio.run(_wait(dsn, timeout_seconds, on_wait))
    if version < MINIMUM_SERVER_VERSION:
        raise DatabaseTooOld(f"PostgreSQL 14 or newer is needed; the server is {version // 10000}")


async def _wait(dsn: str, timeout_seconds: float, on_wait: Callable[[str], None]) -> int:
    deadline = time.monotonic() + timeout_seconds
    is_waiting = False
    connector = Connector(dsn, min(_ATTEMPT_SECONDS, max(1.0, timeout_seconds)), _ATTEMPT_SECONDS)
    while True:
        try:
            connection = await connector.connect()
        except ConnectFailed as error:
            reason = " ".join(str(error).split())
            if not error.is_transient or time.monotonic() >= deadline:
                raise DatabaseNotReachable(reason) from error
            if not is_waiting:
                on_wait(reason)
                is_waiting = True
            await asyncio.sleep(_PAUSE_SECONDS)
        else:
            version: int = connection.aiopg.raw.server_version
            connection.close()
            return version


def connect_blocking(dsn: str, *, is_writing: bool) -> Any:
    """A psycopg2 connection, for a command that blocks. ``is_writing``: to a server that accepts writes.

    Raises psycopg2.OperationalError.
    """
    fields = {"connect_timeout": "10", **parse_dsn(complete_dsn(dsn))}
    fields["target_session_attrs"] = "primary" if is_writing else "any"
    return psycopg2.connect(make_dsn(**fields))


def _joined(failures: list[ConnectFailed]) -> ConnectFailed:
    joined = ConnectFailed("; ".join(dict.fromkeys(" ".join(str(failure).split()) for failure in failures)))
    joined.is_transient = any(failure.is_transient for failure in failures)
    return joined


async def _answers_request_for_tls(server: _Server, seconds: float) -> bool:
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection(server.address, int(server.port or 5432))
            try:
                writer.write(_SSL_REQUEST)
                return await reader.read(1) in (b"S", b"N")
            finally:
                writer.close()
    return False


def _read_time(text: Any, cursor: Any) -> datetime | None:
    if text is None:
        return None
    try:
        found: datetime = PYDATETIMETZ(text, cursor).astimezone(UTC)
    except (ValueError, OverflowError, psycopg2.Error):
        return FIRST_TIME if text.endswith("BC") or text.startswith("-") else LAST_TIME
    return min(max(found, FIRST_TIME), LAST_TIME)


_TIMES = psycopg2.extensions.new_type(PYDATETIMETZ.values, "EXPORTD_TIMES", _read_time)

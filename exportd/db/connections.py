"""Connections: to the first server of a connection string that accepts writes, and a pool of them.

libpq would resolve names in the event loop, and give a server that is silent all the time there is. So this
module makes a list of addresses, and hands them to libpq one by one.

Nothing is set for a session, because a pooler hands sessions to other clients. ``ServerConnection.prefix``
holds what a transaction must set.
"""

import asyncio
import contextlib
import os
import random
import socket
import struct
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import psycopg2
from psycopg2.extensions import TRANSACTION_STATUS_IDLE, make_dsn, parse_dsn

from exportd.db.driver import ConnectFailed, start_connection
from exportd.db.dsn import complete_dsn

# libpq reads these variables for what the string does not say.
_VARIABLES = {
    "host": "PGHOST",
    "hostaddr": "PGHOSTADDR",
    "port": "PGPORT",
    "sslmode": "PGSSLMODE",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
# Settings of a role, a database or a pooler's server connection that would change what a statement does.
_WANTED = {
    "transaction_isolation": "read committed",
    "transaction_read_only": "off",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
# Not every version has transaction_timeout.
_ASKED = {**_WANTED, "transaction_timeout": "0"}
_PRESENT = ", ".join(f"current_setting('{name}', true)" for name in _ASKED)
_LOOK = f"SELECT pg_is_in_recovery(), pg_backend_pid(), version() LIKE '%linux%', {_PRESENT}"


def _set_local(settings: Mapping[str, object]) -> str:
    """The beginning of a message whose transaction has these settings."""
    return "".join(f"SET LOCAL {name} = '{value}'; " for name, value in settings.items())


# For a transaction without time limits, on a server that accepts writes.
WITHOUT_LIMITS = _set_local({**_WANTED, "statement_timeout": 0})

# Older connections are closed: after a failover or a change of names they may be to the wrong server.
_MAX_AGE_SECONDS = 600.0
# How long a closing pool waits for the blocks that hold a connection.
_CLOSING_SECONDS = 5.0

# The message that asks a server for TLS: its length and a code.
_SSL_REQUEST = struct.pack("!ii", 8, 80877103)


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
        self._statement_timeout_ms = int(statement_timeout_seconds * 1000)
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
                connection = await start_connection(make_dsn(**fields), seconds)
                try:
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
        settings = {"statement_timeout": self._statement_timeout_ms}
        async with connection.cursor() as cursor:
            await cursor.execute(_set_local(settings) + _LOOK)
            ((is_standby, backend_pid, is_linux, *present),) = await cursor.fetchall()
        overrides = {
            name: wanted
            for (name, wanted), setting in zip(_ASKED.items(), present, strict=True)
            if setting not in (None, wanted) and not (name == "transaction_read_only" and is_standby)
        }
        if is_linux:
            # An abandoned statement must not hold its locks while it waits for other locks. Not every system
            # can do that.
            settings["client_connection_check_interval"] = 250
        return ServerConnection(
            connection,
            time.monotonic(),
            is_standby,
            backend_pid != connection.raw.info.backend_pid,
            _set_local({**overrides, **settings}),
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
        """The number of idle connections."""
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

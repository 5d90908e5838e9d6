"""The database, for commands that block: the wait at the start, and psycopg2's own connections."""

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import psycopg2
from psycopg2.extensions import make_dsn, parse_dsn

from exportd.db.connections import Connector
from exportd.db.driver import ConnectFailed
from exportd.db.dsn import check_dsn, complete_dsn
from exportd.errors import OperatorError

MINIMUM_SERVER_VERSION = 140000

# The limit of one attempt at the start, and the pause after it.
_ATTEMPT_SECONDS = 5.0
_PAUSE_SECONDS = 0.25


class DatabaseNotReachable(OperatorError):
    """The database cannot be reached. The message is for the operator, on one line."""


class DatabaseTooOld(OperatorError):
    """The server's version is not supported."""


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


@contextlib.contextmanager
def blocking_cursor(dsn: str, *, is_writing: bool) -> Iterator[Any]:
    """A cursor of such a connection, for one transaction, which is rolled back at the end of the block.

    Raises psycopg2.OperationalError.
    """
    with (
        contextlib.closing(connect_blocking(dsn, is_writing=is_writing)) as connection,
        connection.cursor() as cursor,
    ):
        yield cursor

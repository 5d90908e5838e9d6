"""The database, for everything that runs in the event loop: statements on a pool of connections.

Statements run in autocommit (psycopg2 offers nothing else asynchronously), so each statement is a
transaction. ``Database.session`` is for statements that belong together. The pool replaces broken
connections, and a statement that met one is sent again, once. So the rule for callers: a statement is a read,
or idempotent.

A pooler may run each transaction in another session. So nothing is kept in a session: no setting, no lock.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import psycopg2
import psycopg2.errors
import structlog
from psycopg2.extras import NamedTupleCursor

from exportd.db.connections import ConnectionPool, Connector, ServerConnection
from exportd.db.driver import ConnectFailed
from exportd.errors import OperatorError

log = structlog.get_logger()

Parameters = Mapping[str, object] | Sequence[object]

# The server cancels a statement this much later than the client, so that a late event loop still sees its own
# time limit first. The server's limit is for statements whose client has gone.
_SERVER_GRACE_SECONDS = 1.0


# The transaction stays open.
_TAKE_LOCK = "BEGIN; SELECT pg_try_advisory_xact_lock(hashtextextended(%s, 0)) AS is_held"


class DatabaseError(OperatorError):
    """A statement failed."""


class DatabaseUnavailable(DatabaseError):
    """The database cannot be reached, or took too long."""


class DatabaseRefused(DatabaseError):
    """The database rejects a statement, or holds a value that cannot be read, until somebody changes that. It
    may lack a table or a right."""


class ReadOnly(DatabaseUnavailable):
    """The server accepts no writes, as one that is not the primary yet, or no longer."""


class ValueRefused(DatabaseRefused):
    """The database rejects a value. Retrying does not help."""


@dataclass(frozen=True, slots=True)
class PoolUse:
    """The number of connections, and the most there may be."""

    in_use: int
    idle: int
    limit: int


class Database:
    """A pool of connections to one database. Made by ``open_database``."""

    def __init__(
        self,
        pool: ConnectionPool,
        connector: Connector,
        listener: Connector,
        statement_timeout_seconds: float,
    ) -> None:
        self._pool = pool
        self._connector = connector
        self._listener = listener
        self._statement_timeout_seconds = statement_timeout_seconds

    async def fetch_all(self, statement: str, parameters: Parameters = ()) -> list[Any]:
        """Runs one statement and returns its rows, as named tuples.

        The statement must be a read, or idempotent: it is sent again if the connection breaks.
        Raises DatabaseError.
        """
        try:
            return await self._run(statement, parameters)
        except ConnectFailed as error:
            # Every server was tried.
            raise DatabaseUnavailable(_one_line(error)) from error
        except (psycopg2.OperationalError, psycopg2.InterfaceError, ReadOnly) as error:
            log.warning("database_connection_lost", error=_one_line(error))
            # A server that restarted has closed the idle connections too, and after a failover they are to a
            # server that accepts no writes. The retry gets a new one.
            self._pool.drop()
        with _broken_is_unavailable():
            return await self._run(statement, parameters)

    async def fetch_one(self, statement: str, parameters: Parameters = ()) -> Any | None:
        """As ``fetch_all``, for a statement that returns at most one row."""
        rows = await self.fetch_all(statement, parameters)
        return rows[0] if rows else None

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator["Session"]:
        """One connection of the pool, for statements that belong together. Raises DatabaseUnavailable."""
        async with contextlib.AsyncExitStack() as stack:
            with _broken_is_unavailable(), _translated():
                connection = await stack.enter_async_context(self._pool.acquire())
            session = Session(connection, self._statement_timeout_seconds)
            try:
                await session.fetch_all("SELECT")
            except DatabaseUnavailable:
                # A server that restarted has closed the idle connections.
                self._pool.drop()
                with _broken_is_unavailable(), _translated():
                    connection = await stack.enter_async_context(self._pool.acquire())
                session = Session(connection, self._statement_timeout_seconds)
            try:
                yield session
            except ReadOnly:
                # Neither this connection nor the idle ones would be of use to the next caller.
                self._pool.drop()
                raise

    @contextlib.asynccontextmanager
    async def listening(self, channel: str) -> AsyncIterator[Callable[[float], Awaitable[None]]]:
        """Listens on a channel while the block runs, on a connection of its own. Yields a function that waits
        for the next notification, for a number of seconds at most. Both raise DatabaseUnavailable.

        A pooler that gives each transaction another session delivers no notifications. Then the function
        waits for the whole time."""
        with _broken_is_unavailable(), _translated():
            connection = await self._listener.connect()
        try:
            session = Session(connection, self._statement_timeout_seconds)
            if not connection.is_pooled:
                await session.fetch_all(f'LISTEN "{channel}"')
            yield session.wait_for_notification
        finally:
            connection.close()

    @contextlib.asynccontextmanager
    async def try_lock(self, name: str) -> AsyncIterator[bool]:
        """Holds a lock in the whole database while the block runs. Yields False if somebody else holds it.

        A transaction on a connection of its own holds it, because a pooler may run each transaction in
        another session. Raises DatabaseUnavailable.
        """
        with _broken_is_unavailable(), _translated():
            connection = await self._connector.connect()
        try:
            session = Session(connection, self._statement_timeout_seconds)
            row = await session.fetch_one(_TAKE_LOCK, (name,))
            assert row is not None
            yield row.is_held
        finally:
            connection.close()

    @property
    def pool_use(self) -> PoolUse:
        """The pool's present use."""
        return PoolUse(self._pool.in_use, self._pool.idle, self._pool.max_size)

    async def close(self) -> None:
        """Closes idle connections immediately, and the others when their statement ends, or after a few
        seconds."""
        await self._pool.close()

    async def _run(self, statement: str, parameters: Parameters) -> list[tuple[Any, ...]]:
        with _translated():
            async with self._pool.acquire() as connection:
                return await _execute(
                    connection, connection.prefix + statement, parameters, self._statement_timeout_seconds
                )


class Session:
    """One connection, for transactions. Statements are not retried. Made by ``Database.session``."""

    def __init__(self, connection: ServerConnection, statement_timeout_seconds: float) -> None:
        self._connection = connection
        self._statement_timeout_seconds = statement_timeout_seconds
        self._is_in_transaction = False

    async def fetch_all(self, statement: str, parameters: Parameters = ()) -> list[Any]:
        """Runs one statement and returns its rows, as named tuples. Raises DatabaseError."""
        if not self._is_in_transaction:
            statement = self._connection.prefix + statement
        return await self._execute(statement, parameters)

    async def fetch_one(self, statement: str, parameters: Parameters = ()) -> Any | None:
        """As ``fetch_all``, for a statement that returns at most one row."""
        rows = await self.fetch_all(statement, parameters)
        return rows[0] if rows else None

    async def wait_for_notification(self, seconds: float) -> None:
        """Waits for a notification of what the connection listens to. Raises DatabaseUnavailable."""
        with _broken_is_unavailable(), _translated(), contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._connection.aiopg.notifies.get()

    @contextlib.asynccontextmanager
    async def transaction(self) -> AsyncIterator[None]:
        """Runs the block's statements in a transaction, which is rolled back if the block raises.

        If the connection breaks at the end, it is unknown whether the transaction was committed.
        """
        try:
            # Inside the try: a cancellation may arrive together with the answer.
            await self._execute(f"BEGIN; {self._connection.prefix}")
            self._is_in_transaction = True
            yield
        except BaseException:
            with contextlib.suppress(DatabaseUnavailable):
                await self._execute("ROLLBACK")
            raise
        else:
            await self._execute("COMMIT")
        finally:
            self._is_in_transaction = False

    async def _execute(self, statement: str, parameters: Parameters = ()) -> list[Any]:
        with _broken_is_unavailable(), _translated():
            return await _execute(self._connection, statement, parameters, self._statement_timeout_seconds)


async def _execute(
    connection: ServerConnection, statement: str, parameters: Parameters, timeout_seconds: float
) -> list[Any]:
    async with connection.aiopg.cursor(cursor_factory=NamedTupleCursor) as cursor:
        await cursor.execute(statement, parameters, timeout=timeout_seconds)
        return await cursor.fetchall() if cursor.description else []


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    """Translates the drivers' exceptions into this module's errors, except for a connection that broke.

    A cancellation is always raised, whatever happens below: Python 3.11's wait_for, in aiopg, swallows one
    that arrives together with the answer, and aiopg may report a closed connection instead.
    """
    before = _cancellations()
    try:
        yield
    except Exception as error:
        if _cancellations() > before:
            raise asyncio.CancelledError from error
        translation = _translation(error)
        if translation is None:
            raise
        raise translation from error
    except asyncio.CancelledError as error:
        # aiopg turns the server's "canceling statement due to statement timeout" into a CancelledError.
        if _cancellations() > before:
            raise
        raise DatabaseUnavailable("the server cancelled the statement") from error
    if _cancellations() > before:
        raise asyncio.CancelledError


def _translation(error: Exception) -> Exception | None:
    match error:
        case psycopg2.OperationalError() | psycopg2.InterfaceError():
            return None
        case psycopg2.DataError() | psycopg2.IntegrityError() | ValueError():
            # ValueError: a value that psycopg2 cannot send, or a time that Python cannot represent.
            return ValueRefused(_one_line(error))
        case psycopg2.errors.ReadOnlySqlTransaction():
            return ReadOnly(_one_line(error))
        case psycopg2.Error():
            return DatabaseRefused(_one_line(error))
        case RuntimeError():
            return DatabaseUnavailable("the pool is closing")
        case TimeoutError():
            return DatabaseUnavailable("no connection or no answer in time")
    return None


def _cancellations() -> int:
    task = asyncio.current_task()
    return task.cancelling() if task is not None else 0


@contextlib.contextmanager
def _broken_is_unavailable() -> Iterator[None]:
    try:
        yield
    except (psycopg2.OperationalError, psycopg2.InterfaceError) as error:
        raise DatabaseUnavailable(_one_line(error)) from error


async def open_database(
    dsn: str,
    *,
    pool_min_size: int,
    pool_max_size: int,
    connect_timeout_seconds: float,
    statement_timeout_seconds: float,
    direct_dsn: str | None = None,
) -> Database:
    """Opens the pool. ``direct_dsn``: a way to the same database past a pooler, for notifications.

    Raises DatabaseUnavailable.
    """

    server_limit = statement_timeout_seconds + _SERVER_GRACE_SECONDS
    connector = Connector(dsn, connect_timeout_seconds, server_limit)
    listener = Connector(direct_dsn, connect_timeout_seconds, server_limit) if direct_dsn else connector
    pool = ConnectionPool(connector, pool_max_size, connect_timeout_seconds)
    with _broken_is_unavailable():
        await pool.open(pool_min_size)
    return Database(pool, connector, listener, statement_timeout_seconds)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__

"""Schema migrations: raw SQL in ``migrations/``, run up and down by yoyo.

A PostgreSQL advisory lock replaces yoyo's own lock, which is a row that a killed process leaves in the table.
yoyo's book-keeping tables get names of exportd's own, because the application may use yoyo in the same
database.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import structlog
import yoyo
from yoyo.backends.core.postgresql import PostgresqlBackend
from yoyo.connections import DatabaseURI

from exportd.db.adoption import find_problems
from exportd.errors import OperatorError

log = structlog.get_logger()

MINIMUM_SERVER_VERSION = 140000
_TABLE = "exportd_migrations"
_FOLDER = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x6578706F72746400  # "exportd" in ASCII

# While a migration waits for a lock of the table, every statement of the application waits behind it. So it
# gives up soon, and tries again after a pause.
_LOCK_TIMEOUT_SECONDS = 0.5
_LOCK_PAUSE_SECONDS = 1.0
_MAX_LOCK_SECONDS = 60.0

# Messages of a server that will accept connections soon (SQLSTATE 57P03 and 53300). psycopg2 gives no
# SQLSTATE for a connection that was not established.
_TRANSIENT = (
    "starting up",
    "shutting down",
    "recovery mode",
    "not yet accepting",
    "too many",
    "remaining connection",
)


class MigrationError(OperatorError):
    """The schema cannot be migrated. The message is for the operator."""


class _Locked(MigrationError):
    """Another session holds a lock of the table. The message names it."""


class DatabaseNotReachable(MigrationError):
    """The database cannot be reached. The message is libpq's, on one line."""


_FIND_BLOCKERS = """
SELECT string_agg(
           format('session %s (%s of %s, %s)', pid, application_name, usename, state),
           ', ' ORDER BY pid
       )
  FROM pg_stat_activity
 WHERE pid IN (
        SELECT pid FROM pg_locks
         WHERE granted AND pid <> pg_backend_pid() AND relation = to_regclass('export_jobs')
       )
"""


@dataclass(frozen=True)
class MigrationState:
    """One migration: its name and whether it has been applied."""

    name: str
    is_applied: bool


class _Backend(PostgresqlBackend):  # type: ignore[misc]  # yoyo has no types
    log_table = "exportd_migration_log"
    lock_table = "exportd_migration_lock"
    version_table = "exportd_migration_version"

    def connect(self, dburi: DatabaseURI) -> Any:
        connection = super().connect(dburi)
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = '{int(_LOCK_TIMEOUT_SECONDS * 1000)}ms'")
        connection.commit()
        return connection


def wait_for_database(dsn: str, timeout_seconds: float, on_wait: Callable[[str], None]) -> None:
    """Returns when the server accepts a connection. Calls ``on_wait`` with the reason of the first failure.

    Does not wait after an error that waiting cannot cure (wrong password, no such database).
    Raises DatabaseNotReachable, and MigrationError if the server is too old.
    """
    deadline = time.monotonic() + timeout_seconds
    waiting = False
    while True:
        remaining = deadline - time.monotonic()
        try:
            connection = psycopg2.connect(dsn, connect_timeout=max(2, int(remaining)))
        except psycopg2.Error as error:
            reason = " ".join(str(error).split())
            refused = "FATAL:" in reason and not any(words in reason for words in _TRANSIENT)
            if refused or isinstance(error, psycopg2.ProgrammingError) or remaining <= 0:
                raise DatabaseNotReachable(reason) from error
            if not waiting:
                on_wait(reason)
                waiting = True
            time.sleep(0.25)
            continue
        with contextlib.closing(connection):
            if connection.server_version < MINIMUM_SERVER_VERSION:
                raise MigrationError(
                    f"PostgreSQL 14 or newer is needed; the server is {connection.server_version // 10000}"
                )
        return


def migration_status(dsn: str) -> list[MigrationState]:
    """Returns every migration, in order. It only reads, so it needs no right to change the schema.

    Raises DatabaseNotReachable and MigrationError.
    """
    applied: set[str] = set()
    try:
        with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass(%s)", (_TABLE,))
            if cursor.fetchone() != (None,):
                cursor.execute(f"SELECT migration_hash FROM {_TABLE}")  # noqa: S608  # our own name
                applied = {row[0] for row in cursor.fetchall()}
    except psycopg2.OperationalError as error:
        raise DatabaseNotReachable(" ".join(str(error).split())) from error
    except psycopg2.Error as error:
        raise _translate(error) from error
    return [MigrationState(item.id, item.hash in applied) for item in yoyo.read_migrations(str(_FOLDER))]


def check_table(dsn: str, *, is_migrating: bool) -> None:
    """Raises MigrationError if exportd cannot use the table ``export_jobs``, with a line for each problem.

    Also raises DatabaseNotReachable.
    """
    try:
        problems = find_problems(dsn, is_migrating=is_migrating)
    except psycopg2.OperationalError as error:
        raise DatabaseNotReachable(" ".join(str(error).split())) from error
    except psycopg2.Error as error:
        raise _translate(error) from error
    if problems:
        raise MigrationError("\n  ".join(["exportd cannot use the table export_jobs as it is:", *problems]))


def migrate_up(dsn: str) -> list[str]:
    """Applies the pending migrations and returns their names. Refuses a table ``export_jobs`` that exportd
    cannot use.

    Raises DatabaseNotReachable and MigrationError.
    """
    before = {item.name for item in migration_status(dsn) if item.is_applied}
    check_table(dsn, is_migrating=len(before) < len(migration_status(dsn)))
    deadline = time.monotonic() + _MAX_LOCK_SECONDS
    applied: list[str] = []
    while True:
        try:
            with _locked_backend(dsn) as backend:
                for item in backend.to_apply(yoyo.read_migrations(str(_FOLDER))):
                    backend.apply_one(item)
                    applied.append(item.id)
            return applied
        except _Locked as error:
            # Each migration is a transaction of its own, and has released its locks.
            if time.monotonic() > deadline:
                raise
            log.warning("migration_waiting", error=str(error))
            time.sleep(_LOCK_PAUSE_SECONDS)


def migrate_down(dsn: str) -> str | None:
    """Takes back the newest applied migration. Returns its name, or None if there is none.

    Raises DatabaseNotReachable and MigrationError.
    """
    with _locked_backend(dsn) as backend:
        applied = backend.to_rollback(yoyo.read_migrations(str(_FOLDER)))
        if not applied:
            return None
        backend.rollback_migrations(applied[:1])
        return str(applied[0].id)


@contextlib.contextmanager
def _locked_backend(dsn: str) -> Iterator[_Backend]:
    uri = DatabaseURI("postgresql", None, None, None, None, None, {"dsn": dsn})
    try:
        backend = _Backend(uri, _TABLE)
    except psycopg2.Error as error:
        raise DatabaseNotReachable(" ".join(str(error).split())) from error
    try:
        # The session's end frees the lock, however it ends. Each migration runs in a session of its own.
        backend.execute(f"SET lock_timeout = 0; SELECT pg_advisory_lock({_ADVISORY_LOCK})")
        backend.init_database()
        yield backend
    except psycopg2.errors.LockNotAvailable as error:
        raise _Locked(f"the table export_jobs is locked by {_find_blockers(dsn)}") from error
    except psycopg2.Error as error:
        raise _translate(error) from error
    finally:
        backend.connection.close()


def _find_blockers(dsn: str) -> str:
    with contextlib.closing(psycopg2.connect(dsn)) as connection, connection.cursor() as cursor:
        cursor.execute(_FIND_BLOCKERS)
        (blockers,) = cursor.fetchone() or (None,)
    return blockers or "a session that has ended"


def _translate(error: psycopg2.Error) -> MigrationError:
    primary = error.diag.message_primary or str(error)
    return MigrationError(" ".join(primary.split()))

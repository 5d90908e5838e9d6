"""Schema migrations: raw SQL in ``migrations/``, run up and down by yoyo.

A PostgreSQL advisory lock replaces yoyo's own lock, which is a row that a killed process leaves in the table.
yoyo's book-keeping tables get names of exportd's own, because the application may use yoyo in the same
database.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg2
import psycopg2.errors
import structlog
import yoyo
from yoyo.backends.core.postgresql import PostgresqlBackend
from yoyo.connections import DatabaseURI

from exportd.db.adoption import find_missing, find_problems
from exportd.db.blocking import DatabaseNotReachable, blocking_cursor, connect_blocking
from exportd.db.connections import WITHOUT_LIMITS
from exportd.db.indexes import build_indexes
from exportd.errors import OperatorError

log = structlog.get_logger()

_TABLE = "exportd_migrations"
_FOLDER = Path(__file__).parent / "migrations"
_ADVISORY_LOCK = 0x6578706F72746400  # "exportd" in ASCII

# While a migration waits for a lock of the table, every statement of the application waits behind it. So it
# gives up soon, and tries again after a pause.
_LOCK_TIMEOUT_SECONDS = 0.5
_LOCK_PAUSE_SECONDS = 1.0
_MAX_LOCK_SECONDS = 60.0
# The pause between two tries to take exportd's own lock.
_LOCK_TRY_SECONDS = 0.1


class MigrationError(OperatorError):
    """The schema cannot be migrated. The message is for the operator."""


class _Locked(MigrationError):
    """Another session holds a lock of the table. The message names it."""


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
        connection = connect_blocking(dburi.args["dsn"], is_writing=True)
        connection.autocommit = True
        return connection

    def begin(self) -> None:
        super().begin()
        self.execute(f"{WITHOUT_LIMITS}SET LOCAL lock_timeout = '{int(_LOCK_TIMEOUT_SECONDS * 1000)}ms'")


def migration_status(dsn: str) -> list[MigrationState]:
    """Returns every migration, in order. It only reads, so it needs no right to change the schema.

    Raises DatabaseNotReachable and MigrationError.
    """
    applied: set[str] = set()
    with _translated(), blocking_cursor(dsn, is_writing=False) as cursor:
        cursor.execute("SELECT to_regclass(%s)", (_TABLE,))
        if cursor.fetchone() != (None,):
            cursor.execute(f"SELECT migration_hash FROM {_TABLE}")  # noqa: S608  # our own name
            applied = {row[0] for row in cursor.fetchall()}
    return [MigrationState(item.id, item.hash in applied) for item in yoyo.read_migrations(str(_FOLDER))]


def check_not_replaced(dsn: str) -> None:
    """Raises MigrationError if the table ``export_jobs`` was replaced since it was migrated. Also raises
    DatabaseNotReachable."""
    if missing := _find_missing(dsn):
        raise MigrationError(
            f"export_jobs was dropped or replaced since it was migrated, and lacks {', '.join(missing)}: "
            "run `exportd migrate up`"
        )


def _find_missing(dsn: str) -> list[str]:
    with _translated():
        return find_missing(dsn)


def check_table(dsn: str, *, is_migrating: bool) -> None:
    """Raises MigrationError if exportd cannot use the table ``export_jobs``, with a line for each problem.

    Also raises DatabaseNotReachable.
    """
    with _translated():
        problems = find_problems(dsn, is_migrating=is_migrating)
    if problems:
        raise MigrationError("\n  ".join(["exportd cannot use the table export_jobs as it is:", *problems]))


def migrate_up(dsn: str) -> list[str]:
    """Applies the pending migrations and returns their names. Refuses a table ``export_jobs`` that exportd
    cannot use.

    Raises DatabaseNotReachable and MigrationError.
    """
    states = migration_status(dsn)
    is_complete = all(state.is_applied for state in states)
    is_replaced = is_complete and bool(_find_missing(dsn))
    check_table(dsn, is_migrating=is_replaced or not is_complete)
    deadline = time.monotonic() + _MAX_LOCK_SECONDS
    applied: list[str] = []
    while True:
        try:
            with _locked_backend(dsn) as backend:
                if is_replaced:
                    # Every migration can run again.
                    with backend.transaction():
                        backend.execute(f"DELETE FROM {_TABLE}")  # noqa: S608  # our own name
                    is_replaced = False
                for item in backend.to_apply(yoyo.read_migrations(str(_FOLDER))):
                    backend.apply_one(item)
                    applied.append(item.id)
                build_indexes(dsn)
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
    with contextlib.ExitStack() as stack:
        try:
            # A transaction holds the lock, because a pooler may run each transaction in another session.
            # Its end frees the lock, however it ends.
            holder = stack.enter_context(contextlib.closing(connect_blocking(dsn, is_writing=True)))
            backend = _Backend(uri, _TABLE)
            stack.callback(backend.connection.close)
        except psycopg2.Error as error:
            raise DatabaseNotReachable(_one_line(error)) from error
        try:
            _take_lock(holder)
            backend.init_database()
            yield backend
        except psycopg2.errors.LockNotAvailable as error:
            raise _Locked(f"the table export_jobs is locked by {_find_blockers(dsn)}") from error
        except psycopg2.Error as error:
            raise _translate(error) from error


def _take_lock(holder: Any) -> None:
    """Begins a transaction with the lock. Asks again and again: the snapshot of a statement that waits would
    hold up the process that has the lock while it builds an index."""
    with holder.cursor() as cursor:
        while True:
            cursor.execute(f"{WITHOUT_LIMITS}SELECT pg_try_advisory_xact_lock({_ADVISORY_LOCK})")
            if cursor.fetchone() == (True,):
                return
            holder.rollback()
            time.sleep(_LOCK_TRY_SECONDS)


def _find_blockers(dsn: str) -> str:
    with blocking_cursor(dsn, is_writing=False) as cursor:
        cursor.execute(_FIND_BLOCKERS)
        (blockers,) = cursor.fetchone() or (None,)
    return blockers or "a session that has ended"


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except psycopg2.OperationalError as error:
        raise DatabaseNotReachable(_one_line(error)) from error
    except psycopg2.Error as error:
        raise _translate(error) from error


def _translate(error: psycopg2.Error) -> MigrationError:
    return MigrationError(_one_line(error.diag.message_primary or error))


def _one_line(error: object) -> str:
    return " ".join(str(error).split())

"""A real PostgreSQL for the whole run, and a database for each worker, emptied after each test."""

import contextlib
import fcntl
import os
import shlex
import shutil
import signal
import subprocess
import tempfile
import time
import uuid
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from exportd.db import migrate
from exportd.db.embedded import embedded_server
from exportd.db.pool import Database, open_database

# A server outside exportd keeps the template for the next run, so its name tells the migrations.
_MIGRATIONS = sorted(Path(migrate.__file__).with_name("migrations").glob("*.sql"))
_TEMPLATE = f"exportd_template_{zlib.crc32(b''.join(path.read_bytes() for path in _MIGRATIONS)):08x}"

_TERMINATE_OTHERS = """
SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
_LIST_TABLES = """
SELECT quote_ident(relname) FROM pg_class
 WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND relname NOT LIKE 'exportd\\_migration%'
"""
# DELETE does not undo changes of columns, constraints, triggers, functions and the database's settings.
_DESCRIBE_SCHEMA = """
SELECT 'column', attrelid::regclass::text,
       attname || ' ' || atttypid::regtype || ' ' || attnotnull || atthasdef
  FROM pg_attribute
 WHERE attrelid IN (SELECT oid FROM pg_class WHERE relnamespace = 'public'::regnamespace)
   AND NOT attisdropped
UNION ALL SELECT 'constraint', conrelid::regclass::text, conname FROM pg_constraint
 WHERE connamespace = 'public'::regnamespace
UNION ALL SELECT 'trigger', tgrelid::regclass::text, tgname || tgenabled::text FROM pg_trigger
UNION ALL SELECT 'function', oid::regprocedure::text, md5(prosrc) FROM pg_proc
 WHERE pronamespace = 'public'::regnamespace
UNION ALL SELECT 'setting', setrole::text, setconfig::text FROM pg_db_role_setting
 WHERE setdatabase = (SELECT oid FROM pg_database WHERE datname = current_database())
UNION ALL SELECT 'database', datname, datallowconn::text FROM pg_database WHERE datname = current_database()
 ORDER BY 1, 2, 3
"""


@pytest.fixture(scope="session")
def server_dsn(testrun_uid: str) -> Iterator[str]:
    """One server, shared by the workers of a parallel run: that of ``EXPORTD_TEST_DSN``, whose user must be
    a superuser, or the embedded one.

    Not in pytest's temporary folder: as root, the server runs as another user, and a second pytest that
    starts takes the right to enter that folder away from it.
    """
    folder = Path(tempfile.gettempdir()) / f"exportd-tests-{testrun_uid[:8]}"
    folder.mkdir(mode=0o711, exist_ok=True)
    given = os.environ.get("EXPORTD_TEST_DSN")
    with nullcontext(given) if given else embedded_server(folder) as dsn:
        with (folder / "template.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _make_template(dsn)
        yield dsn
    if given or not (folder / "postgres" / "postmaster.pid").exists():
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def empty_dsn(server_dsn: str) -> Iterator[str]:
    """An empty database."""
    with _database(server_dsn, "template0") as dsn:
        yield dsn


@pytest.fixture
def dsn(request: pytest.FixtureRequest) -> str:
    """A migrated database without rows. A test that changes its schema or settings is marked
    ``fresh_database`` and gets one of its own."""
    is_fresh = request.node.get_closest_marker("fresh_database")
    name: str = request.getfixturevalue("_fresh_dsn" if is_fresh else "_emptied_dsn")
    return name


@pytest.fixture
def _fresh_dsn(server_dsn: str) -> Iterator[str]:
    with migrated_database(server_dsn) as dsn:
        yield dsn


class ReusedDatabase:
    """A migrated database that several tests use one after the other."""

    def __init__(self, server_dsn: str) -> None:
        self._server_dsn = server_dsn
        self._create()

    def _create(self) -> None:
        self.dsn = database_dsn(self._server_dsn, _create_database(self._server_dsn, _TEMPLATE))
        with _admin(self.dsn) as cursor:
            self._schema = _fetch(cursor, _DESCRIBE_SCHEMA)
            self._empty = ";".join(f"DELETE FROM {table}" for (table,) in _fetch(cursor, _LIST_TABLES))

    def empty(self, *, terminate: bool) -> None:
        """Deletes every row; ``terminate``: and ends every connection. Fails where the test changed more."""
        try:
            with _admin(self.dsn) as cursor:
                if terminate:
                    cursor.execute(_TERMINATE_OTHERS)
                changed = set(self._schema) ^ set(_fetch(cursor, _DESCRIBE_SCHEMA))
                if not changed:
                    cursor.execute(self._empty)
        except psycopg2.OperationalError as error:
            changed = {("database", str(error), "")}
        if changed:
            self._create()
            pytest.fail(f"the test changed the shared database; mark it fresh_database: {sorted(changed)}")


@pytest.fixture(scope="session")
def _worker_database(server_dsn: str) -> ReusedDatabase:
    return ReusedDatabase(server_dsn)


@pytest.fixture
def _emptied_dsn(_worker_database: ReusedDatabase) -> Iterator[str]:
    yield _worker_database.dsn
    _worker_database.empty(terminate=True)


def migrated_database(server_dsn: str) -> AbstractContextManager[str]:
    """A migrated database of its own, while the block lasts."""
    return _database(server_dsn, _TEMPLATE)


def _make_template(dsn: str) -> None:
    with _admin(dsn) as cursor:
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_TEMPLATE,))
        if cursor.fetchone():
            return
        if "EXPORTD_TEST_DSN" not in os.environ:
            # The tests' data may be lost in a crash of the machine.
            cursor.execute("ALTER SYSTEM SET fsync = off")
            cursor.execute("SELECT pg_reload_conf()")
        cursor.execute(f"CREATE DATABASE {_TEMPLATE}_draft TEMPLATE template0")
    migrate.migrate_up(database_dsn(dsn, f"{_TEMPLATE}_draft"))
    with _admin(dsn) as cursor:
        cursor.execute(f"ALTER DATABASE {_TEMPLATE}_draft RENAME TO {_TEMPLATE}")


def _create_database(server_dsn: str, template: str) -> str:
    name = f"test_{uuid.uuid4().hex}"
    with _admin(server_dsn) as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    return name


@contextmanager
def _database(server_dsn: str, template: str) -> Iterator[str]:
    name = _create_database(server_dsn, template)
    yield database_dsn(server_dsn, name)
    with _admin(server_dsn) as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _fetch(cursor: psycopg2.extensions.cursor, statement: str) -> list[tuple[Any, ...]]:
    cursor.execute(statement)
    return cursor.fetchall()


def database_dsn(server_dsn: str, name: str) -> str:
    return psycopg2.extensions.make_dsn(server_dsn, dbname=name)


class _admin:  # noqa: N801  # a context manager over one autocommit cursor
    def __init__(self, dsn: str) -> None:
        self._connection = psycopg2.connect(dsn)
        self._connection.autocommit = True

    def __enter__(self) -> psycopg2.extensions.cursor:
        return self._connection.cursor()

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def query(dsn: str, statement: str, parameters: Any = ()) -> list[tuple[Any, ...]]:
    """Runs one statement outside exportd and returns its rows."""
    with _admin(dsn) as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "packages"
    root.mkdir()
    return root


def signal_server(postmaster_pid: int, number: signal.Signals) -> list[psutil.Process]:
    """Sends a signal to every process of a server, and returns the processes."""
    postmaster = psutil.Process(postmaster_pid)
    processes = [postmaster, *postmaster.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)
    return processes


class OwnServer:
    """A PostgreSQL of a test's own, which can be stopped and started again."""

    def __init__(self, folder: Path, server_dsn: str) -> None:
        self._folder = folder / "postgres"
        self.server_dsn = server_dsn
        self._process: subprocess.Popen[bytes] | None = None

    def stop(self) -> None:
        """As ``pg_ctl stop -m fast``: running statements are broken off."""
        pid = int((self._folder / "postmaster.pid").read_text().split()[0])
        os.kill(pid, signal.SIGINT)
        if self._process is not None:
            self._process.wait(60)
        deadline = time.monotonic() + 60
        while (self._folder / "postmaster.pid").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def kill(self) -> None:
        """As a crash of the machine: every process is killed."""
        pid = int((self._folder / "postmaster.pid").read_text().split()[0])
        processes = signal_server(pid, signal.SIGKILL)
        if self._process is not None:
            self._process.wait(60)
        psutil.wait_procs(processes, timeout=60)

    def start(self) -> None:
        """Returns when it answers."""
        command = shlex.split((self._folder / "postmaster.opts").read_text())
        owner = (self._folder / "PG_VERSION").stat().st_uid
        with (self._folder / "log").open("ab") as output:
            self._process = subprocess.Popen(
                command, user=owner if os.geteuid() == 0 else None, stdout=output, stderr=output
            )
        deadline = time.monotonic() + 60
        while True:
            try:
                psycopg2.connect(self.server_dsn).close()
            except psycopg2.OperationalError:
                assert time.monotonic() < deadline
                time.sleep(0.05)
            else:
                return


@pytest.fixture
def own_server() -> Iterator[OwnServer]:
    with tempfile.TemporaryDirectory(prefix="exportd-tests-") as name, embedded_server(Path(name)) as dsn:
        folder = Path(name)
        server = OwnServer(folder, dsn)
        yield server
        if not (folder / "postgres" / "postmaster.pid").exists():
            server.start()
        server.stop()


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    """A pool on a migrated database."""
    database = await open_database(
        dsn,
        pool_min_size=1,
        pool_max_size=8,
        connect_timeout_seconds=5.0,
        statement_timeout_seconds=5.0,
    )
    yield database
    await database.close()

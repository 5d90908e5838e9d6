"""A real PostgreSQL for the whole run, and a database of its own for each test, cloned from a template."""

import fcntl
import os
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import psycopg2
import pytest

from exportd.db.embedded import embedded_server
from exportd.db.migrate import migrate_up
from exportd.db.pool import Database, open_database

_TEMPLATE = "exportd_template"


@pytest.fixture(scope="session")
def server_dsn(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Iterator[str]:
    """One server, shared by the workers of a parallel run."""
    base = tmp_path_factory.getbasetemp()
    folder = base if worker_id == "master" else base.parent
    with embedded_server(folder / "pg") as dsn:
        with (folder / "template.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _make_template(dsn)
        yield dsn


@pytest.fixture
def empty_dsn(server_dsn: str) -> Iterator[str]:
    """An empty database."""
    with _database(server_dsn, "template0") as dsn:
        yield dsn


@pytest.fixture
def dsn(server_dsn: str) -> Iterator[str]:
    """A migrated database."""
    with migrated_database(server_dsn) as dsn:
        yield dsn


def migrated_database(server_dsn: str) -> AbstractContextManager[str]:
    """A migrated database of its own, while the block lasts."""
    return _database(server_dsn, _TEMPLATE)


def _make_template(dsn: str) -> None:
    with _admin(dsn) as cursor:
        cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (_TEMPLATE,))
        if cursor.fetchone():
            return
        # The tests' data may be lost in a crash of the machine.
        cursor.execute("ALTER SYSTEM SET fsync = off")
        cursor.execute("ALTER SYSTEM SET max_connections = 300")
        cursor.execute("SELECT pg_reload_conf()")
        cursor.execute(f"CREATE DATABASE {_TEMPLATE}_draft TEMPLATE template0")
    migrate_up(database_dsn(dsn, f"{_TEMPLATE}_draft"))
    with _admin(dsn) as cursor:
        cursor.execute(f"ALTER DATABASE {_TEMPLATE}_draft RENAME TO {_TEMPLATE}")


@contextmanager
def _database(server_dsn: str, template: str) -> Iterator[str]:
    name = f"test_{uuid.uuid4().hex}"
    with _admin(server_dsn) as cursor:
        cursor.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
    yield database_dsn(server_dsn, name)
    with _admin(server_dsn) as cursor:
        cursor.execute(f"DROP DATABASE {name} WITH (FORCE)")


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


def query(dsn: str, statement: str, parameters: object = ()) -> list[tuple]:
    """Runs one statement outside exportd and returns its rows."""
    with _admin(dsn) as cursor:
        cursor.execute(statement, parameters)
        return cursor.fetchall() if cursor.description else []


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    root = tmp_path / "packages"
    root.mkdir()
    return root


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
def own_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnServer]:
    folder = tmp_path_factory.mktemp("s")
    with embedded_server(folder) as dsn:
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

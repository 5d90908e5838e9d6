"""Clients that leave, files that shrink, kernels that refuse: the connection ends short and uncounted."""

import asyncio
import errno
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import structlog
from aiohttp.test_utils import TestClient

from exportd.delivery import cold, sendfile, watch
from exportd.storage.files import OpenPackage
from exportd.web.services import SERVICES
from tests.support.application import ANN, Jobs, Package, Start, noise, until_idle
from tests.support.postgres import query

Client = TestClient[Any, Any]

# More than the sockets' buffers hold, so that a client that does not read stops the delivery.
SIZE = 24_000_000
WAIT_SECONDS = 30


def request_bytes(package: Package, **fields: str) -> bytes:
    lines = [
        f"GET {package.url} HTTP/1.1",
        *(f"{name}: {value}" for name, value in {"Host": "x", **ANN, **fields}.items()),
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


async def connect(client: Client) -> socket.socket:
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, (client.host, client.port))
    return connection


async def until(what: str, condition: Callable[[], object]) -> None:
    try:
        async with asyncio.timeout(WAIT_SECONDS):
            while not condition():
                await asyncio.sleep(0.005)
    except TimeoutError:
        pytest.fail(f"waited {WAIT_SECONDS} s for {what}")


async def read_to_end(connection: socket.socket) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    try:
        while data := await loop.sock_recv(connection, 1 << 20):
            received += data
    except ConnectionResetError:
        pass
    return bytes(received)


def body_of(response: bytes) -> bytes:
    return response.partition(b"\r\n\r\n")[2]


def descriptors_on(file: Path) -> int:
    return sum(path.is_symlink() and path.readlink() == file for path in Path("/proc/self/fd").iterdir())


def outcomes(jobs: Jobs) -> list[tuple[str, bool]]:
    """Outcome of each delivery, and whether all of the package was sent in it."""
    return query(
        jobs.dsn, "SELECT outcome, bytes_sent = package_size_bytes FROM download_events ORDER BY started_at"
    )


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.usefixtures("sender")
async def test_a_client_that_leaves_ends_the_delivery_at_once(
    client: Client, jobs: Jobs, reset: bool
) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    with structlog.testing.capture_logs() as logs:
        await loop.sock_sendall(connection, request_bytes(package))
        await loop.sock_recv(connection, 10_000)
        assert descriptors_on(package.file) == 1
        if reset:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.close()
        await until_idle(client)
    assert outcomes(jobs) == [("aborted", False)]
    assert jobs.counts(package)[0] == 0
    assert descriptors_on(package.file) == 0
    (ended,) = [entry for entry in logs if entry["event"] == "download_aborted"]
    assert ended["log_level"] == "info"
    assert 0 < ended["bytes_sent"] < SIZE


async def test_waiting_in_vain_names_what_was_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "WAIT_SECONDS", 0.01)
    with pytest.raises(pytest.fail.Exception, match="for the first bytes"):
        await until("the first bytes", lambda: False)


@pytest.mark.usefixtures("sender")
async def test_a_client_that_does_not_read_holds_back_the_delivery(client: Client, jobs: Jobs) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request_bytes(package))
    await until("the first bytes", lambda: descriptors_on(package.file) == 1)
    # Other clients are served meanwhile.
    other = jobs.add(noise(100_000))
    for _ in range(3):
        async with client.get(other.url, headers=ANN) as response:
            assert await response.read() == other.content
    assert descriptors_on(package.file) == 1
    assert body_of(await asyncio.wait_for(_exactly(connection, package), 30)) == package.content
    connection.close()
    await until_idle(client)
    assert jobs.counts(package) == (1, SIZE)


async def _exactly(connection: socket.socket, package: Package) -> bytes:
    loop = asyncio.get_running_loop()
    received = bytearray()
    while len(body_of(bytes(received))) < len(package.content):
        received += await loop.sock_recv(connection, 1 << 20)
    return bytes(received)


def truncate(file: Path) -> None:
    os.truncate(file, SIZE - 1000)


def append(file: Path) -> None:
    with file.open("ab") as opened:
        opened.write(b"more")


def overwrite_the_end(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.seek(SIZE - 1000)
        opened.write(bytes(1000))


@pytest.mark.parametrize("spoil", [truncate, append, overwrite_the_end])
@pytest.mark.usefixtures("sender")
async def test_a_file_that_is_written_to_ends_the_connection_short(
    client: Client, jobs: Jobs, spoil: Callable[[Path], None]
) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    with structlog.testing.capture_logs() as logs:
        # A second request, already in the pipe, must not be answered inside the first body.
        await loop.sock_sendall(connection, request_bytes(package) + request_bytes(package))
        await until("the first bytes", lambda: descriptors_on(package.file) == 1)
        spoil(package.file)
        received = await asyncio.wait_for(read_to_end(connection), 30)
        await until_idle(client)
        await until("the verification", lambda: [line for line in logs if line["event"] == "package_damaged"])
    connection.close()
    assert len(body_of(received)) < SIZE
    assert package.content.startswith(body_of(received))
    assert outcomes(jobs) == [("changed", False)], logs
    assert jobs.counts(package)[0] == 0
    (ended,) = [entry for entry in logs if entry["event"] == "download_failed"]
    assert ended["log_level"] == "error"
    assert [entry["log_level"] for entry in logs if entry["event"] == "package_suspect"] == ["error"]

    # Whatever the file holds now, nobody gets it until somebody has looked at it.
    package.file.write_bytes(package.content)
    async with client.get(package.url, headers=ANN) as response:
        assert (response.status, (await response.json())["code"]) == (500, "STORAGE_ERROR")
    query(jobs.dsn, "UPDATE export_jobs SET package_suspect_since = NULL")
    async with client.get(package.url, headers=ANN) as response:
        assert await response.read() == package.content


@pytest.mark.usefixtures("sender")
async def test_a_package_of_which_only_the_time_changed_is_served_again(client: Client, jobs: Jobs) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    await asyncio.get_running_loop().sock_sendall(connection, request_bytes(package))
    await until("the first bytes", lambda: descriptors_on(package.file) == 1)
    with structlog.testing.capture_logs() as logs:
        os.utime(package.file)
        assert len(body_of(await asyncio.wait_for(read_to_end(connection), 30))) < SIZE
        await until("the verification", lambda: [line for line in logs if line["event"] == "package_cleared"])
    connection.close()
    async with client.get(package.url, headers=ANN) as response:
        assert await response.read() == package.content


@pytest.mark.usefixtures("sender")
async def test_a_file_that_is_unlinked_renamed_or_locked_up_is_still_the_package(
    client: Client, jobs: Jobs
) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request_bytes(package))
    await until("the first bytes", lambda: descriptors_on(package.file) == 1)
    package.file.chmod(0)
    package.file.rename(package.file.with_suffix(".old"))
    package.file.with_suffix(".old").unlink()
    assert body_of(await asyncio.wait_for(_exactly(connection, package), 30)) == package.content
    connection.close()
    await until_idle(client)
    assert jobs.counts(package) == (1, SIZE)


async def test_a_disk_that_fails_ends_the_connection_short(
    client: Client, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = jobs.add(noise(SIZE))
    name = {"sendfile": "sendfile", "chunks": "preadv"}[sender]
    real = getattr(os, name)
    calls = 0

    def failing(*arguments: object) -> int:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise OSError(errno.EIO, "Input/output error")
        result: int = real(*arguments)
        return result

    monkeypatch.setattr(os, name, failing)
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request_bytes(package))
    received = await asyncio.wait_for(read_to_end(connection), 30)
    await until_idle(client)
    connection.close()
    assert package.content.startswith(body_of(received))
    assert len(body_of(received)) < SIZE
    assert query(jobs.dsn, "SELECT outcome FROM download_events") == [("failed",)]


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP])
@pytest.mark.parametrize("after_slices", [0, 2])
async def test_a_kernel_that_refuses_sendfile_loses_and_doubles_no_byte(
    start: Start, jobs: Jobs, number: int, after_slices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": True})
    package = jobs.add(noise(3_000_000))
    real = os.sendfile
    sent = 0

    def refusing(*arguments: Any) -> int:
        nonlocal sent
        if sent == after_slices:
            raise OSError(number, os.strerror(number))
        sent += 1
        return real(*arguments)

    monkeypatch.setattr(sendfile.os, "sendfile", refusing)
    with structlog.testing.capture_logs() as logs:
        async with client.get(package.url, headers=ANN) as response:
            assert await response.read() == package.content
        await until_idle(client)
    assert jobs.counts(package) == (1, len(package.content))
    assert [entry["method"] for entry in logs if entry["event"] == "download_completed"] == ["chunks"]


@pytest.mark.usefixtures("sender")
async def test_no_descriptor_left_is_an_error_before_any_header(
    client: Client, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = jobs.add(noise(500_000))

    def refusing(_: int) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(watch.os, "dup", refusing)
        async with client.get(package.url, headers=ANN) as response:
            assert (response.status, (await response.json())["code"]) == (500, "INTERNAL_ERROR")
    async with client.get(package.url, headers=ANN) as response:
        assert await response.read() == package.content


async def test_a_defect_while_sending_closes_the_connection_and_sends_no_second_answer(
    client: Client, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = jobs.add(noise(500_000))

    def broken(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(OpenPackage, "check_unchanged", broken)
    connection = await connect(client)
    with structlog.testing.capture_logs() as logs:
        await asyncio.get_running_loop().sock_sendall(connection, request_bytes(package) * 2)
        received = await asyncio.wait_for(read_to_end(connection), 30)
        await until_idle(client)
    connection.close()
    assert received.count(b"HTTP/1.1") == 1
    assert [entry["event"] for entry in logs if entry["log_level"] == "error"] == ["request_failed"]


@pytest.mark.fresh_database
@pytest.mark.usefixtures("sender")
async def test_a_record_that_fails_sends_no_second_answer(client: Client, jobs: Jobs) -> None:
    package = jobs.add(noise(5000))
    query(jobs.dsn, "DROP TABLE download_events")
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            async with client.get(package.url, headers=ANN) as response:
                assert response.status == 200
                assert await response.read() == package.content
        async with client.get("/healthz") as response:
            assert await response.json() == {"status": "ok"}
    assert {entry["event"] for entry in logs if entry["log_level"] in ("warning", "error")} <= {
        "events_spooled",
        "spool_not_drained",
    }
    assert client.app is not None
    assert client.app[SERVICES].ledger.spooled == 3


@pytest.mark.parametrize("mode", ["not in memory", "not supported", "no such flag"])
async def test_chunks_are_read_in_a_thread_where_the_kernel_cannot_promise_not_to_wait(
    start: Start, jobs: Jobs, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": False})
    package = jobs.add(noise(500_000))

    def refusing(*_: object) -> int:
        if mode == "not in memory":
            raise BlockingIOError
        raise OSError(errno.EOPNOTSUPP, "not supported")

    if mode == "no such flag":
        monkeypatch.setattr(cold, "_NO_WAIT", 0)
    else:
        monkeypatch.setattr(os, "preadv", refusing)
    async with client.get(package.url, headers=ANN) as response:
        assert await response.read() == package.content


@pytest.mark.usefixtures("sender")
async def test_a_cancelled_download_is_recorded_before_it_ends(client: Client, jobs: Jobs) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    loop = asyncio.get_running_loop()
    await loop.sock_sendall(connection, request_bytes(package))
    await until("the first bytes", lambda: descriptors_on(package.file) == 1)
    assert client.app is not None
    assert client.app[SERVICES].lifecycle.cancel_all() == 1
    await until_idle(client)
    assert outcomes(jobs) == [("aborted", False)]
    assert len(body_of(await read_to_end(connection))) < SIZE
    connection.close()


@pytest.mark.usefixtures("sender")
async def test_many_at_once_do_not_disturb_each_other(client: Client, jobs: Jobs) -> None:
    packages = [jobs.add(noise(1_000_000 + number)) for number in range(5)]

    async def download(package: Package) -> None:
        async with client.get(package.url, headers=ANN) as response:
            assert await response.read() == package.content

    await asyncio.gather(*(download(package) for package in packages * 8))
    await until_idle(client)
    assert [jobs.counts(package)[0] for package in packages] == [8] * 5

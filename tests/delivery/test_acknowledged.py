"""Delivered means acknowledged: bytes that wait in a socket's buffer are not the client's."""

import asyncio
import socket
import struct
from typing import Any

import pytest
import structlog

from exportd.telemetry.logging import DOWNLOAD_EVENTS
from tests.support.application import ANN, Jobs, Start, noise, until_idle
from tests.support.postgres import query

pytestmark = pytest.mark.parametrize("sender", ["sendfile", "chunks"])

SIZE = 900_000
RESET = struct.pack("ii", 1, 0)


def ended(logs: list[Any]) -> dict[str, Any]:
    (line,) = [entry for entry in logs if entry["event"] in DOWNLOAD_EVENTS]
    return dict(line)


async def open_download(client: Any, url: str, receive_buffer: int) -> socket.socket:
    """Sends a request by a socket that takes little by itself, and reads nothing."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(connection, ("127.0.0.1", client.server.port))
    head = "".join(f"{name}: {value}\r\n" for name, value in {"Host": "x", **ANN}.items())
    await loop.sock_sendall(connection, f"GET {url} HTTP/1.1\r\n{head}\r\n".encode())
    return connection


async def sent_whole(client: Any, monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set once every byte is in the socket and only the client's word is missing."""
    from exportd.delivery.watch import Watch

    event = asyncio.Event()
    real = Watch.wait_until_acknowledged

    async def noting(watch: Watch) -> None:
        event.set()
        await real(watch)

    monkeypatch.setattr(Watch, "wait_until_acknowledged", noting)
    return event


async def test_a_client_that_vanishes_with_the_end_in_the_buffer_has_not_got_it(
    start: Start, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": sender == "sendfile"})
    package = jobs.add(noise(SIZE))
    all_sent = await sent_whole(client, monkeypatch)
    with structlog.testing.capture_logs() as logs:
        connection = await open_download(client, package.url, 65536)
        async with asyncio.timeout(30):
            await all_sent.wait()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        connection.close()
        await until_idle(client)
    line = ended(logs)
    assert (line["event"], line["reason"]) == ("download_aborted", "client disconnected")
    assert line["bytes_sent"] == SIZE
    assert 0 < line["bytes_acknowledged"] < SIZE
    assert jobs.counts(package) == (0, SIZE)
    assert query(jobs.dsn, "SELECT upper(received) FROM download_events") == [(line["bytes_acknowledged"],)]


async def test_a_client_that_takes_the_end_slowly_is_counted_when_it_has_it(
    start: Start, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": sender == "sendfile"})
    package = jobs.add(noise(SIZE))
    all_sent = await sent_whole(client, monkeypatch)
    connection = await open_download(client, package.url, 65536)
    async with asyncio.timeout(30):
        await all_sent.wait()
    assert jobs.counts(package) == (0, 0)
    # A client may close its own side early and still take the answer.
    connection.shutdown(socket.SHUT_WR)
    received = b""
    async with asyncio.timeout(30):
        while data := await asyncio.get_running_loop().sock_recv(connection, 65536):
            received += data
    connection.close()
    assert received.partition(b"\r\n\r\n")[2] == package.content
    await until_idle(client)
    assert jobs.counts(package) == (1, SIZE)


async def test_a_client_that_takes_no_more_of_what_was_sent_is_stalled(
    start: Start, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": sender == "sendfile", "stall_timeout_seconds": 0.2})
    package = jobs.add(noise(SIZE))
    all_sent = await sent_whole(client, monkeypatch)
    with structlog.testing.capture_logs() as logs:
        connection = await open_download(client, package.url, 65536)
        async with asyncio.timeout(30):
            await all_sent.wait()
        await until_idle(client)
    assert (ended(logs)["event"], ended(logs)["reason"]) == ("download_aborted", "stalled")
    assert jobs.counts(package)[0] == 0
    connection.close()


async def test_a_package_overwritten_while_its_end_waits_is_not_delivered(
    start: Start, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": sender == "sendfile"})
    package = jobs.add(noise(SIZE))
    all_sent = await sent_whole(client, monkeypatch)
    connection = await open_download(client, package.url, 65536)
    async with asyncio.timeout(30):
        await all_sent.wait()
    package.file.write_bytes(noise(SIZE))
    async with asyncio.timeout(30):
        try:
            while await asyncio.get_running_loop().sock_recv(connection, 65536):
                pass
        except ConnectionResetError:
            pass
    connection.close()
    await until_idle(client)
    assert jobs.counts(package)[0] == 0
    assert query(jobs.dsn, "SELECT outcome FROM download_events") == [("changed",)]

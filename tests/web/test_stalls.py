"""Clients that do not take their answers, on any route: their connections end, and hold little until then."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from aiohttp import web

from tests.delivery.test_broken_deliveries import until
from tests.support.application import ANN, BASE, Jobs, make_test_app, skip_missed_cleanup
from tests.support.server import Served, serving

STALL_SECONDS = 0.3
LARGE_ASSET = "/api-docs/swagger-ui-bundle.js"


Connect = Callable[[Served], Awaitable[socket.socket]]


@pytest.fixture
def connect() -> Iterator[Connect]:
    """Connects a client with a small receive buffer, which reads nothing by itself."""
    with contextlib.ExitStack() as clients:

        async def connect(served: Served) -> socket.socket:
            client = clients.enter_context(socket.socket())
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16384)
            client.setblocking(False)
            await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", served.port))
            return client

        yield connect


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: x\r\nAuthorization: {ANN['Authorization']}\r\n\r\n".encode()


@pytest.fixture
def app(dsn: str, storage: Path) -> web.Application:
    skip_missed_cleanup(dsn)
    return make_test_app(
        dsn, storage, limits={"connections_per_address": 0}, download={"stall_timeout_seconds": STALL_SECONDS}
    )


@pytest.fixture
async def served(app: web.Application) -> AsyncIterator[Served]:
    async with serving(app) as served:
        yield served


@pytest.mark.parametrize("path", [LARGE_ASSET, f"{BASE}?limit=100"])
async def test_clients_that_read_nothing_are_cut_off(
    served: Served, connect: Connect, jobs: Jobs, path: str
) -> None:
    for _ in range(100):
        jobs.add(tool_data=f'{{"name": "{"x" * 60_000}"}}')
    loop = asyncio.get_running_loop()
    clients = [await connect(served) for _ in range(2)]
    for client in clients:
        await loop.sock_sendall(client, get(path) * 10)
    await until("requests that are under way", lambda: served.connections == 2)
    await until("the end of every connection", lambda: served.connections == 0)


async def test_a_reader_of_events_that_reads_nothing_is_cut_off(
    served: Served, connect: Connect, jobs: Jobs
) -> None:
    package = jobs.add(status="failed", package_path=None, failure_reason="x" * 8_000_000)
    client = await connect(served)
    await asyncio.get_running_loop().sock_sendall(client, get(f"{BASE}/{package.job_id}/events"))
    await until("the request", lambda: served.connections == 1)
    await until("the end of the connection", lambda: served.connections == 0)


async def test_an_answer_that_waits_in_the_kernel_ends_the_connection_too(
    app: web.Application, connect: Connect
) -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.Response(body=bytes(300_000))

    app.router.add_get("/answer", handle, name="answer")
    async with serving(app) as served:
        client = await connect(served)
        await asyncio.get_running_loop().sock_sendall(client, get("/answer"))
        await until("the request", lambda: served.connections == 1)
        await until("the end of the connection", lambda: served.connections == 0)


async def test_a_client_that_reads_slowly_gets_its_answer_whole(served: Served, connect: Connect) -> None:
    loop = asyncio.get_running_loop()
    client = await connect(served)
    await loop.sock_sendall(client, get(LARGE_ASSET).replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
    received = bytearray()
    while data := await loop.sock_recv(client, 65536):
        received += data
        # In all, this takes several times the time limit on a stall.
        await asyncio.sleep(STALL_SECONDS / 6)
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}\r\n".encode() in head
    assert len(body) > 1_000_000


async def test_a_request_waits_until_the_answer_before_it_has_left(
    app: web.Application, connect: Connect
) -> None:
    number, size = 200, 60_000
    unsent: list[int] = []

    async def handle(request: web.Request) -> web.Response:
        assert request.transport is not None
        unsent.append(request.transport.get_write_buffer_size())
        return web.Response(body=bytes(size))

    app.router.add_get("/answer", handle, name="answer")
    async with serving(app) as served:
        loop = asyncio.get_running_loop()
        client = await connect(served)
        sending = asyncio.ensure_future(loop.sock_sendall(client, get("/answer") * number))
        received = 0
        while received < number * size:
            received += len(await loop.sock_recv(client, 1 << 20))
        await sending
        assert unsent == [0] * number

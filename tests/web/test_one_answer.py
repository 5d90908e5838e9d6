"""Each request gets one answer: once a byte of it is out, a failure only ends the connection."""

import asyncio
from collections.abc import Callable, MutableMapping
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import structlog
from aiohttp import web

from exportd.web.edge.errors import JobNotFound
from exportd.web.services import SERVICES
from tests.support.application import ANN, Jobs, make_test_app, noise, skip_missed_cleanup
from tests.support.postgres import query
from tests.support.server import serving

Fail = Callable[[], Any]


async def converse(port: int, sent: bytes) -> bytes:
    """Everything that comes until the server closes the connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(sent)
    received = bytearray()
    try:
        async with asyncio.timeout(30):
            while data := await reader.read(65536):
                received += data
    except ConnectionResetError:
        pass
    writer.close()
    return bytes(received)


def raising(error: Exception) -> Fail:
    def fail() -> None:
        raise error

    return fail


FAILURES: dict[str, Fail] = {
    "defect": raising(RuntimeError("a defect")),
    "error of the table": raising(JobNotFound()),
    "error of aiohttp": raising(web.HTTPNotFound()),
    "time-out": raising(TimeoutError()),
    "connection error": raising(ConnectionResetError()),
    "another response": lambda: web.Response(text="another"),
    "no response": lambda: None,
}


@pytest.mark.parametrize("body", [b"part of it", b"whole body"], ids=["in the body", "after the body"])
@pytest.mark.parametrize("failure", FAILURES)
async def test_a_handler_that_fails_after_its_headers_ends_the_connection(
    dsn: str, storage: Path, failure: str, body: bytes
) -> None:
    async def handle(request: web.Request) -> Any:
        response = web.StreamResponse(headers={"Content-Length": str(len(b"whole body"))})
        await response.prepare(request)
        await response.write(body if body == b"whole body" else body[:4])
        return FAILURES[failure]()

    app = make_test_app(dsn, storage)
    app.router.add_get("/broken", handle, name="broken")
    skip_missed_cleanup(dsn)
    async with serving(app) as served:
        # The second request is in the pipe already.
        received = await converse(served.port, b"GET /broken HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    # The abort may drop the bytes that were written.
    assert received.count(b"HTTP/1.1 ") <= 1
    _, _, sent = received.partition(b"\r\n\r\n")
    assert body.startswith(sent)


@pytest.mark.parametrize("sendfile", [True, False])
async def test_a_log_line_that_fails_costs_no_count_and_sends_no_second_answer(
    dsn: str, storage: Path, sendfile: bool
) -> None:
    def render(_: object, __: str, event: MutableMapping[str, Any]) -> str:
        raise ValueError(f"cannot render {event['event']}")

    jobs = Jobs(dsn, storage)
    package = jobs.add(noise(100_000))
    skip_missed_cleanup(dsn)
    request = f"GET {package.url} HTTP/1.1\r\nHost: x\r\nAuthorization: {ANN['Authorization']}\r\n\r\n"
    app = make_test_app(dsn, storage, download={"sendfile": sendfile})
    async with serving(app) as served:
        configuration = structlog.get_config()
        structlog.configure(processors=[render], wrapper_class=structlog.make_filtering_bound_logger(20))
        try:
            received = await converse(served.port, request.encode() * 2)
        finally:
            structlog.configure(**configuration)
        await app[SERVICES].ledger.settle(UUID(package.job_id))
    head, _, body = received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 ")
    assert body == package.content
    assert query(dsn, "SELECT outcome FROM download_events") == [("completed",)]
    assert jobs.counts(package) == (1, 100_000)


async def test_a_response_signal_that_fails_sends_nothing_twice(dsn: str, storage: Path) -> None:
    async def fail(_: web.Request, __: web.StreamResponse) -> None:
        raise RuntimeError("a signal")

    app = make_test_app(dsn, storage)
    app.on_response_prepare.append(fail)
    skip_missed_cleanup(dsn)
    async with serving(app) as served:
        received = await converse(served.port, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 2)
    assert received.count(b"HTTP/1.1 ") <= 1

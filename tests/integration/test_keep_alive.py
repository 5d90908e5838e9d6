"""One connection, a hundred requests of every kind: no answer is short of a byte or has one too many."""

import hashlib
import json
import random
import socket
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from tests.support.application import ANN, EVE, Jobs, Package, noise
from tests.support.daemon import Exportd, wait_for
from tests.support.postgres import query

SIZE = 300_000


@dataclass(frozen=True)
class Exchange:
    """A request, and what must come back: the status and exactly these bytes (None: some JSON)."""

    request: bytes
    method: str
    status: int
    body: bytes | None


def exchange(
    package: Package,
    status: int,
    body: bytes | None,
    method: str = "GET",
    headers: dict[str, str] = ANN,
    **fields: str,
) -> Exchange:
    sent = {"Host": "x", **headers, **{name.replace("_", "-"): value for name, value in fields.items()}}
    lines = [f"{method} {package.url} HTTP/1.1", *(f"{name}: {value}" for name, value in sent.items())]
    return Exchange(("\r\n".join(lines) + "\r\n\r\n").encode(), method, status, body)


def mixed(package: Package, missing: Package, count: int) -> list[Exchange]:
    content = package.content
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    kinds = [
        exchange(package, 200, content),
        exchange(package, 200, b"", method="HEAD"),
        exchange(package, 206, content[:1], Range="bytes=0-0"),
        exchange(package, 206, content[-1:], Range="bytes=-1"),
        exchange(package, 206, content[1000:70_000], Range="bytes=1000-69999"),
        exchange(package, 206, None, Range="bytes=0-9,100-109,5000-5999"),
        exchange(package, 416, None, Range=f"bytes={SIZE}-"),
        exchange(package, 304, b"", If_None_Match=etag),
        exchange(package, 412, None, If_Match='"x"'),
        exchange(package, 403, None, headers=EVE),
        exchange(package, 401, None, headers={}),
        exchange(missing, 404, None),
        exchange(missing, 404, b"", method="HEAD"),
        exchange(package, 405, None, method="DELETE"),
    ]
    return random.Random(count).choices(kinds, k=count)


class Reader:
    """Takes answers off a connection by their own Content-Length, byte for byte."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.buffer = b""

    def answer(self, method: str) -> tuple[int, dict[str, str], bytes]:
        while b"\r\n\r\n" not in self.buffer:
            self.more()
        head, _, self.buffer = self.buffer.partition(b"\r\n\r\n")
        status_line, *lines = head.decode().split("\r\n")
        version, status, _ = status_line.split(" ", 2)
        assert version == "HTTP/1.1", f"not the start of an answer: {status_line!r}"
        headers = dict(line.split(": ", 1) for line in lines)
        length = 0 if method == "HEAD" or status == "304" else int(headers["Content-Length"])
        while len(self.buffer) < length:
            self.more()
        body, self.buffer = self.buffer[:length], self.buffer[length:]
        return int(status), headers, body

    def more(self) -> None:
        data = self.connection.recv(1 << 18)
        assert data, "the connection ended in the middle of an answer"
        self.buffer += data


@dataclass
class Scene:
    exportd: Exportd
    port: int
    jobs: Jobs
    package: Package
    missing: Package

    def connect(self) -> Reader:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        return Reader(connection)


@pytest.fixture(params=["sendfile", "chunks"])
def scene(request: pytest.FixtureRequest, exportd: Exportd, dsn: str) -> Iterator[Scene]:
    exportd.storage.mkdir(parents=True)
    jobs = Jobs(dsn, exportd.storage)
    package, missing = jobs.add(noise(SIZE)), jobs.add()
    missing.file.unlink()
    daemon = exportd.serve(EXPORTD_DOWNLOAD__SENDFILE=str(request.param == "sendfile").lower())
    yield Scene(exportd, daemon.port, jobs, package, missing)
    assert daemon.stop() == 0
    methods = {line["method"] for line in daemon.events("download_completed")}
    assert methods == {request.param}


def check(reader: Reader, expected: Exchange) -> None:
    status, headers, body = reader.answer(expected.method)
    assert status == expected.status
    if expected.body is not None:
        assert body == expected.body
    elif headers["Content-Type"] == "application/json":
        assert json.loads(body)["status"] == "error"
    else:
        assert body.endswith(b"--\r\n")


def test_a_hundred_mixed_requests_one_after_the_other(scene: Scene) -> None:
    reader = scene.connect()
    for expected in mixed(scene.package, scene.missing, 100):
        reader.connection.sendall(expected.request)
        check(reader, expected)
    assert reader.buffer == b""
    reader.connection.close()


def test_a_hundred_mixed_requests_all_at_once(scene: Scene) -> None:
    reader = scene.connect()
    exchanges = mixed(scene.package, scene.missing, 100)
    reader.connection.sendall(b"".join(expected.request for expected in exchanges))
    for expected in exchanges:
        check(reader, expected)
    assert reader.buffer == b""
    reader.connection.close()


def test_after_an_abort_by_the_server_nothing_follows(scene: Scene) -> None:
    large = scene.jobs.add(noise(24_000_000))
    reader = scene.connect()
    before = mixed(scene.package, scene.missing, 10)
    reader.connection.sendall(
        b"".join(expected.request for expected in before)
        + exchange(large, 200, None).request
        + b"".join(expected.request for expected in before)
    )
    for expected in before:
        check(reader, expected)
    wait_for("the large download", lambda: b"\r\n\r\n" in reader.buffer or reader.more() is None)
    with large.file.open("ab") as file:
        file.write(b"x")
    try:
        while data := reader.connection.recv(1 << 20):
            reader.buffer += data
    except ConnectionResetError:
        pass
    body = reader.buffer.partition(b"\r\n\r\n")[2]
    assert len(body) < len(large.content)
    assert large.content.startswith(body)
    reader.connection.close()
    statement = "SELECT count(*) FROM download_events WHERE outcome = 'changed'"
    wait_for("the record", lambda: query(scene.jobs.dsn, statement) == [(1,)])


def test_bodies_that_nobody_asked_for_are_no_requests(scene: Scene) -> None:
    # A GET with a body: what it carries must not be taken for the next request.
    inner = exchange(scene.package, 200, None).request
    reader = scene.connect()
    outer = exchange(
        scene.package, 206, scene.package.content[:1], Range="bytes=0-0", Content_Length=str(len(inner))
    )
    reader.connection.sendall(
        outer.request + inner + exchange(scene.package, 200, b"", method="HEAD").request
    )
    check(reader, outer)
    status, headers, _ = reader.answer("HEAD")
    assert (status, headers["Content-Length"]) == (200, str(SIZE))
    reader.connection.close()

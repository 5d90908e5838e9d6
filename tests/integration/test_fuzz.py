"""Field values and tickets as raw bytes, sent to a running daemon: what it answers makes sense."""

import hashlib
import http.client
import json
import random
import re
import socket
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from email.parser import BytesParser
from typing import Any, cast
from urllib.parse import quote

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.application import ADMIN, ANN, Jobs, Package
from tests.support.daemon import Exportd
from tests.support.openapi import check_answer

CONTENT = random.Random(9110).randbytes(1000)
TOKEN = ANN["Authorization"].removeprefix("Bearer ")
HEADER, PAYLOAD, SIGNATURE = TOKEN.split(".")

Field = tuple[str, bytes]
fuzz = settings(max_examples=300)


@dataclass
class Target:
    """A daemon with one package, and the document it gives of itself."""

    port: int
    package: Package
    etag: str
    document: dict[str, Any]

    def ask(
        self, fields: Sequence[Field], query: bytes = b"", method: str = "GET"
    ) -> tuple[int, http.client.HTTPMessage, bytes]:
        """The answer, which is also a documented one."""
        head = f"{method} {self.package.url}".encode() + query + b" HTTP/1.1\r\nHost: x\r\n"
        lines = b"".join(name.encode() + b": " + value + b"\r\n" for name, value in fields)
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as client:
            client.sendall(head + lines + b"\r\n")
            response = http.client.HTTPResponse(client, method=method)
            response.begin()
            body = response.read()
        check_answer(self.document, method, self.package.url, response.status, dict(response.headers), body)
        return response.status, response.headers, body


@pytest.fixture(scope="module")
def target(shared_exportd: Exportd) -> Iterator[Target]:
    shared_exportd.storage.mkdir(parents=True)
    package = Jobs(shared_exportd.dsn, shared_exportd.storage).add(CONTENT)
    daemon = shared_exportd.serve()
    with urllib.request.urlopen(f"{daemon.url}/api-docs/swagger.json") as response:
        document = json.loads(response.read())
    etag = f'"{hashlib.sha256(CONTENT).hexdigest()}"'
    yield Target(daemon.port, package, etag, document)
    assert not daemon.events("request_failed")


def near(*scraps: str) -> st.SearchStrategy[bytes]:
    """Values made of these, so that nonsense is near to sense; and any bytes that end no line."""
    return st.one_of(
        st.lists(st.sampled_from(scraps), max_size=8).map(lambda parts: "".join(parts).encode()),
        st.binary(max_size=40).map(lambda value: re.sub(rb"[\r\n]", b"", value)),
        st.text(max_size=20).map(lambda text: re.sub(rb"[\r\n]", b"", text.encode())),
    )


credentials = near(
    "Bearer", "bearer", "Basic", "Digest", " ", "  ", "\t", ",", "=", '"', ".", "null", "undefined",
    HEADER, PAYLOAD, SIGNATURE[:-1], f"{HEADER}.{PAYLOAD}.", f".{PAYLOAD}.{SIGNATURE}", f"{TOKEN}A",
)  # fmt: skip
GOOD = [ANN["Authorization"].encode(), ADMIN["Authorization"].encode()]


def is_good(value: bytes) -> bool:
    """Whether the scraps happen to make up a token that was signed."""
    return value.strip(b" \t").partition(b" ")[2].strip(b" ") == TOKEN.encode()


@given(credentials.filter(lambda value: not is_good(value)))
@example(b"")
@example(b"Bearer")
@example(b"Bearer " + b"x" * 8000)
@example(f"Basic {TOKEN}".encode())
@example(f"Bearer{TOKEN}".encode())
@example(f"Bearer {TOKEN}, Bearer {TOKEN}".encode())
@example(f"Bearer {TOKEN} {TOKEN}".encode())
@example(f'Bearer "{TOKEN}"'.encode())
@fuzz
def test_generated_credentials_are_rejected(target: Target, value: bytes) -> None:
    status, headers, body = target.ask([("Authorization", value)])
    assert status in (400, 401)
    assert json.loads(body)["status"] == "error"
    assert (status == 401) == ("WWW-Authenticate" in headers)


@given(st.permutations(GOOD), st.lists(credentials, max_size=1), st.booleans())
@fuzz
def test_several_credentials_are_none(
    target: Target, good: list[bytes], more: list[bytes], first: bool
) -> None:
    values = [*more, *good] if first else [*good, *more]
    assert target.ask([("Authorization", value) for value in values])[0] in (400, 401)


@given(
    st.one_of(
        st.text(max_size=60).map(lambda text: quote(text.encode("utf-8", "surrogatepass"), safe="").encode()),
        st.from_regex(rb"[!-\"$-~\x80-\xff]{0,60}", fullmatch=True),
        st.from_regex(rb"[A-Za-z0-9_-]{43}", fullmatch=True),
    ),
    st.sampled_from(
        [b"?ticket=", b"?ticket=x&ticket=", b"?&ticket=", b"?ticket", b"?x=", b"?ticket%3D", b"?;ticket="]
    ),
)
@fuzz
def test_generated_tickets_are_rejected(target: Target, value: bytes, name: bytes) -> None:
    status, _, body = target.ask([], name + value)
    assert 400 <= status < 500
    assert json.loads(body)["code"] in ("LINK_EXPIRED", "UNAUTHENTICATED", "BAD_REQUEST")


ranges = near(
    "bytes", "=", "-", ",", " ", "0", "1", "5", "99", "999", "1000", "9" * 30, "x", "\t", "bytes=0-0"
)
conditions = near('"x"', "W/", "*", ",", " ", "E", "Fri, 24 Oct 2025 12:00:00 GMT", "Fri,", "GMT", '"', "0")
names = st.sampled_from(["If-Range", "If-Match", "If-None-Match", "If-Modified-Since", "If-Unmodified-Since"])


@given(
    st.sampled_from(["GET", "HEAD"]),
    st.lists(ranges.map(lambda value: ("Range", value)), max_size=2),
    st.lists(st.tuples(names, conditions), max_size=3),
)
@example("GET", [("Range", b"bytes=0-0,2-2,4-")], [])
@example("GET", [("Range", b"bytes=1000-")], [("If-Range", b"E")])
@example("GET", [], [("If-None-Match", b"E")])
@example("GET", [("Range", b"bytes=0-9")], [("If-Match", b'"\xff"')])
@fuzz
def test_any_request_gets_a_coherent_response(
    target: Target, method: str, asked: list[Field], conditions: list[Field]
) -> None:
    filled = [(name, re.sub(rb"\bE\b", target.etag.encode(), value)) for name, value in conditions]
    token = ("Authorization", ANN["Authorization"].encode())
    status, headers, body = target.ask([token, *asked, *filled], method=method)
    if method == "HEAD":
        assert status in (200, 304, 400, 412)
        assert body == b""
        return
    match status:
        case 200:
            assert body == CONTENT
            assert "Content-Range" not in headers
        case 206:
            assert asked
            for content_range, content in parts_of(headers, body):
                first, last, size = map(int, re.findall(r"\d+", content_range))
                assert (content, size) == (CONTENT[first : last + 1], len(CONTENT))
        case 304:
            assert (body, headers["ETag"]) == (b"", target.etag)
        case 412:
            assert json.loads(body)["code"] == "PRECONDITION_FAILED"
        case 416:
            assert headers["Content-Range"] == f"bytes */{len(CONTENT)}"
        case _:
            # Bytes that no field may hold (RFC 9110, section 5.5).
            assert (status, json.loads(body)["code"]) == (400, "BAD_REQUEST")
            assert any(re.search(rb"[\0-\x08\x0a-\x1f\x7f]", value) for _, value in [*asked, *conditions])


def parts_of(headers: http.client.HTTPMessage, body: bytes) -> list[tuple[str, bytes]]:
    """Content-Range and content of each part."""
    if headers.get_content_type() != "multipart/byteranges":
        return [(headers["Content-Range"], body)]
    message = BytesParser().parsebytes(f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode() + body)
    assert message.is_multipart()
    return [
        (str(part["Content-Range"]), part.get_payload(decode=True))
        for part in cast("list[Any]", message.get_payload())
    ]

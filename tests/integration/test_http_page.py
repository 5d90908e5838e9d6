"""docs/http.md is true: each row of its tables is sent to a running daemon, by both ways of delivery."""

import base64
import hashlib
import http.client
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from email.message import Message
from email.parser import BytesParser
from email.utils import format_datetime, parsedate_to_datetime
from pathlib import Path

import pytest

from tests.support.application import ANN, Jobs, Package
from tests.support.daemon import Exportd

PAGE = Path(__file__).parent.parent.parent / "docs" / "http.md"
CONTENT = random.Random(9110).randbytes(1000)
CODE = re.compile(r"`([^`]*)`")


@dataclass(frozen=True)
class Row:
    """One row of the page."""

    line: int
    request: str
    status: int
    body: str
    also: str

    def __str__(self) -> str:
        return f"{self.line}: {self.request}"[:60]


def read_page() -> list[Row]:
    rows = []
    for number, line in enumerate(PAGE.read_text().splitlines(), 1):
        cells = [cell.strip() for cell in line.strip().strip("|").split(" |")]
        if line.startswith("|") and not line.startswith(("| request", "| ---")):
            request, status, body, also = cells[0], cells[1], cells[2], cells[3] if len(cells) > 3 else ""
            rows.append(Row(number, request, int(status), body, also))
    return rows


ROWS = read_page()


@dataclass
class Served:
    """A daemon that serves one package, over one connection for all rows."""

    connection: http.client.HTTPConnection
    package: Package
    values: dict[str, str]

    def fill(self, text: str) -> str:
        """Puts the package's values in place of E, LM, LM+1s, LM-1s and DIGEST."""
        return re.sub(r"\b(LM[+-]1s|LM|E|DIGEST)(?![\w-])", lambda found: self.values[found[0]], text)

    def request(self, method: str, fields: list[str]) -> tuple[http.client.HTTPResponse, bytes]:
        self.connection.putrequest(method, self.package.url, skip_accept_encoding=True)
        for field in [*(f"{name}: {value}" for name, value in ANN.items()), *fields]:
            name, _, value = field.partition(":")
            self.connection.putheader(name, value.strip().encode())
        self.connection.endheaders()
        response = self.connection.getresponse()
        return response, response.read()


@pytest.fixture(scope="module", params=["sendfile", "chunks"])
def served(request: pytest.FixtureRequest, shared_exportd: Exportd) -> Iterator[Served]:
    shared_exportd.storage.mkdir(parents=True, exist_ok=True)
    package = Jobs(shared_exportd.dsn, shared_exportd.storage).add(CONTENT)
    daemon = shared_exportd.serve(EXPORTD_DOWNLOAD__SENDFILE=str(request.param == "sendfile").lower())
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    served = Served(connection, package, {})
    response, _ = served.request("HEAD", [])
    modified = parsedate_to_datetime(response.headers["Last-Modified"])
    digest = hashlib.sha256(CONTENT).digest()
    served.values = {
        "E": f'"{digest.hex()}"',
        "LM": response.headers["Last-Modified"],
        "LM+1s": format_datetime(modified + timedelta(seconds=1), usegmt=True),
        "LM-1s": format_datetime(modified - timedelta(seconds=1), usegmt=True),
        "DIGEST": f"sha-256=:{base64.b64encode(digest).decode()}:",
    }
    yield served
    connection.close()
    assert daemon.stop() == 0
    assert {line["method"] for line in daemon.events("download_completed")} == {request.param}


def parts_of(response: http.client.HTTPResponse, body: bytes) -> list[Message]:
    """The parts of a multipart body, taken apart by the standard library."""
    head = f"Content-Type: {response.headers['Content-Type']}\r\n\r\n".encode()
    message = BytesParser().parsebytes(head + body)
    assert message.is_multipart()
    assert not message.defects
    return message.get_payload()  # type: ignore[return-value]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_row(served: Served, row: Row) -> None:
    method = row.request.split()[0] if row.request[:1].isupper() else "GET"
    response, body = served.request(method, [served.fill(field) for field in CODE.findall(row.request)])
    assert response.status == row.status

    if row.body == "whole":
        assert body == CONTENT
    elif row.body == "none":
        assert body == b""
    elif row.body[0].isupper():
        assert json.loads(body)["code"] == row.body
    else:
        ranges = [tuple(map(int, item.split("-"))) for item in row.body.split(", ")]
        if len(ranges) == 1:
            assert body == CONTENT[ranges[0][0] : ranges[0][1] + 1]
        else:
            assert int(response.headers["Content-Length"]) == len(body)
            found = [
                (part["Content-Type"], part["Content-Range"], part.get_payload(decode=True))
                for part in parts_of(response, body)
            ]
            assert found == [
                ("application/gzip", f"bytes {first}-{last}/1000", CONTENT[first : last + 1])
                for first, last in ranges
            ]

    for is_absent, text in re.findall(r"(no )?`([^`]*)`", row.also):
        name, _, value = served.fill(text).partition(": ")
        if is_absent:
            assert name not in response.headers
        else:
            assert response.headers[name] == value
    assert "Date" in response.headers


def test_the_page_has_a_row_for_every_status() -> None:
    assert {row.status for row in ROWS} == {200, 206, 304, 405, 412, 416}
    assert len(ROWS) > 120

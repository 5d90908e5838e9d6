"""Values of a request that no client should send: none of them is answered as a defect of exportd's."""

import asyncio
import base64
import itertools
from typing import Any

import pytest
from yarl import URL

from tests.support.application import ANN, BASE, Jobs, Start

VALUES = [
    "", "%00", "%FF", "%ED%A0%80", "%F0%9F%92%A9", "a" * 4000, "-1", "0", "1e9", "9" * 400, "%D9%A3", "NaN",
    "null", "true", "..", "%2e%2e%2f", "%2F", "'; SELECT 1 --", "%25s", "{0}", "infinity", "[]", "%0d%0aX: y",
    "\u00a0", "00000000-0000-0000-0000-000000000000", "{00000000-0000-0000-0000-000000000000}",
    "urn:uuid:00000000-0000-0000-0000-000000000000",
]  # fmt: skip
TIMES = [
    "0001-01-01T00:00:00+14:00", "0001-01-01T00:00:00-23:59", "9999-12-31T23:59:59-12:00",
    "2026-01-01T00:00:00+16:00", "2026-01-01T00:00:00-23:59:59.999999", "2026-W01-1T00:00:00Z", "2026-01-01",
    "infinity", "-infinity", "now", "1970-01-01T24:00:00Z", "2026-06-30T23:59:60Z", "4713-01-01 BC",
]  # fmt: skip
FIELDS = {
    "Range": ["bytes=", "bytes=0-" + "9" * 400, "bytes=-0", "bytes=" + "0-0," * 500, "items=0-1", "\udcff"],
    "If-Range": ['"', "W/", "Mon, 31 Feb 2026 00:00:00 GMT", "\udcff"],
    "If-Match": ['"', "*, *", "\udcff", '"' * 500],
    "If-None-Match": ['"', "*, *", "\udcff"],
    "If-Modified-Since": ["Mon, 01 Jan 0000 00:00:00 GMT", "Fri, 31 Dec 99999 23:59:59 GMT", "\udcff"],
    "If-Unmodified-Since": ["Thu, 01 Jan 1601 99:99:99 GMT", "\udcff"],
    "Authorization": ["Bearer", "Bearer \udcff", "Bearer a.b.c", "Basic eDp5", "Bearer " + "a." * 2000],
    "X-Request-ID": ["\udcff", "a" * 4000, "%00"],
    "Want-Repr-Digest": ["sha-256=" + "9" * 400, "\udcff", "sha-256=x"],
    "Last-Event-ID": ["\udcff", "9" * 400],
    "Origin": ["null", "\udcff", "http://[::1"],
    "User-Agent": ["\udcff", "a" * 4000],
    "traceparent": ["\udcff", "00-" + "f" * 32],
}


def cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


@pytest.fixture
def targets(jobs: Jobs) -> list[tuple[str, str]]:
    job_id = jobs.add().job_id
    pending = jobs.add(status="pending", package_path=None).job_id
    found: list[tuple[str, str]] = []
    for value in VALUES:
        found += [
            ("GET", f"{BASE}?{name}={value}") for name in ("limit", "status", "cursor", "unknown", value)
        ]
        found += [("GET", f"{BASE}/{job_id}/download?ticket={value}"), ("GET", f"/page/{value}")]
        found += [("GET", f"/api-docs/{value}"), ("GET", f"/{value}"), ("GET", f"{BASE}/{value}")]
        found += [("GET", f"{BASE}/{value}/{rest}") for rest in ("download", "download-stats", "events")]
        found += [("POST", f"{BASE}/{value}/{rest}") for rest in ("re-export", "download-link")]
        found += [
            ("DELETE", f"{BASE}/{value}/download-link"),
            ("PUT", f"{BASE}/{value}"),
            ("OPTIONS", f"/{value}"),
        ]
    for time, rest in itertools.product(TIMES, (job_id, "x", "", "\0")):
        found.append(("GET", f"{BASE}?cursor={cursor(f'{time} {rest}')}"))
    assert pending
    return found


async def test_no_query_or_path_value_causes_a_500(start: Start, targets: list[tuple[str, str]]) -> None:
    client = await start(limits={"requests_per_minute_per_address": 0})
    for method, target in targets:
        url = URL(str(client.make_url("/"))[:-1] + target.replace(" ", "%20"), encoded=True)
        async with asyncio.timeout(30), client.session.request(method, url, headers=ANN) as response:
            await response.read()
            assert response.status < 500, (method, target)


@pytest.mark.parametrize("name", FIELDS)
async def test_no_header_value_causes_a_500(start: Start, jobs: Jobs, name: str) -> None:
    package = jobs.add()
    client = await start(server={"cors_origins": ["https://app.example.com"]})
    statuses: list[Any] = []
    for value, path in itertools.product(FIELDS[name], (package.url, f"{BASE}?limit=1", "/healthz")):
        reader, writer = await asyncio.open_connection("127.0.0.1", client.port)
        fields = {"Host": "x", "Connection": "close", **ANN, name: value}
        head = "".join(f"{key}: {content}\r\n" for key, content in fields.items())
        writer.write(f"GET {path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape"))
        async with asyncio.timeout(30):
            answer = await reader.read()
        writer.close()
        statuses.append((value, path, int(answer.split(b" ", 2)[1])))
    assert [found for found in statuses if found[2] >= 500] == []

"""GET and HEAD of a package over real sockets: every header, every row of the error table."""

import asyncio
import base64
import hashlib
import os
import re
import uuid
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import structlog
from aiohttp.test_utils import TestClient
from multidict import CIMultiDict

from exportd.web.edge import errors
from tests.support.application import ADMIN, ANN, BASE, EVE, SECRET, Jobs, Start, bearer, noise, until_idle
from tests.support.postgres import query

Client = TestClient[Any, Any]

SIZE = 3_000_001


async def error_of(
    client: Client, url: str, headers: dict[str, str], method: str = "GET"
) -> tuple[int, dict[str, Any]]:
    """Status and body of an error answer, whose envelope is checked."""
    async with client.request(method, url, headers=headers) as response:
        body = await response.json()
        assert response.headers["Cache-Control"] == "no-store"
        assert response.content_type == "application/json"
        assert body["status"] == "error"
        assert body["requestId"] == response.headers["X-Request-ID"]
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", body["timestamp"])
        for secret in ("/", "Traceback", "SELECT"):
            assert secret not in body["message"]
        return response.status, body


async def test_the_package_comes_whole_with_every_header(client: Client, jobs: Jobs, sender: str) -> None:
    package = jobs.add(noise(SIZE))
    with structlog.testing.capture_logs() as logs:
        async with client.get(package.url, headers=ANN) as response:
            assert response.status == 200
            assert await response.read() == package.content
        await until_idle(client)
    digest = hashlib.sha256(package.content).digest()
    expected = {
        "Content-Type": "application/gzip",
        "Content-Disposition": 'attachment; filename="export-customer-form-2025-10-24.tar.gz"',
        "Content-Length": str(SIZE),
        "Accept-Ranges": "bytes",
        "Cache-Control": "private, max-age=3600",
        "Vary": "Authorization",
        "ETag": f'"{digest.hex()}"',
        "Last-Modified": "Fri, 24 Oct 2025 12:00:00 GMT",
        "X-Package-Size": "2.9 MB",
        "Repr-Digest": f"sha-256=:{base64.b64encode(digest).decode()}:",
        "X-Accel-Buffering": "no",
        "X-Content-Type-Options": "nosniff",
        "Server": "exportd",
    }
    assert {name: response.headers.get(name) for name in expected} == expected
    assert not {"Content-Encoding", "Content-Range", "Transfer-Encoding"} & set(response.headers)
    ended = next(entry for entry in logs if entry["event"] == "download_completed")
    assert ended["method"] == sender


@pytest.mark.usefixtures("sender")
async def test_the_count_is_durable_before_the_next_answer_on_the_connection(
    client: Client, jobs: Jobs
) -> None:
    package = jobs.add(noise(SIZE))
    for times in (1, 2, 3):
        async with client.get(package.url, headers=ANN) as response:
            await response.read()
        async with client.get(package.stats_url, headers=ANN) as response:
            body = await response.json()
        assert (body["downloadCount"], body["bytesServed"]) == (times, times * SIZE)
        assert jobs.counts(package) == (times, times * SIZE)


async def test_the_count_is_durable_when_the_connection_closes(start: Start, jobs: Jobs, sender: str) -> None:
    client = await start(download={"sendfile": sender == "sendfile"})
    package = jobs.add(noise(SIZE))
    reader, writer = await asyncio.open_connection(client.host, client.port)
    fields = {"Host": "x", "Connection": "close", **ANN}
    request = "\r\n".join([f"GET {package.url} HTTP/1.1", *(f"{n}: {v}" for n, v in fields.items())])
    writer.write(f"{request}\r\n\r\n".encode())
    head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    assert b"\r\nConnection: close" in head
    assert body == package.content
    assert jobs.counts(package) == (1, SIZE)
    writer.close()


@pytest.mark.usefixtures("sender")
async def test_an_admin_may_and_counts_too(client: Client, jobs: Jobs, dsn: str) -> None:
    package = jobs.add()
    async with client.get(package.url, headers=ADMIN) as response:
        assert await response.read() == package.content
    async with client.get(package.stats_url, headers=ADMIN) as response:
        assert (await response.json())["downloadCount"] == 1
    assert query(dsn, "SELECT user_id, outcome, http_status, bytes_sent FROM download_events") == [
        ("root", "completed", 200, len(package.content))
    ]


async def test_head_answers_as_get_would_and_counts_nothing(client: Client, jobs: Jobs, dsn: str) -> None:
    package = jobs.add(noise(1000))
    async with client.get(package.url, headers=ANN) as response:
        expected = dict(response.headers)
    async with client.head(package.url, headers={**ANN, "Range": "bytes=0-0"}) as response:
        assert response.status == 200
        assert await response.read() == b""
        found = dict(response.headers)
    for name in ("Date", "X-Request-ID"):
        expected.pop(name)
        found.pop(name)
    assert found == expected
    assert query(dsn, "SELECT count(*) FROM download_events") == [(1,)]


@pytest.mark.parametrize(
    ("value", "status", "first", "stop"),
    [
        ("bytes=0-0", 206, 0, 1),
        ("bytes=-1", 206, SIZE - 1, SIZE),
        ("bytes=1000000-", 206, 1_000_000, SIZE),
        ("bytes=65535-65536", 206, 65535, 65537),
        ("bytes=0-", 206, 0, SIZE),
        ("bytes=0-99999999", 206, 0, SIZE),
        ("bytes=5-4", 200, 0, SIZE),
        ("items=0-1", 200, 0, SIZE),
    ],
)
@pytest.mark.usefixtures("sender")
async def test_one_range(client: Client, jobs: Jobs, value: str, status: int, first: int, stop: int) -> None:
    package = jobs.add(noise(SIZE))
    async with client.get(package.url, headers={**ANN, "Range": value}) as response:
        assert response.status == status
        assert await response.read() == package.content[first:stop]
        assert response.headers["Content-Length"] == str(stop - first)
        if status == 206:
            assert response.headers["Content-Range"] == f"bytes {first}-{stop - 1}/{SIZE}"
        else:
            assert "Content-Range" not in response.headers
    async with client.get(package.stats_url, headers=ANN) as response:
        body = await response.json()
    # Every byte in one delivery is a download, whatever the status.
    assert body["downloadCount"] == (1 if stop - first == SIZE else 0)
    assert body["bytesServed"] == stop - first


async def test_no_byte_in_the_range_is_416_and_keeps_the_connection(client: Client, jobs: Jobs) -> None:
    package = jobs.add(noise(1000))
    status, body = await error_of(client, package.url, {**ANN, "Range": "bytes=1000-"})
    assert (status, body["code"]) == (416, "RANGE_NOT_SATISFIABLE")
    async with client.get(package.url, headers={**ANN, "Range": "bytes=1000-"}) as response:
        assert response.headers["Content-Range"] == "bytes */1000"
        assert "Content-Disposition" not in response.headers
        assert response.headers.get("Connection") != "close"


@pytest.mark.usefixtures("sender")
async def test_an_empty_package_is_empty(client: Client, jobs: Jobs) -> None:
    package = jobs.add(b"")
    for value in ("bytes=0-0", "bytes=-1", "nonsense"):
        async with client.get(package.url, headers={**ANN, "Range": value}) as response:
            assert (response.status, response.headers["Content-Length"]) == (200, "0")
            assert await response.read() == b""
    await until_idle(client)
    assert jobs.counts(package) == (3, 0)


@pytest.mark.parametrize(
    "job_id",
    ["1", "x" * 36, "{11111111-2222-3333-4444-555555555555}", "111111112222333344445555555555555", "%00"],
)
async def test_400_for_an_id_that_is_no_uuid(client: Client, job_id: str) -> None:
    # Checked before the token, so the anonymous get it too.
    status, body = await error_of(client, f"{BASE}/{job_id}/download", {})
    assert (status, body["code"]) == (400, "INVALID_JOB_ID")


async def test_an_upper_case_id_is_the_same_job(client: Client, jobs: Jobs) -> None:
    package = jobs.add()
    async with client.get(f"{BASE}/{package.job_id.upper()}/download", headers=ANN) as response:
        assert response.status == 200


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        # RFC 6750, section 3.1: no error code where no credentials were given.
        ({}, 'Bearer realm="exportd"'),
        ({"Authorization": ""}, 'Bearer realm="exportd", error="invalid_token"'),
        ({"Authorization": "Bearer"}, 'Bearer realm="exportd", error="invalid_token"'),
        ({"Authorization": "Bearer nonsense"}, 'Bearer realm="exportd", error="invalid_token"'),
        ({"Authorization": "Basic YTpi"}, 'Bearer realm="exportd", error="invalid_token"'),
        (
            CIMultiDict([*ANN.items(), *ANN.items()]),
            'Bearer realm="exportd", error="invalid_token"',
        ),
        (bearer("ann", ttl_seconds=-1), 'Bearer realm="exportd", error="invalid_token"'),
    ],
    ids=["none", "empty", "no token", "nonsense", "another scheme", "twice", "expired"],
)
async def test_401_without_a_good_token(
    client: Client, jobs: Jobs, headers: dict[str, str], challenge: str
) -> None:
    package = jobs.add()
    status, body = await error_of(client, package.url, headers)
    assert (status, body["code"]) == (401, "UNAUTHENTICATED")
    async with client.get(package.url, headers=headers) as response:
        assert response.headers["WWW-Authenticate"] == challenge


async def test_the_scheme_of_a_token_is_case_insensitive(client: Client, jobs: Jobs) -> None:
    package = jobs.add()
    headers = {"Authorization": ANN["Authorization"].replace("Bearer", "bEARER")}
    async with client.get(package.url, headers=headers) as response:
        assert response.status == 200


async def test_404_for_a_job_that_does_not_exist(client: Client) -> None:
    status, body = await error_of(client, f"{BASE}/{uuid.uuid4()}/download", ANN)
    assert (status, body["code"]) == (404, "JOB_NOT_FOUND")


async def test_403_for_anybody_else_and_the_attempt_is_logged(client: Client, jobs: Jobs) -> None:
    package = jobs.add()
    with structlog.testing.capture_logs([structlog.contextvars.merge_contextvars]) as logs:
        status, body = await error_of(client, package.url, EVE)
    assert (status, body["code"]) == (403, "DOWNLOAD_UNAUTHORIZED")
    assert body["message"] == "Only job creator or admin can download this package"
    denied = next(entry for entry in logs if entry["event"] == "download_denied")
    assert (denied["user_id"], denied["job_id"], denied["request_id"], denied["log_level"]) == (
        "eve", package.job_id, body["requestId"], "warning",
    )  # fmt: skip


async def test_a_stranger_learns_nothing_of_readiness_or_expiry(client: Client, jobs: Jobs) -> None:
    for columns in ({"status": "pending"}, {"package_path": None}, {"package_expires_at": datetime.now(UTC)}):
        status, body = await error_of(client, jobs.add(**columns).url, EVE)
        assert (status, body["code"]) == (403, "DOWNLOAD_UNAUTHORIZED")
        assert not {"jobStatus", "expiresAt"} & set(body)


@pytest.mark.parametrize("job_status", ["pending", "failed"])
async def test_404_for_a_package_that_is_not_ready(client: Client, jobs: Jobs, job_status: str) -> None:
    status, body = await error_of(client, jobs.add(status=job_status).url, ANN)
    assert (status, body["code"], body["jobStatus"]) == (404, "PACKAGE_NOT_READY", job_status)


async def test_410_for_a_package_whose_time_is_up(client: Client, jobs: Jobs) -> None:
    expired = datetime.now(UTC).replace(microsecond=0) - timedelta(seconds=1)
    package = jobs.add(package_expires_at=expired)
    for headers in (ANN, ADMIN):
        status, body = await error_of(client, package.url, headers)
        assert (status, body["code"]) == (410, "PACKAGE_EXPIRED")
        assert datetime.fromisoformat(body["expiresAt"]) == expired
    status, body = await error_of(client, jobs.add(package_path=None, package_expires_at=None).url, ANN)
    assert (status, body["code"], body["expiresAt"]) == (410, "PACKAGE_EXPIRED", None)


async def test_404_for_a_file_that_was_deleted(client: Client, jobs: Jobs) -> None:
    package = jobs.add()
    package.file.unlink()
    status, body = await error_of(client, package.url, ANN)
    assert (status, body["code"]) == (404, "FILE_NOT_FOUND")


def outside(package_file: Path) -> str:
    (package_file.parent.parent / "secret").write_bytes(b"a package")
    return "../secret"


def make_fifo(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


def link_out(file: Path) -> None:
    file.unlink()
    (file.parent.parent / "secret").write_bytes(b"a package")
    file.symlink_to("../secret")


@pytest.mark.parametrize(
    "spoil",
    [lambda file: file.write_bytes(b"another size"), make_fifo, link_out],
    ids=["size", "fifo", "symlink"],
)
async def test_500_for_a_file_that_cannot_be_served(client: Client, jobs: Jobs, spoil: Any) -> None:
    package = jobs.add()
    spoil(package.file)
    with structlog.testing.capture_logs() as logs:
        status, body = await error_of(client, package.url, ANN)
    assert (status, body["code"]) == (500, "STORAGE_ERROR")
    assert [(entry["event"], entry["log_level"]) for entry in logs] == [("download_failed", "error")]


async def test_500_for_a_path_that_leaves_the_storage(client: Client, jobs: Jobs) -> None:
    inside = jobs.add()
    package = jobs.add(package_path=outside(inside.file))
    status, body = await error_of(client, package.url, ANN)
    assert (status, body["code"]) == (500, "STORAGE_ERROR")


@pytest.mark.fresh_database
async def test_500_for_what_nobody_foresaw_is_logged_and_tells_nothing(
    client: Client, jobs: Jobs, dsn: str
) -> None:
    package = jobs.add()
    query(dsn, "ALTER TABLE export_jobs RENAME COLUMN package_path TO elsewhere")
    with structlog.testing.capture_logs() as logs:
        status, body = await error_of(client, package.url, ANN)
    assert (status, body["code"]) == (500, "INTERNAL_ERROR")
    assert logs[-1]["event"] == "request_failed"
    assert logs[-1]["exc_info"]


@pytest.mark.fresh_database
async def test_503_while_the_database_is_away_and_back_again(
    client: Client, jobs: Jobs, dsn: str, server_dsn: str
) -> None:
    package = jobs.add()
    name = psycopg2.extensions.parse_dsn(dsn)["dbname"]
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    query(server_dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    status, body = await error_of(client, package.url, ANN)
    assert (status, body["code"]) == (503, "DATABASE_UNAVAILABLE")
    async with client.get(package.url, headers=ANN) as response:
        assert int(response.headers["Retry-After"]) > 0
    async with client.get("/readyz") as response:
        assert response.status == 503
        assert (await response.json())["database"] == "unavailable"
    async with client.get("/healthz") as response:
        assert response.status == 200
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    async with client.get(package.url, headers=ANN) as response:
        assert await response.read() == package.content


@pytest.mark.parametrize("path", ["/nowhere", f"{BASE}/x/y/z", "/api/tool-registry/", f"{BASE}/x/download/"])
async def test_404_in_the_same_envelope_for_an_unknown_address(client: Client, path: str) -> None:
    status, body = await error_of(client, path, ANN)
    assert (status, body["code"]) == (404, "NOT_FOUND")


async def test_405_names_what_is_allowed(client: Client, jobs: Jobs) -> None:
    package = jobs.add()
    status, body = await error_of(client, package.url, ANN, "DELETE")
    assert (status, body["code"]) == (405, "METHOD_NOT_ALLOWED")
    async with client.put(package.url, headers=ANN) as response:
        assert response.headers["Allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("given", "is_kept"),
    [
        ("abc-DEF_1.2:3", True),
        ("", False),
        ("a b", False),
        ("a" * 129, False),
        ("\u00e9", False),
        ('"x"', False),
    ],
)
async def test_the_callers_request_id_is_kept_if_sane(client: Client, given: str, is_kept: bool) -> None:
    async with client.get("/healthz", headers={"X-Request-ID": given}) as response:
        assert (response.headers["X-Request-ID"] == given) == is_kept
        assert re.fullmatch(r"[A-Za-z0-9._:-]{1,128}", response.headers["X-Request-ID"])


async def test_a_package_without_digest_has_a_validator_from_its_content(client: Client, jobs: Jobs) -> None:
    package = jobs.add(package_sha256=None, package_size_bytes=None, completed_at=None)
    os.utime(package.file, ns=(1_500_000_000_999_999_999, 1_500_000_000_999_999_999))
    tags = []
    for _ in range(2):
        async with client.get(package.url, headers=ANN) as response:
            assert response.headers["Last-Modified"] == "Fri, 14 Jul 2017 02:40:00 GMT"
            assert "Repr-Digest" not in response.headers
            tags.append(response.headers["ETag"])
            await response.read()
    await until_idle(client)
    # A copy of the file, on this or another node, has the same validator.
    for content in (package.content, package.content.swapcase()):
        package.file.unlink()
        package.file.write_bytes(content)
        async with client.head(package.url, headers=ANN) as response:
            tags.append(response.headers["ETag"])
    assert tags[0] == tags[1] == tags[2] != tags[3]


async def test_a_digest_in_upper_case_is_a_digest(client: Client, jobs: Jobs) -> None:
    digest = hashlib.sha256(b"a package").hexdigest()
    package = jobs.add(package_sha256=digest.upper())
    async with client.get(package.url, headers={**ANN, "If-None-Match": f'"{digest}"'}) as response:
        assert (response.status, response.headers["ETag"]) == (304, f'"{digest}"')


@pytest.mark.parametrize(
    "spelling",
    [
        "",
        "pending",
        "sha256:{}",
        "sha256-{}",
        "0x{}",
        "{}  p.tar.gz",
        "{}\n",
        " {}",
        "q" * 64,
        "{}0",
        "\u0665" * 64,
    ],
)
async def test_a_text_that_is_no_digest_is_as_if_absent(client: Client, jobs: Jobs, spelling: str) -> None:
    digest = hashlib.sha256(b"a package").hexdigest()
    package = jobs.add(package_sha256=spelling.format(digest))
    async with client.get(package.url, headers=ANN) as response:
        assert response.status == 200
        assert response.headers["ETag"].startswith('"file-')
        assert "Repr-Digest" not in response.headers
        assert await response.read() == b"a package"
    await until_idle(client)
    assert jobs.counts(package)[0] == 1
    async with client.get(package.url.removesuffix("/download"), headers=ANN) as response:
        assert (response.status, (await response.json())["package"]["sha256"]) == (200, None)


async def test_last_modified_is_never_later_than_now(client: Client, jobs: Jobs) -> None:
    package = jobs.add(completed_at=datetime.now(UTC) + timedelta(days=1))
    async with client.get(package.url, headers=ANN) as response:
        modified = parsedate_to_datetime(response.headers["Last-Modified"])
        assert modified <= parsedate_to_datetime(response.headers["Date"])


@pytest.mark.usefixtures("sender")
async def test_the_package_is_never_encoded(client: Client, jobs: Jobs) -> None:
    package = jobs.add(b"a" * 100_000)
    async with client.get(package.url, headers={**ANN, "Accept-Encoding": "gzip, deflate, br"}) as response:
        assert "Content-Encoding" not in response.headers
        assert await response.read() == package.content


async def test_strangers_get_no_statistics(client: Client, jobs: Jobs) -> None:
    package = jobs.add()
    assert (await error_of(client, package.stats_url, EVE))[1]["code"] == "DOWNLOAD_UNAUTHORIZED"
    assert (await error_of(client, package.stats_url, {}))[1]["code"] == "UNAUTHENTICATED"
    assert (await error_of(client, f"{BASE}/{uuid.uuid4()}/download-stats", ANN))[1][
        "code"
    ] == "JOB_NOT_FOUND"
    assert (await error_of(client, f"{BASE}/1/download-stats", ANN))[1]["code"] == "INVALID_JOB_ID"


async def test_statistics_of_an_expired_package_stay(client: Client, jobs: Jobs) -> None:
    package = jobs.add(package_expires_at=datetime.now(UTC), download_count=5)
    async with client.get(package.stats_url, headers=ANN) as response:
        assert await response.json() == {
            "jobId": package.job_id, "downloadCount": 5, "lastDownloadedAt": None, "bytesServed": 0,
        "uniqueUsers": 0,
        "bySize": [],
        "failures": [],
        "recentEvents": [],
        }  # fmt: skip


async def test_readiness_names_a_storage_that_is_gone(client: Client, storage: Path) -> None:
    async with client.get("/readyz") as response:
        assert (response.status, await response.json()) == (
            200, {"status": "ok", "database": "ok", "storage": "ok"},
        )  # fmt: skip
    storage.rename(storage.with_name("elsewhere"))
    async with asyncio.timeout(30):
        # The answer is remembered for a second.
        while True:
            async with client.get("/readyz") as response:
                if response.status == 503:
                    assert (await response.json())["storage"] == "unavailable"
                    break
            await asyncio.sleep(0.1)


def test_every_error_has_a_code_of_its_own_and_a_sentence() -> None:
    table = errors.ApiError.__subclasses__()
    codes = [error.code for error in table]
    assert len(set(codes)) == len(codes) > 10
    for error in table:
        assert error().message
        assert error.status >= 400


def test_the_tests_secret_is_long_enough() -> None:
    assert len(SECRET) >= 32

"""Download links: who makes them, what they open and for how long, and what they never do."""

import asyncio
import hashlib
import re
import uuid
from typing import Any

import pytest
import structlog
from aiohttp.test_utils import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exportd.db.links import prune_links
from exportd.db.pool import Database
from exportd.web.edge.access import ticket_digest
from tests.support.application import ADMIN, ANN, BASE, EVE, Jobs, Package, Start, bearer, noise, until_idle
from tests.support.postgres import query
from tests.support.scrape import scrape

Client = TestClient[Any, Any]
SIZE = 3_000_001
HOUR, DAY = 3600, 86400


async def make(client: Client, package: Package, headers: dict[str, str] = ANN) -> str:
    async with client.post(f"{package.url}-link", headers=headers) as response:
        assert response.status == 201
        assert response.headers["Cache-Control"] == "no-store"
        document = await response.json()
        assert document.keys() == {"url", "expiresAt", "resumeUntil"}
        url: str = document["url"]
        return url


async def code_of(client: Client, url: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    async with client.request(method, url, headers=headers) as response:
        return response.status, (await response.json())["code"]


def age(jobs: Jobs, seconds: float) -> None:
    """Lets time pass for every link."""
    query(
        jobs.dsn,
        "UPDATE exportd_download_links SET start_until = start_until - make_interval(secs => %s),"
        " resume_until = resume_until - make_interval(secs => %s)",
        (seconds, seconds),
    )


async def begin(client: Client, url: str) -> None:
    """Downloads the first part, and no more."""
    async with client.get(url, headers={"Range": "bytes=0-999999"}) as response:
        assert response.status == 206
        await response.read()
    await until_idle(client)


DEAD = (410, "LINK_EXPIRED")


async def test_a_link_downloads_without_a_token(client: Client, jobs: Jobs, sender: str) -> None:
    package = jobs.add(noise(SIZE))
    url = await make(client, package)
    assert re.fullmatch(rf"{re.escape(package.url)}\?ticket=[A-Za-z0-9_-]{{43}}", url)
    async with client.head(url) as response:
        assert (response.status, response.headers["Content-Length"]) == (200, str(SIZE))
    async with client.get(url) as response:
        assert response.headers["Referrer-Policy"] == "no-referrer"
        assert await response.read() == package.content
    async with client.get(url, headers={"Range": "bytes=1000-"}) as response:
        assert response.status == 206
        assert await response.read() == package.content[1000:]
    await until_idle(client)
    assert jobs.counts(package)[0] == 1
    assert query(jobs.dsn, "SELECT DISTINCT user_id, method FROM download_events") == [("ann", sender)]


async def test_a_cache_asks_before_it_gives_a_package_again(start: Start, jobs: Jobs) -> None:
    client, package = await start(), jobs.add()
    url = await make(client, package)
    for address, fields, control, vary in (
        (package.url, ANN, "private, max-age=3600", "Authorization"),
        (url, {}, "private, no-cache", None),
    ):
        async with client.get(address, headers=fields) as whole:
            answers = [whole.headers]
        for more in ({"If-None-Match": answers[0]["ETag"]}, {"Range": "bytes=0-1"}):
            async with client.get(address, headers={**fields, **more}) as answer:
                answers.append(answer.headers)
        assert [(each["Cache-Control"], each.get("Vary")) for each in answers] == [(control, vary)] * 3


async def test_a_link_is_for_whoever_made_it(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    url = await make(client, package, ADMIN)
    # The link decides, whatever token comes along.
    for headers in ({}, EVE, {"Authorization": "Bearer garbage"}):
        async with client.get(url, headers=headers) as response:
            assert response.status == 200
    await until_idle(client)
    assert query(jobs.dsn, "SELECT DISTINCT user_id FROM download_events") == [("root",)]


async def test_only_a_user_who_may_download_can_make_a_link(start: Start, jobs: Jobs) -> None:
    client = await start()
    package, pending = jobs.add(), jobs.add(status="pending", package_path=None, completed_at=None)
    expired = jobs.add(package_expires_at="2025-12-01")
    lost = jobs.add()
    lost.file.unlink()

    async def refused(path: str, headers: dict[str, str]) -> tuple[int, str]:
        return await code_of(client, f"{path}-link", "POST", **headers)

    assert await refused(package.url, {}) == (401, "UNAUTHENTICATED")
    assert await refused(package.url, EVE) == (403, "DOWNLOAD_UNAUTHORIZED")
    assert await refused(pending.url, ANN) == (404, "PACKAGE_NOT_READY")
    assert await refused(expired.url, ANN) == (410, "PACKAGE_EXPIRED")
    assert await refused(lost.url, ANN) == (404, "FILE_NOT_FOUND")
    assert await refused(f"{BASE}/{uuid.uuid4()}/download", ANN) == (404, "JOB_NOT_FOUND")
    assert await refused(f"{BASE}/nonsense/download", ANN) == (400, "INVALID_JOB_ID")
    # A link makes no other link, and opens nothing but the package.
    url = await make(client, package)
    ticket = url.partition("?")[2]
    for method, path in [
        ("POST", f"{package.url}-link"), ("DELETE", f"{package.url}-link"), ("GET", package.stats_url),
        ("GET", f"{BASE}/{package.job_id}"), ("GET", f"{BASE}/{package.job_id}/events"), ("GET", BASE),
        ("POST", f"{BASE}/{package.job_id}/re-export"),
    ]:  # fmt: skip
        assert await code_of(client, f"{path}?{ticket}", method) == (401, "UNAUTHENTICATED")
    assert query(jobs.dsn, "SELECT count(*) FROM exportd_download_links") == [(1,)]


async def test_an_invalid_ticket_opens_nothing(start: Start, jobs: Jobs) -> None:
    client = await start()
    package, other = jobs.add(), jobs.add()
    url = await make(client, package)
    address, ticket = url.split("ticket=")
    digest = hashlib.sha256(ticket.encode()).hexdigest()
    for query_string in (
        "", "x", ticket[:-1], ticket + "A", ticket.swapcase(), digest, "%00", "%ED%A0%80", "%FF", "a" * 5000,
        f"{ticket}&ticket={ticket}", f"x&ticket={ticket}",
    ):  # fmt: skip
        assert await code_of(client, f"{address}ticket={query_string}", **ANN) == DEAD, query_string
    assert await code_of(client, f"{other.url}?ticket={ticket}") == DEAD
    assert await code_of(client, f"{BASE}/{uuid.uuid4()}/download?ticket={ticket}") == DEAD
    assert await code_of(client, f"{package.url}?Ticket={ticket}") == (401, "UNAUTHENTICATED")


@given(st.text())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_ticket_has_a_digest(ticket: str) -> None:
    assert len(ticket_digest(ticket)) == 32


async def test_after_the_first_hour_only_what_was_begun_goes_on(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(noise(SIZE))
    url = await make(client, package)
    age(jobs, HOUR - 60)
    await begin(client, url)
    age(jobs, 61)
    assert await code_of(client, url) == DEAD
    async with client.head(url) as response:
        assert response.status == 200
    async with client.get(url, headers={"Range": "bytes=1000000-"}) as response:
        assert response.status == 206
        assert await response.read() == package.content[1_000_000:]
    await until_idle(client)
    assert jobs.counts(package)[0] == 1
    # Now it is whole, and nothing is left to resume.
    assert await code_of(client, url, Range="bytes=1000000-") == DEAD


async def test_nothing_that_was_not_begun_goes_on_late(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(noise(SIZE))
    url, admins = await make(client, package), await make(client, package, ADMIN)
    await begin(client, admins)
    age(jobs, HOUR + 1)
    assert await code_of(client, url, Range="bytes=1000000-") == DEAD
    async with client.head(url) as response:
        assert response.status == 410


async def test_a_link_cannot_resume_a_download_started_without_it(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(noise(SIZE))
    url = await make(client, package)
    # By a HEAD nothing is begun, nor by a range that is nowhere.
    async with client.head(url) as response:
        assert response.status == 200
    assert (await code_of(client, url, Range=f"bytes={SIZE}-"))[0] == 416
    age(jobs, HOUR + 1)
    async with client.get(package.url, headers={**ANN, "Range": "bytes=0-0"}) as response:
        assert response.status == 206
    await until_idle(client)
    assert await code_of(client, url, Range="bytes=1-") == DEAD


@pytest.mark.parametrize(
    "fields",
    [
        {"Range": "x"},
        {"Range": "bytes=5-4"},
        {"Range": "items=1-"},
        {"Range": "bytes=1000000-", "If-Range": '"x"'},
    ],
)
async def test_a_resume_that_asks_for_the_whole_is_a_start(
    start: Start, jobs: Jobs, fields: dict[str, str]
) -> None:
    client = await start()
    package = jobs.add(noise(SIZE))
    url = await make(client, package)
    await begin(client, url)
    age(jobs, HOUR + 1)
    assert await code_of(client, url, **fields) == DEAD
    query(jobs.dsn, "UPDATE export_jobs SET package_expires_at = now() - interval '1 minute'")
    assert await code_of(client, package.url, **ANN, **fields) == (410, "PACKAGE_EXPIRED")
    async with client.get(package.url, headers={**ANN, "Range": "bytes=1000000-"}) as response:
        assert response.status == 206


async def test_after_a_day_nothing_goes_on(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(noise(SIZE))
    url = await make(client, package)
    await begin(client, url)
    age(jobs, DAY - 60)
    async with client.get(url, headers={"Range": "bytes=1000000-1999999"}) as response:
        assert response.status == 206
    age(jobs, 61)
    assert await code_of(client, url, Range="bytes=2000000-") == DEAD


@pytest.mark.usefixtures("sender")
async def test_a_running_delivery_outlives_its_link(client: Client, jobs: Jobs) -> None:
    package = jobs.add(noise(30_000_000))
    url = await make(client, package)
    async with client.get(url) as response:
        first = await response.content.readexactly(1000)
        async with client.delete(f"{package.url}-link", headers=ANN) as revoked:
            assert revoked.status == 204
        age(jobs, DAY + 1)
        assert first + await response.read() == package.content
    assert await code_of(client, url) == DEAD


async def test_a_head_or_a_look_ahead_uses_up_nothing(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    url = await make(client, package)
    for _ in range(3):
        async with client.head(url) as response:
            assert response.status == 200
        async with client.get(url, headers={"Sec-Purpose": "prefetch"}) as response:
            assert await response.read() == package.content


async def test_links_are_revoked_by_their_maker_or_an_admin(start: Start, jobs: Jobs) -> None:
    client = await start()
    package, other = jobs.add(), jobs.add()
    anns, roots = await make(client, package), await make(client, package, ADMIN)
    others = await make(client, other)

    async def revoke(headers: dict[str, str]) -> int:
        async with client.delete(f"{package.url}-link", headers=headers) as response:
            return response.status

    assert await revoke({}) == 401
    assert await revoke(EVE) == 403
    with structlog.testing.capture_logs() as logs:
        assert [await revoke(ANN), await revoke(ANN)] == [204, 204]
    # The package is ann's: whoever made a link to it, she can end it.
    assert [line["count"] for line in logs if line["event"] == "download_links_revoked"] == [2, 0]
    assert await code_of(client, anns) == await code_of(client, roots) == DEAD
    anns = await make(client, package)
    assert await revoke(ADMIN) == 204
    assert await code_of(client, anns) == DEAD
    async with client.get(others) as response:
        assert response.status == 200


async def test_a_former_admin_can_revoke_own_links(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    anns, roots = await make(client, package), await make(client, package, ADMIN)
    demoted = bearer("root")
    assert await code_of(client, package.url, **demoted) == (403, "DOWNLOAD_UNAUTHORIZED")
    async with client.delete(f"{package.url}-link", headers=demoted) as response:
        assert response.status == 204
    assert await code_of(client, roots) == DEAD
    async with client.get(anns) as response:
        assert response.status == 200
    assert await code_of(client, f"{package.url}-link", "DELETE", **demoted) == (403, "DOWNLOAD_UNAUTHORIZED")


async def test_an_admins_link_is_not_exempt_from_limits(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"requests_per_minute_per_user": 2})
    url = await make(client, jobs.add(), ADMIN)
    statuses = []
    for _ in range(3):
        async with client.get(url) as response:
            statuses.append(response.status)
    assert statuses == [200, 200, 429]


async def test_only_the_newest_links_stay_valid(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    first, roots = await make(client, package), await make(client, package, ADMIN)
    others = [await make(client, package) for _ in range(100)]
    assert await code_of(client, first) == DEAD
    for url in (others[0], others[-1], roots):
        async with client.get(url) as response:
            assert response.status == 200
    assert query(jobs.dsn, "SELECT count(*) FROM exportd_download_links") == [(101,)]


async def test_a_link_is_bound_to_what_it_was_made_for(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    url = await make(client, package)
    query(jobs.dsn, "UPDATE export_jobs SET package_sha256 = repeat('0', 64)")
    assert await code_of(client, url) == DEAD
    async with client.get(package.url, headers=ANN) as response:
        assert response.status == 200


async def test_the_maker_loses_the_job_and_the_link_is_dead_with_it(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    url = await make(client, package)
    query(jobs.dsn, "UPDATE export_jobs SET user_id = 'eve'")
    assert await code_of(client, url) == (403, "DOWNLOAD_UNAUTHORIZED")
    query(jobs.dsn, "UPDATE export_jobs SET user_id = 'ann', package_expires_at = '2025-12-01'")
    assert await code_of(client, url) == (410, "PACKAGE_EXPIRED")
    query(jobs.dsn, "DELETE FROM export_jobs")
    assert await code_of(client, url) == (404, "JOB_NOT_FOUND")


async def test_a_ticket_is_kept_and_logged_nowhere(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    with structlog.testing.capture_logs() as logs:
        url = await make(client, package)
        async with client.get(url) as response:
            await response.read()
        await until_idle(client)
        age(jobs, DAY + 1)
        assert await code_of(client, url) == DEAD
    ticket = url.partition("ticket=")[2]
    assert {"download_link_made", "download_completed", "download_link_refused"} <= {
        line["event"] for line in logs
    }
    assert ticket not in repr(logs)
    tables = query(jobs.dsn, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    for (table,) in tables:
        assert ticket not in repr(query(jobs.dsn, f"SELECT t::text FROM {table} AS t")), table
    assert query(jobs.dsn, "SELECT ticket_sha256 = sha256(%s) FROM exportd_download_links", (ticket,)) == [
        (True,)
    ]


async def test_a_dead_link_is_told_in_words_to_a_person(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    browser = "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"
    url = await make(client, package)
    age(jobs, DAY + 1)
    async with client.get(url, headers={"Accept": browser}) as response:
        assert (response.status, response.content_type) == (410, "text/html")
        assert "default-src 'none'" in response.headers["Content-Security-Policy"]
        page = await response.text()
        assert "This download link is invalid, expired or revoked" in page
        assert response.headers["X-Request-ID"] in page
        assert "<script" not in page
    for accept in ("*/*", "application/json", "application/json, text/html;q=0", "text/html; q=0.000"):
        assert await code_of(client, url, Accept=accept) == DEAD
    metrics = await scrape(client)
    assert metrics['exportd_access_refused_total{reason="bad_link"}'] == 5


async def test_a_good_link_is_a_package_to_a_person_too(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    async with client.get(await make(client, package), headers={"Accept": "text/html"}) as response:
        assert await response.read() == package.content


async def test_links_that_are_long_dead_are_forgotten(start: Start, jobs: Jobs, database: Database) -> None:
    client = await start()
    package = jobs.add()
    await make(client, package)
    age(jobs, 2 * DAY - 60)
    await prune_links(database)
    assert query(jobs.dsn, "SELECT count(*) FROM exportd_download_links") == [(1,)]
    age(jobs, 61)
    await prune_links(database)
    assert query(jobs.dsn, "SELECT count(*) FROM exportd_download_links") == [(0,)]


async def test_many_links_at_once_are_all_good(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    urls = await asyncio.gather(*(make(client, package) for _ in range(20)))
    assert len(set(urls)) == 20

    async def status(url: str) -> int:
        async with client.get(url) as response:
            return response.status

    assert set(await asyncio.gather(*map(status, urls))) == {200}


async def test_the_windows_are_settings(start: Start, jobs: Jobs) -> None:
    client = await start(links={"start_seconds": 10.0, "resume_seconds": 20.0})
    package = jobs.add(noise(SIZE))
    url = await make(client, package)
    await begin(client, url)
    age(jobs, 11)
    assert await code_of(client, url) == DEAD
    async with client.get(url, headers={"Range": "bytes=1000000-1000001"}) as response:
        assert response.status == 206
    age(jobs, 10)
    assert await code_of(client, url, Range="bytes=1000000-") == DEAD


@pytest.mark.parametrize("mounted", ["/a/b", ""])
async def test_the_address_is_the_one_asked(start: Start, jobs: Jobs, mounted: str) -> None:
    client = await start(server={"base_path": mounted})
    package = jobs.add()
    async with client.post(f"{mounted}/export-jobs/{package.job_id}/download-link", headers=ANN) as response:
        url = (await response.json())["url"]
    assert url.startswith(f"{mounted}/export-jobs/{package.job_id}/download?ticket=")
    async with client.get(url) as response:
        assert await response.read() == package.content

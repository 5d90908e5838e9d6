"""Limits: who is refused, with what, and for how long."""

import asyncio
from typing import Any
from uuid import UUID

import pytest
import structlog
from aiohttp.test_utils import TestClient

from exportd.counting.running import write_running
from exportd.db.pool import Database
from tests.counting.test_ledger import event
from tests.support.application import ADMIN, ANN, BASE, EVE, Jobs, Package, Start, noise, until_idle
from tests.support.postgres import query
from tests.support.scrape import scrape

Client = TestClient[Any, Any]
SIZE = 3_000_001


async def ask(client: Client, url: str, headers: dict[str, str] = ANN) -> tuple[int, Any]:
    async with client.get(url, headers=headers) as response:
        if response.status == 429:
            body = await response.json()
            assert int(response.headers["Retry-After"]) == body["retryAfterSeconds"] > 0
            return response.status, (body["code"], body["limit"])
        return response.status, len(await response.read())


async def test_a_user_meets_the_limit_on_requests_and_others_do_not(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"requests_per_minute_per_user": 3})
    with structlog.testing.capture_logs() as logs:
        for _ in range(3):
            assert (await ask(client, BASE))[0] == 200
        for _ in range(3):
            assert await ask(client, BASE) == (429, ("RATE_LIMITED", "requests_per_minute_per_user"))
    assert (await ask(client, BASE, EVE))[0] == 200
    for _ in range(5):
        assert (await ask(client, BASE, ADMIN))[0] == 200
    hits = [line for line in logs if line["event"] == "limit_hit"]
    assert [(line["limit"], line["subject"]) for line in hits] == [
        ("requests_per_minute_per_user", "user ann")
    ]
    samples = await scrape(client)
    assert samples['exportd_limits_hit_total{limit="requests_per_minute_per_user"}'] == 3


async def test_a_link_counts_for_whoever_made_it(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"requests_per_minute_per_user": 3})
    package = jobs.add()
    async with client.post(f"{package.url}-link", headers=ANN) as response:
        url = (await response.json())["url"]
    assert [(await ask(client, url, {}))[0] for _ in range(3)] == [200, 200, 429]


async def test_admins_are_exempt_only_where_they_are(start: Start) -> None:
    client = await start(limits={"requests_per_minute_per_user": 1, "admins_exempt": False})
    assert [(await ask(client, BASE, ADMIN))[0] for _ in range(2)] == [200, 429]


async def test_guesses_from_one_address_are_slowed_down_and_probes_are_not(start: Start) -> None:
    client = await start(limits={"requests_per_minute_per_address": 3})
    guess = {"Authorization": "Bearer guess"}
    assert [(await ask(client, BASE, guess))[0] for _ in range(4)] == [401, 401, 401, 429]
    assert (await ask(client, "/nothing", ANN))[0] == 429
    for probe in ("/healthz", "/readyz", "/metrics"):
        assert (await ask(client, probe, {}))[0] == 200


async def test_small_ranges_of_a_package_are_slowed_down(start: Start, jobs: Jobs) -> None:
    client = await start()
    package, other = jobs.add(noise(5000)), jobs.add(noise(5000))
    refused = (429, ("RATE_LIMITED", "small_ranges_per_minute"))
    answers = await asyncio.gather(
        *(ask(client, package.url, {**ANN, "Range": f"bytes={n}-{n + 1022}"}) for n in range(200)),
        *(ask(client, package.url, {**ANN, "Range": f"bytes={n}-{n},{n + 9}-{n + 9}"}) for n in range(200)),
    )
    # One more each second.
    assert 60 <= sum(status == 206 for status, _ in answers) < 200
    assert {answer for answer in answers if answer[0] != 206} == {refused}
    for headers in (
        {**ANN, "Range": "bytes=0-1023"},
        {**ANN, "Range": "bytes=0-99,1000-1999"},
        {**ADMIN, "Range": "bytes=0-0"},
    ):
        assert (await ask(client, package.url, headers))[0] == 206
    assert (await ask(client, package.url))[0] == 200
    assert (await ask(client, other.url, {**ANN, "Range": "bytes=0-0"}))[0] == 206


async def test_only_a_trusted_proxy_reports_the_client(start: Start) -> None:
    limits = {"requests_per_minute_per_address": 1}
    client = await start(limits=limits)
    with structlog.testing.capture_logs() as logs:
        spoofed = [(await ask(client, BASE, {"X-Forwarded-For": f"203.0.113.{n}"}))[0] for n in range(3)]
    assert spoofed == [401, 429, 429]
    (warning,) = [line for line in logs if line["event"] == "proxy_not_trusted"]
    assert warning["peer"] == "127.0.0.1"
    client = await start(limits=limits, server={"trusted_proxies": ["127.0.0.1"]})
    honest = [(await ask(client, BASE, {"X-Forwarded-For": f"6.6.6.6, 203.0.113.{n}"}))[0] for n in (1, 2, 2)]
    assert honest == [401, 401, 429]
    other_field = [(await ask(client, BASE, {"Forwarded": f"for=203.0.113.{n}"}))[0] for n in (7, 8)]
    assert other_field == [401, 429]
    client = await start(
        limits=limits, server={"trusted_proxies": ["127.0.0.0/8"], "forwarded_field": "Forwarded"}
    )
    fields = [f'for="[2001:db8::{n}:1]";proto=https' for n in (1, 2)] + ["for=203.0.113.1"]
    assert [(await ask(client, BASE, {"Forwarded": field}))[0] for field in fields] == [401, 429, 401]


async def test_the_log_names_the_client_and_not_the_proxy(start: Start, jobs: Jobs) -> None:
    client = await start(server={"trusted_proxies": ["127.0.0.1"]})
    package = jobs.add()
    with structlog.testing.capture_logs() as logs:
        await ask(client, package.url, {**ANN, "X-Forwarded-For": "203.0.113.7"})
        await until_idle(client)
    assert [line["client"] for line in logs if line["event"] == "download_completed"] == ["203.0.113.7"]


class Slow:
    """A download that is held open."""

    def __init__(
        self, client: Client, package: Package, headers: dict[str, str] = ANN, **fields: str
    ) -> None:
        self._request = client.get(package.url, headers={**headers, **fields})

    async def __aenter__(self) -> int:
        self._response = await self._request
        return self._response.status

    async def __aexit__(self, *_: object) -> None:
        self._response.close()


SLOWLY = {"max_rate_bytes_per_second": 1_000_000}


async def test_a_user_downloads_so_many_packages_at_once(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"downloads_per_user": 1}, download=SLOWLY)
    package, other = jobs.add(noise(SIZE)), jobs.add(noise(SIZE))
    async with Slow(client, package) as first, Slow(client, package, Range="bytes=1000000-") as second:
        assert (first, second) == (200, 206)
        assert await ask(client, other.url) == (429, ("RATE_LIMITED", "downloads_per_user"))
        async with client.head(other.url, headers=ANN) as response:
            assert response.status == 200
        async with Slow(client, other, ADMIN) as admins:
            assert admins == 200
    await until_idle(client)
    assert (await ask(client, other.url))[0] == 200
    assert query(jobs.dsn, "SELECT count(*) FROM download_events WHERE bytes_sent = 0") == [(0,)]


async def test_all_together_download_so_many_packages_at_once(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"downloads_total": 1}, download=SLOWLY)
    package, eves = jobs.add(noise(SIZE)), jobs.add(noise(SIZE), user_id="eve")
    async with Slow(client, package):
        assert await ask(client, eves.url, EVE) == (429, ("RATE_LIMITED", "downloads_total"))
    await until_idle(client)
    assert (await ask(client, eves.url, EVE))[0] == 200


async def test_concurrent_starts_do_not_exceed_the_limit(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"downloads_per_user": 2}, download=SLOWLY)
    packages = [jobs.add(noise(SIZE)) for _ in range(10)]
    statuses = [status for status, _ in await asyncio.gather(*(ask(client, item.url) for item in packages))]
    assert statuses.count(200) <= 2
    assert set(statuses) <= {200, 429}
    await until_idle(client)
    assert (await ask(client, packages[0].url))[0] == 200


async def test_a_download_has_so_many_connections(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"connections_per_download": 2}, download=SLOWLY)
    package, other = jobs.add(noise(SIZE)), jobs.add(noise(SIZE))
    async with Slow(client, package) as first, Slow(client, package) as second:
        assert (first, second) == (200, 200)
        assert await ask(client, package.url) == (429, ("RATE_LIMITED", "connections_per_download"))
        async with Slow(client, other) as third, Slow(client, package, ADMIN) as admins:
            assert (third, admins) == (200, 200)
    await until_idle(client)
    async with Slow(client, package) as again:
        assert again == 200


async def test_a_user_follows_so_many_jobs_at_once(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"event_streams_per_user": 2})
    package = jobs.add()
    url = f"{BASE}/{package.job_id}/events"
    async with client.get(url, headers=ANN), client.get(url, headers=ANN):
        assert await ask(client, url) == (429, ("RATE_LIMITED", "event_streams_per_user"))
        async with client.get(url, headers=ADMIN) as admins:
            assert admins.status == 200
    await until_idle(client)
    async with client.get(url, headers=ANN) as again:
        assert again.status == 200


async def test_a_day_s_bytes_are_counted_by_the_ledger(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"bytes_per_user_per_day": 2 * SIZE})
    package, eves = jobs.add(noise(SIZE)), jobs.add(noise(SIZE), user_id="eve")
    for _ in range(2):
        assert await ask(client, package.url) == (200, SIZE)
        await until_idle(client)
    with structlog.testing.capture_logs() as logs:
        assert await ask(client, package.url) == (429, ("QUOTA_EXCEEDED", "bytes_per_user_per_day"))
    assert [line["event"] for line in logs] == ["limit_hit"]
    assert (await ask(client, eves.url, EVE))[0] == 200
    assert (await ask(client, package.url, ADMIN))[0] == 200
    async with client.head(package.url, headers=ANN) as response:
        assert response.status == 200
    query(
        jobs.dsn,
        "UPDATE download_events SET started_at = started_at - interval '23 hours 59 minutes'"
        " WHERE event_id = (SELECT event_id FROM download_events WHERE user_id = 'ann'"
        "                    ORDER BY started_at LIMIT 1)",
    )
    async with client.get(package.url, headers=ANN) as response:
        assert 0 < int(response.headers["Retry-After"]) <= 60
    query(jobs.dsn, "UPDATE download_events SET started_at = started_at - interval '1 minute'")
    assert (await ask(client, package.url))[0] == 200


async def test_no_link_is_made_for_a_package_that_cannot_be_downloaded(start: Start, jobs: Jobs) -> None:
    """A browser's download manager does not tell its user of a 429."""
    client = await start(limits={"bytes_per_user_per_day": SIZE, "downloads_per_user": 1}, download=SLOWLY)
    package, other = jobs.add(noise(SIZE)), jobs.add(noise(SIZE))

    async def make(package: Package) -> tuple[int, str | None]:
        async with client.post(f"{package.url}-link", headers=ANN) as response:
            return response.status, (await response.json()).get("limit")

    assert await make(package) == (201, None)
    async with Slow(client, package, Range="bytes=0-1999999"):
        assert await make(other) == (429, "downloads_per_user")
        assert await make(package) == (201, None)
    await until_idle(client)
    assert await ask(client, package.url) == (200, SIZE)
    await until_idle(client)
    assert await make(package) == (429, "bytes_per_user_per_day")


async def test_the_quota_counts_what_arrived_and_what_runs(
    start: Start, jobs: Jobs, database: Database
) -> None:
    client = await start(limits={"bytes_per_user_per_day": 1000})
    package = jobs.add(b"x" * 600)
    assert (await ask(client, package.url, {**ANN, "Range": "bytes=0-399"}))[0] == 206
    await until_idle(client)
    assert (await ask(client, package.url))[0] == 200
    await until_idle(client)
    assert (await ask(client, package.url))[0] == 429
    # What runs may take all that it asked for: 400 and 600.
    query(jobs.dsn, "UPDATE download_events SET bytes_acknowledged = 1")
    running = [event(UUID(package.job_id), outcome="running", requested=((0, size),)) for size in (400, 600)]
    await write_running(database, running)
    async with client.get(package.url, headers=ANN) as response:
        assert (response.status, response.headers["Retry-After"]) == (429, "10")
    query(jobs.dsn, "DELETE FROM exportd_running")
    assert (await ask(client, package.url))[0] == 200


async def test_a_quota_is_not_exceeded_by_asking_many_times_at_once(start: Start, jobs: Jobs) -> None:
    """By two daemons on one database; the one download that goes over the limit is the last to begin."""
    settings: dict[str, Any] = {"limits": {"bytes_per_user_per_day": 2 * SIZE + 1}, "download": SLOWLY}
    clients = [await start(**settings), await start(**settings)]
    package = jobs.add(noise(SIZE))
    answers = await asyncio.gather(*(ask(clients[number % 2], package.url) for number in range(20)))
    assert sorted(status for status, _ in answers) == [200] * 3 + [429] * 17
    for client in clients:
        await until_idle(client)
    assert query(jobs.dsn, "SELECT sum(bytes_acknowledged), count(*) FROM download_events") == [(3 * SIZE, 3)]
    assert jobs.counts(package)[0] == 3


@pytest.mark.parametrize("fields", [{}, {"Authorization": "Bearer x"}])
async def test_without_limits_nothing_is_limited(start: Start, fields: dict[str, str]) -> None:
    client = await start()
    assert {(await ask(client, BASE, fields))[0] for _ in range(700)} == {401}

"""What requests and downloads leave in ``/metrics``."""

import asyncio
import os
import uuid
from datetime import datetime, timedelta
from typing import Any

import psycopg2
import pytest
from aiohttp.test_utils import TestClient

from exportd.db.pool import DatabaseUnavailable
from exportd.delivery import cold, response
from exportd.domain.delivery import Method
from exportd.limits.limiter import Limit
from exportd.settings import LimitSettings
from exportd.web.downloads.recording import FAILURE_REASONS
from exportd.web.edge.connection import Refusal
from exportd.web.edge.lifecycle import Lifecycle
from exportd.web.ops import probes
from exportd.web.services import SERVICES
from tests.delivery.test_broken_deliveries import SIZE, connect, request_bytes, until, until_idle
from tests.support.application import ANN, BASE, EVE, Jobs, Start, noise
from tests.support.postgres import query
from tests.support.scrape import scrape

Client = TestClient[Any, Any]


def failures(samples: dict[str, float]) -> dict[str, float]:
    """The reasons that occurred."""
    name = 'exportd_downloads_failed_total{reason="'
    return {key[len(name) : -2]: value for key, value in samples.items() if key.startswith(name) and value}


async def test_a_download_is_told_from_start_to_end(client: Client, jobs: Jobs, sender: str) -> None:
    package = jobs.add(noise(3_000_001))
    async with client.get(package.url, headers=ANN) as answer:
        await answer.read()
    async with client.get(package.url, headers={**ANN, "Range": "bytes=0-99"}) as answer:
        await answer.read()
    await until_idle(client)
    found = await scrape(client)
    assert found['exportd_requests_total{route="download",status="200"}'] == 1
    assert found['exportd_requests_total{route="download",status="206"}'] == 1
    assert found["exportd_downloads_started_total"] == 2
    assert found["exportd_downloads_completed_total"] == 2
    assert found["exportd_downloads_in_flight"] == 0
    assert failures(found) == {}
    other = {"sendfile": "chunks", "chunks": "sendfile"}[sender]
    assert found[f'exportd_sent_bytes_total{{method="{sender}"}}'] == 3_000_101
    assert found[f'exportd_sent_bytes_total{{method="{other}"}}'] == 0
    assert found['exportd_download_duration_seconds_count{size="1MB_to_10MB"}'] == 1
    assert found['exportd_download_duration_seconds_count{size="under_1MB"}'] == 1
    rate = found['exportd_download_bytes_per_second_sum{size="1MB_to_10MB"}']
    assert rate == pytest.approx(
        3_000_001 / found['exportd_download_duration_seconds_sum{size="1MB_to_10MB"}'], rel=0.01
    )
    assert found['exportd_first_byte_seconds_count{route="download"}'] == 2
    assert 0 < found['exportd_first_byte_seconds_sum{route="download"}'] < 10
    assert found['exportd_ledger_flush_seconds_count{result="written"}'] == 2
    assert found["exportd_ledger_flush_events_sum"] == 2
    assert found["exportd_ledger_waiting_events"] == 0


SERIES = {
    "downloads_failed_total": ("reason", FAILURE_REASONS),
    "access_refused_total": ("reason", ("no_token", "bad_token", "bad_link", "not_permitted")),
    "sent_bytes_total": ("method", Method),
    "connections_refused_total": ("reason", Refusal),
    "limits_hit_total": ("limit", Limit),
    "cleanup_packages_total": ("result", ("deleted", "failed", "waiting")),
}


@pytest.mark.parametrize("counter", SERIES)
async def test_a_counter_has_each_of_its_series_at_0_before_anything_happened(
    start: Start, counter: str
) -> None:
    """An alert on the increase of a series that appears with its first event would miss that event."""
    found = await scrape(await start())
    label, values = SERIES[counter]
    assert {name: value for name, value in found.items() if name.startswith(f"exportd_{counter}{{")} == {
        f'exportd_{counter}{{{label}="{value}"}}': 0 for value in values
    }


def test_every_limit_of_the_settings_has_a_series() -> None:
    # Connections over their limit are closed, and counted as refused connections.
    fixed = {Limit.RE_EXPORT_AFTER_FAILURE, Limit.SMALL_RANGES_PER_MINUTE}
    assert {*Limit, "connections_per_address", "admins_exempt"} - fixed == set(LimitSettings.model_fields)


async def test_requests_are_told_by_route_and_status_and_by_nothing_of_the_client(
    client: Client, jobs: Jobs
) -> None:
    package = jobs.add()
    for path, headers in [
        (package.url, {}),
        (package.url, EVE),
        (f"{BASE}/{uuid.uuid4()}/download", ANN),
        (f"{BASE}/nonsense/download", ANN),
        (package.stats_url, ANN),
        ("/healthz", {}),
        ("/nowhere", {}),
        ("/nowhere/else", {}),
    ]:
        async with client.get(path, headers=headers) as answer:
            await answer.read()
    async with client.delete(package.url) as answer:
        await answer.read()
    async with client.head(package.url, headers=ANN) as answer:
        await answer.read()
    found = await scrape(client)
    name = "exportd_requests_total"
    assert {key: value for key, value in found.items() if key.startswith(name)} == {
        f'{name}{{route="download",status="200"}}': 1,
        f'{name}{{route="download",status="400"}}': 1,
        f'{name}{{route="download",status="401"}}': 1,
        f'{name}{{route="download",status="403"}}': 1,
        f'{name}{{route="download",status="404"}}': 1,
        f'{name}{{route="statistics",status="200"}}': 1,
        f'{name}{{route="healthz",status="200"}}': 1,
        f'{name}{{route="none",status="404"}}': 2,
        f'{name}{{route="none",status="405"}}': 1,
    }
    # Nobody downloaded anything.
    assert found["exportd_downloads_started_total"] == 0
    assert failures(found) == {}


async def test_every_route_has_a_name_of_its_own(client: Client) -> None:
    """Metrics tell routes apart by it; a route without one would be counted as none."""
    assert client.app is not None
    resources = list(client.app.router.resources())
    assert all(resource.name for resource in resources), [str(one) for one in resources if not one.name]


@pytest.mark.usefixtures("sender")
async def test_a_failure_before_the_first_byte_has_its_reason(client: Client, jobs: Jobs) -> None:
    missing, wrong, suspect = jobs.add(), jobs.add(), jobs.add(package_suspect_since="2026-01-01T00:00:00Z")
    missing.file.unlink()
    wrong.file.write_bytes(b"of another size")
    for package in (missing, wrong, suspect):
        async with client.get(package.url, headers=ANN) as answer:
            assert answer.status in (404, 500)
    found = await scrape(client)
    assert failures(found) == {"missing": 1, "unusable": 1, "suspect": 1}
    assert found["exportd_downloads_started_total"] == 0


async def test_a_running_delivery_counts_its_bytes(client: Client, jobs: Jobs, sender: str) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    await asyncio.get_running_loop().sock_sendall(connection, request_bytes(package))
    await asyncio.get_running_loop().sock_recv(connection, 1000)
    found = await scrape(client)
    assert found["exportd_downloads_in_flight"] == 1
    assert 0 < found[f'exportd_sent_bytes_total{{method="{sender}"}}'] < SIZE
    assert found['exportd_requests_total{route="download",status="200"}'] == 1
    connection.close()
    await until_idle(client)
    found = await scrape(client)
    assert found["exportd_downloads_in_flight"] == 0
    assert failures(found) == {"client_disconnected": 1}
    # Exactly what the ledger says.
    ((sent,),) = query(jobs.dsn, "SELECT bytes_sent FROM download_events")
    assert found[f'exportd_sent_bytes_total{{method="{sender}"}}'] == sent
    assert found["exportd_downloads_completed_total"] == 0
    assert not any(name.startswith("exportd_download_duration_seconds_count") for name in found)


async def test_a_client_that_stalls_has_its_reason(start: Start, jobs: Jobs) -> None:
    client = await start(download={"stall_timeout_seconds": 0.2})
    connection = await connect(client)
    await asyncio.get_running_loop().sock_sendall(connection, request_bytes(jobs.add(noise(SIZE))))
    await asyncio.get_running_loop().sock_recv(connection, 1000)
    await until_idle(client)
    connection.close()
    assert failures(await scrape(client)) == {"stalled": 1}


@pytest.mark.usefixtures("sender")
async def test_a_package_that_changes_and_a_defect_have_their_reasons(
    client: Client, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = jobs.add(noise(SIZE))
    connection = await connect(client)
    await asyncio.get_running_loop().sock_sendall(connection, request_bytes(package))
    await asyncio.get_running_loop().sock_recv(connection, 1000)
    os.truncate(package.file, SIZE - 1)
    connection.close()
    await until_idle(client)

    def fail(*_: object) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(response, "Watch", fail)
    async with client.get(jobs.add().url, headers=ANN) as answer:
        assert answer.status == 500
    found = failures(await scrape(client))
    # Whether the file or the client is met first is the kernel's choice.
    assert found in ({"changed": 1, "defect": 1}, {"client_disconnected": 1, "defect": 1})
    assert (await scrape(client))["exportd_downloads_in_flight"] == 0


@pytest.mark.usefixtures("sender")
async def test_slices_that_wait_for_the_disk_are_told_apart(
    client: Client, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = jobs.add(noise(2_000_000))
    hot, cool = ('exportd_slice_seconds_count{state="hot"}', 'exportd_slice_seconds_count{state="cold"}')
    # The first touch of a file may be refused for the access time's sake.
    for _ in range(2):
        async with client.get(package.url, headers=ANN) as answer:
            await answer.read()
    before = await scrape(client)
    async with client.get(package.url, headers=ANN) as answer:
        await answer.read()
    between = await scrape(client)
    assert between[hot] > before[hot]
    assert between.get(cool, 0) == before.get(cool, 0)
    monkeypatch.setattr(cold, "_NO_WAIT", 0)
    async with client.get(package.url, headers=ANN) as answer:
        await answer.read()
    after = await scrape(client)
    assert after[cool] >= between.get(cool, 0) + 4


async def test_the_lag_and_the_process_are_measured_all_the_time(client: Client) -> None:
    first = await scrape(client)
    await asyncio.sleep(0.25)
    second = await scrape(client)
    assert second["exportd_loop_lag_seconds_count"] > first.get("exportd_loop_lag_seconds_count", 0)
    assert second["exportd_process_open_descriptors"] > 0
    assert second['exportd_database_pool_connections{state="idle"}'] >= 1
    assert second["exportd_database_pool_limit"] == 10


async def test_packages_are_summed_by_state(client: Client, jobs: Jobs) -> None:
    past = datetime.now().astimezone() - timedelta(seconds=1)
    jobs.add(b"12345")
    jobs.add(b"1234567", package_expires_at=None)
    jobs.add(b"123", package_expires_at=past)
    jobs.add(b"1234", package_expires_at=past, package_path=None)
    jobs.add(b"1", package_suspect_since=past)
    for status in ("pending", "processing", "failed", "on hold", "lost"):
        jobs.add(b"", status=status, package_path=None, package_size_bytes=None)
    found = await scrape(client)
    name = "exportd_packages{"
    assert {key[len(name) :]: value for key, value in found.items() if key.startswith(name)} == {
        'state="available"}': 2,
        'state="expired"}': 1,
        'state="deleted"}': 1,
        'state="suspect"}': 1,
        'state="pending"}': 1,
        'state="processing"}': 1,
        'state="failed"}': 1,
        'state="other"}': 2,
    }
    assert found['exportd_package_bytes{state="available"}'] == 12
    assert found['exportd_package_bytes{state="expired"}'] == 3
    assert found['exportd_package_bytes{state="other"}'] == 0


async def test_the_table_is_read_once_a_minute(
    client: Client, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs.add()
    assert (await scrape(client))['exportd_packages{state="available"}'] == 1
    jobs.add()
    assert (await scrape(client))['exportd_packages{state="available"}'] == 1
    monkeypatch.setattr(probes, "_SUMS_KEPT_SECONDS", 0.0)
    assert (await scrape(client))['exportd_packages{state="available"}'] == 2


@pytest.mark.fresh_database
async def test_without_the_database_the_rest_is_told(
    client: Client, jobs: Jobs, dsn: str, server_dsn: str
) -> None:
    jobs.add()
    assert (await scrape(client))["exportd_database_up"] == 1
    name = psycopg2.extensions.parse_dsn(dsn)["dbname"]
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
    query(server_dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (name,))
    found = await scrape(client)
    assert found["exportd_database_up"] == 0
    assert found["exportd_downloads_started_total"] == 0
    assert not any(key.startswith("exportd_package") for key in found)
    query(server_dsn, f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    found = await scrape(client)
    assert found["exportd_database_up"] == 1
    assert found['exportd_packages{state="available"}'] == 1


async def test_sums_that_could_not_be_read_are_left_out(
    client: Client, jobs: Jobs, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await scrape(client))['exportd_packages{state="available"}'] == 0

    async def unavailable(_: object) -> None:
        raise DatabaseUnavailable("the server cancelled the statement")

    monkeypatch.setattr(probes, "_SUMS_KEPT_SECONDS", 0.0)
    monkeypatch.setattr(probes, "sum_packages", unavailable)
    found = await scrape(client)
    assert found["exportd_database_up"] == 1
    assert not any(key.startswith("exportd_package") for key in found)


async def test_a_scrape_that_waits_does_not_hold_up_the_end(
    client: Client, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_SCRAPE_TIMEOUT_SECONDS", 0.05)
    with psycopg2.connect(dsn) as blocker:
        blocker.cursor().execute("LOCK TABLE export_jobs IN ACCESS EXCLUSIVE MODE")
        await scrape(client)
        async with asyncio.timeout(5):  # the statement itself would wait for ten
            await client.close()
        blocker.rollback()
    blocker.close()


async def test_requests_rejected_before_the_edge_are_not_counted(client: Client) -> None:
    async with client.get("/healthz", headers={"Expect": "the unexpected"}) as answer:
        assert answer.status == 417
    assert not any(key.startswith("exportd_requests_total") for key in await scrape(client))


async def test_a_table_that_is_locked_holds_up_no_scrape(
    client: Client, jobs: Jobs, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes, "_SCRAPE_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(probes, "_SUMS_KEPT_SECONDS", 0.0)
    jobs.add()
    with psycopg2.connect(dsn) as blocker:
        blocker.cursor().execute("LOCK TABLE export_jobs IN ACCESS EXCLUSIVE MODE")
        for _ in range(3):
            found = await scrape(client)
            assert found["exportd_database_up"] == 1
            assert 'exportd_packages{state="available"}' not in found
        # However often somebody asks, one statement waits.
        waiting = "datname = current_database() AND wait_event_type = 'Lock'"
        assert query(dsn, f"SELECT count(*) FROM pg_stat_activity WHERE {waiting}") == [(1,)]
        blocker.rollback()
    blocker.close()
    assert client.app is not None
    probe = client.app[SERVICES].database_probe
    await until("the sums", lambda: probe.packages)
    assert (await scrape(client))['exportd_packages{state="available"}'] == 1


async def test_a_drain_can_be_watched(client: Client) -> None:
    assert client.app is not None
    lifecycle: Lifecycle = client.app[SERVICES].lifecycle
    lifecycle.is_draining = True
    assert (await scrape(client))["exportd_downloads_in_flight"] == 0


async def test_the_answer_is_the_text_that_prometheus_reads(client: Client) -> None:
    async with client.get("/metrics") as answer:
        assert answer.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert answer.headers["Cache-Control"] == "no-store"

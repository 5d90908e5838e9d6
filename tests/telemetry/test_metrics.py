"""What is noted comes out as Prometheus expects it."""

import asyncio
import contextlib
import time
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from exportd.telemetry import metrics
from exportd.telemetry.lag import watch_lag
from exportd.telemetry.metrics import Metrics, forget_dead_processes, shared_metrics
from tests.support.scrape import samples_of

NOTHING = {"waiting_events": 0, "spooled_events": 0, "pool_in_use": 0, "pool_idle": 0, "pool_limit": 0}


def shown(noted: Metrics, packages: dict[str, tuple[int, int]] | None = None) -> dict[str, float]:
    noted.flush(**NOTHING)
    return samples_of(noted.exposition(database_is_up=True, packages=packages).decode())


@pytest.fixture
def noted() -> Metrics:
    return Metrics(["missing", "stalled"], ["sendfile", "chunks"], [], [])


def test_a_distribution_says_what_the_library_would(noted: Metrics) -> None:
    """Below, on and above every bound."""
    bounds = metrics._LAGS
    amounts = [0.0, *(bound * factor for bound in bounds for factor in (0.99, 1, 1.01)), 1000.0]
    registry = CollectorRegistry()
    expected = Histogram("exportd_loop_lag_seconds", "x", registry=registry, buckets=bounds)
    for turn in range(2):  # a flush must leave nothing behind for the next
        for amount in amounts:
            noted.loop_was_late(amount)
            expected.observe(amount)
        found = {name: value for name, value in shown(noted).items() if name.startswith("exportd_loop_lag")}
        assert found == pytest.approx(samples_of(generate_latest(registry).decode())), turn


def test_what_is_flushed_twice_is_counted_once(noted: Metrics) -> None:
    noted.bytes_sent("chunks", 70)
    noted.bytes_sent("chunks", 7)
    noted.request_answered("download", 206, 0.5)
    assert shown(noted)['exportd_sent_bytes_total{method="chunks"}'] == 77
    again = shown(noted)
    assert again['exportd_sent_bytes_total{method="chunks"}'] == 77
    assert again['exportd_requests_total{route="download",status="206"}'] == 1
    assert again['exportd_first_byte_seconds_sum{route="download"}'] == 0.5


def test_every_reason_and_method_is_there_before_it_happens(noted: Metrics) -> None:
    found = shown(noted)
    assert [
        found[f'exportd_downloads_failed_total{{reason="{name}"}}'] for name in ("missing", "stalled")
    ] == [0, 0]
    assert [found[f'exportd_sent_bytes_total{{method="{name}"}}'] for name in ("sendfile", "chunks")] == [
        0,
        0,
    ]


def test_a_delivery_is_in_flight_until_it_ends(noted: Metrics) -> None:
    for _ in range(3):
        noted.download_started()
    assert shown(noted)["exportd_downloads_in_flight"] == 3
    noted.download_completed("under_1MB", 200_000, 0.5)
    noted.download_failed("stalled")
    noted.download_refused("missing")
    found = shown(noted)
    assert found["exportd_downloads_in_flight"] == 1
    assert found["exportd_downloads_started_total"] == 3
    assert found["exportd_downloads_completed_total"] == 1
    assert found['exportd_downloads_failed_total{reason="stalled"}'] == 1
    assert found['exportd_downloads_failed_total{reason="missing"}'] == 1
    assert found['exportd_download_duration_seconds_bucket{le="0.3",size="under_1MB"}'] == 0
    assert found['exportd_download_duration_seconds_bucket{le="1.0",size="under_1MB"}'] == 1
    assert found['exportd_download_bytes_per_second_sum{size="under_1MB"}'] == 400_000


def test_durations_reach_from_a_tenth_of_a_second_to_half_a_day(noted: Metrics) -> None:
    noted.download_started()
    noted.download_completed("over_1GB", 10**12, 43_200)
    found = shown(noted)
    assert found['exportd_download_duration_seconds_bucket{le="0.1",size="over_1GB"}'] == 0
    assert found['exportd_download_duration_seconds_bucket{le="43200.0",size="over_1GB"}'] == 1


def test_how_things_stand_is_what_was_last_told(noted: Metrics) -> None:
    noted.flush(waiting_events=9, spooled_events=9, pool_in_use=3, pool_idle=1, pool_limit=10)
    noted.flush(waiting_events=5, spooled_events=5, pool_in_use=2, pool_idle=4, pool_limit=10)
    found = samples_of(noted.exposition(database_is_up=False, packages=None).decode())
    assert found["exportd_ledger_waiting_events"] == 5
    assert found["exportd_spool_events"] == 5
    assert found['exportd_database_pool_connections{state="in_use"}'] == 2
    assert found['exportd_database_pool_connections{state="idle"}'] == 4
    assert found["exportd_database_pool_limit"] == 10
    assert found["exportd_database_up"] == 0


def test_packages_are_told_only_while_they_are_known(noted: Metrics) -> None:
    found = shown(noted, {"available": (3, 700), "deleted": (0, 0)})
    assert found['exportd_packages{state="available"}'] == 3
    assert found['exportd_package_bytes{state="available"}'] == 700
    assert found['exportd_packages{state="deleted"}'] == 0
    assert found["exportd_database_up"] == 1
    assert not any(name.startswith("exportd_package") for name in shown(noted))


def test_the_process_is_measured(noted: Metrics) -> None:
    before = shown(noted)["exportd_process_cpu_seconds_total"]
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    noted.measure_process()
    found = shown(noted)
    assert found["exportd_process_cpu_seconds_total"] - before >= 0.05
    assert found["exportd_process_resident_memory_bytes"] > 10_000_000
    count = len(list(Path("/proc/self/fd").iterdir()))
    assert abs(found["exportd_process_open_descriptors"] - count) <= 2
    assert found["exportd_process_descriptor_limit"] > count
    assert (found["exportd_processes"], found["exportd_process_starts_total"]) == (1, 1)


def test_shed_lines_are_counted_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shed = 100
    monkeypatch.setattr(metrics, "shed_lines", lambda: shed)
    noted = Metrics([], [], [], [])
    assert shown(noted)["exportd_log_lines_shed_total"] == 0
    shed = 107
    assert shown(noted)["exportd_log_lines_shed_total"] == 7
    assert shown(noted)["exportd_log_lines_shed_total"] == 7


def test_two_applications_do_not_meet(noted: Metrics) -> None:
    other = Metrics([], [], [], [])
    noted.download_started()
    assert shown(other)["exportd_downloads_in_flight"] == 0


async def test_a_loop_that_is_held_up_is_seen_to_be_late() -> None:
    seen: list[float] = []
    late = asyncio.Event()

    def observe(seconds: float) -> None:
        seen.append(seconds)
        late.set()

    task = asyncio.create_task(watch_lag(observe))
    await late.wait()
    late.clear()
    await asyncio.sleep(0)  # the watch sleeps again
    time.sleep(0.4)
    await late.wait()
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert min(seen) >= 0
    assert 0.25 < seen[-1] < 5


@pytest.fixture
def sharing(monkeypatch: pytest.MonkeyPatch) -> object:
    """The state of a process that shares is put back."""
    monkeypatch.setattr(metrics, "_slot", None)
    monkeypatch.setattr(metrics, "_shared_folder", None)
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.MutexValue)
    return monkeypatch


def test_a_shared_folder_lasts_as_long_as_its_block(sharing: object) -> None:
    with shared_metrics():
        folder = metrics._shared_folder
        assert folder is not None
        assert folder.stat().st_mode & 0o077 == 0
        noted = Metrics([], ["chunks"], [], [])
        noted.bytes_sent("chunks", 5)
        noted.download_started()
        forget_dead_processes()  # this one lives
        found = shown(noted)
        assert found['exportd_sent_bytes_total{method="chunks"}'] == 5
        assert found["exportd_downloads_in_flight"] == 1
        assert found["exportd_database_up"] == 1
    assert not folder.exists()
    assert metrics._shared_folder is None

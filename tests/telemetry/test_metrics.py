"""What is measured comes out as Prometheus expects it."""

import asyncio
import contextlib
import os
import time
from pathlib import Path

import prometheus_client
import pytest
from prometheus_client import CollectorRegistry, Histogram, generate_latest

from exportd.telemetry import metrics
from exportd.telemetry.lag import watch_lag
from exportd.telemetry.metrics import Metrics
from exportd.telemetry.shared_metrics import SharedMetrics
from tests.support.scrape import samples_of

NOTHING = {"waiting_events": 0, "spooled_events": 0, "pool_in_use": 0, "pool_idle": 0, "pool_limit": 0}


def shown(measured: Metrics, packages: dict[str, tuple[int, int]] | None = None) -> dict[str, float]:
    measured.flush(**NOTHING)
    return samples_of(measured.exposition(database_is_up=True, packages=packages).decode())


@pytest.fixture
def measured() -> Metrics:
    return Metrics(
        {"downloads_failed_total": ["missing", "stalled"], "sent_bytes_total": ["sendfile", "chunks"]}
    )


def test_a_distribution_says_what_the_library_would(measured: Metrics) -> None:
    """Below, on and above every bound."""
    bounds = metrics._LAGS
    amounts = [0.0, *(bound * factor for bound in bounds for factor in (0.99, 1, 1.01)), 1000.0]
    registry = CollectorRegistry()
    expected = Histogram("exportd_loop_lag_seconds", "x", registry=registry, buckets=bounds)
    for turn in range(2):  # a flush must leave nothing behind for the next
        for amount in amounts:
            measured.loop_was_late(amount)
            expected.observe(amount)
        found = {
            name: value for name, value in shown(measured).items() if name.startswith("exportd_loop_lag")
        }
        assert found == pytest.approx(samples_of(generate_latest(registry).decode())), turn


def test_a_second_flush_counts_nothing_again(measured: Metrics) -> None:
    measured.bytes_sent("chunks", 70)
    measured.bytes_sent("chunks", 7)
    measured.request_answered("download", 206, 0.5)
    assert shown(measured)['exportd_sent_bytes_total{method="chunks"}'] == 77
    again = shown(measured)
    assert again['exportd_sent_bytes_total{method="chunks"}'] == 77
    assert again['exportd_requests_total{route="download",status="206"}'] == 1
    assert again['exportd_first_byte_seconds_sum{route="download"}'] == 0.5


def test_every_reason_and_method_is_there_before_it_happens(measured: Metrics) -> None:
    found = shown(measured)
    assert [
        found[f'exportd_downloads_failed_total{{reason="{name}"}}'] for name in ("missing", "stalled")
    ] == [0, 0]
    assert [found[f'exportd_sent_bytes_total{{method="{name}"}}'] for name in ("sendfile", "chunks")] == [
        0,
        0,
    ]


def test_a_delivery_is_in_flight_until_it_ends(measured: Metrics) -> None:
    for _ in range(3):
        measured.download_started()
    assert shown(measured)["exportd_downloads_in_flight"] == 3
    measured.download_completed("under_1MB", 200_000, 0.5)
    measured.download_failed("stalled")
    measured.download_refused("missing")
    found = shown(measured)
    assert found["exportd_downloads_in_flight"] == 1
    assert found["exportd_downloads_started_total"] == 3
    assert found["exportd_downloads_completed_total"] == 1
    assert found['exportd_downloads_failed_total{reason="stalled"}'] == 1
    assert found['exportd_downloads_failed_total{reason="missing"}'] == 1
    assert found['exportd_download_duration_seconds_bucket{le="0.3",size="under_1MB"}'] == 0
    assert found['exportd_download_duration_seconds_bucket{le="1.0",size="under_1MB"}'] == 1
    assert found['exportd_download_bytes_per_second_sum{size="under_1MB"}'] == 400_000


def test_durations_reach_from_a_tenth_of_a_second_to_half_a_day(measured: Metrics) -> None:
    measured.download_started()
    measured.download_completed("over_1GB", 10**12, 43_200)
    found = shown(measured)
    assert found['exportd_download_duration_seconds_bucket{le="0.1",size="over_1GB"}'] == 0
    assert found['exportd_download_duration_seconds_bucket{le="43200.0",size="over_1GB"}'] == 1


def test_gauges_have_the_values_of_the_last_flush(measured: Metrics) -> None:
    measured.flush(waiting_events=9, spooled_events=9, pool_in_use=3, pool_idle=1, pool_limit=10)
    measured.flush(waiting_events=5, spooled_events=5, pool_in_use=2, pool_idle=4, pool_limit=10)
    found = samples_of(measured.exposition(database_is_up=False, packages=None).decode())
    assert found["exportd_ledger_waiting_events"] == 5
    assert found["exportd_spool_events"] == 5
    assert found['exportd_database_pool_connections{state="in_use"}'] == 2
    assert found['exportd_database_pool_connections{state="idle"}'] == 4
    assert found["exportd_database_pool_limit"] == 10
    assert found["exportd_database_up"] == 0


def test_packages_are_told_only_while_they_are_known(measured: Metrics) -> None:
    found = shown(measured, {"available": (3, 700), "deleted": (0, 0)})
    assert found['exportd_packages{state="available"}'] == 3
    assert found['exportd_package_bytes{state="available"}'] == 700
    assert found['exportd_packages{state="deleted"}'] == 0
    assert found["exportd_database_up"] == 1
    assert not any(name.startswith("exportd_package") for name in shown(measured))


def test_the_process_is_measured(measured: Metrics) -> None:
    before = shown(measured)["exportd_process_cpu_seconds_total"]
    until = time.process_time() + 0.05
    while time.process_time() < until:
        pass
    measured.measure_process()
    found = shown(measured)
    assert found["exportd_process_cpu_seconds_total"] - before >= 0.05
    assert found["exportd_process_resident_memory_bytes"] > 10_000_000
    count = len(list(Path("/proc/self/fd").iterdir()))
    assert abs(found["exportd_process_open_descriptors"] - count) <= 2
    assert found["exportd_process_descriptor_limit"] > count
    assert (found["exportd_processes"], found["exportd_process_starts_total"]) == (1, 1)


def test_shed_lines_are_counted_from_the_start_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    shed = 100
    monkeypatch.setattr(metrics, "shed_lines", lambda: shed)
    measured = Metrics({})
    assert shown(measured)["exportd_log_lines_shed_total"] == 0
    shed = 107
    assert shown(measured)["exportd_log_lines_shed_total"] == 7
    assert shown(measured)["exportd_log_lines_shed_total"] == 7


def test_two_applications_share_no_metrics(measured: Metrics) -> None:
    other = Metrics({})
    measured.download_started()
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


def test_shared_metrics_last_until_their_parent_removes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prometheus_client.values, "ValueClass", prometheus_client.values.MutexValue)
    shared = SharedMetrics()
    assert shared.folder.stat().st_mode & 0o077 == 0
    measured = Metrics({"sent_bytes_total": ["chunks"]}, shared)
    measured.bytes_sent("chunks", 5)
    measured.download_started()
    shared.forget_dead_processes()  # this one lives
    found = shown(measured)
    assert found['exportd_sent_bytes_total{method="chunks"}'] == 5
    assert found["exportd_downloads_in_flight"] == 1
    assert found["exportd_database_up"] == 1
    if (child := os.fork()) == 0:
        shared.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert shared.folder.exists()
    shared.remove()
    assert not shared.folder.exists()
    assert "PROMETHEUS_MULTIPROC_DIR" not in os.environ

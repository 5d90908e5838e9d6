"""``/metrics`` of the running command: one process and several, in a drain, and after deaths."""

import http.client
import os
import resource
import signal
from pathlib import Path

import pytest

from tests.integration.test_main_job import SlowDownload, get, path_of
from tests.integration.test_workers import large_source, worker_at, workers_of
from tests.support.application import ANN
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.scrape import samples_of

__all__ = ["large_source"]


def scrape(daemon: Daemon) -> dict[str, float]:
    status, body = get(daemon, "/metrics", {})
    assert status == 200
    return samples_of(body.decode())


def scrape_each(daemon: Daemon) -> list[dict[str, float]]:
    """What each of two workers says."""
    said: dict[int, dict[str, float]] = {}

    def both() -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
        connection.request("GET", "/metrics")
        # While the connection is open it shows whose it is.
        body = connection.getresponse().read().decode()
        pid = worker_at(daemon, connection)
        connection.close()
        if pid is not None:
            said[pid] = samples_of(body)
        return len(said) == 2

    wait_for("an answer of each worker", both)
    return list(said.values())


def download_by_both(daemon: Daemon, published: dict[str, object]) -> int:
    """Downloads 1000 bytes at a time until each of two workers has served some; how many that took."""
    count = 0
    served: set[object] = set()
    while len(served) < 2:
        connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
        connection.request("GET", path_of(published), headers={**ANN, "Range": "bytes=0-999"})
        assert len(connection.getresponse().read()) == 1000
        served.add(worker_at(daemon, connection))
        connection.close()
        count += 1
    return count


def wait_for_workers(daemon: Daemon) -> set[int]:
    workers: set[int] = wait_for(
        "two workers", lambda: workers_of(daemon) if len(workers_of(daemon)) == 2 else None
    )
    return workers


def test_one_process_reports_its_metrics(exportd: Exportd, source: Path) -> None:
    published = exportd.publish(source)
    # What another program of the environment shares is not ours.
    daemon = exportd.serve(PROMETHEUS_MULTIPROC_DIR="/nowhere")
    for _ in range(3):
        assert get(daemon, path_of(published))[0] == 200
    found = scrape(daemon)
    assert found["exportd_downloads_completed_total"] == 3
    assert found['exportd_sent_bytes_total{method="sendfile"}'] == 3 * published["packageSizeBytes"]
    assert found['exportd_packages{state="available"}'] == 1
    assert found['exportd_package_bytes{state="available"}'] == published["packageSizeBytes"]
    assert found["exportd_processes"] == 1
    assert found["exportd_log_lines_shed_total"] == 0


def test_a_drain_is_told_on_an_open_connection(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve()
    slow = SlowDownload(daemon, published)
    watcher = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    watcher.request("GET", "/healthz")
    watcher.getresponse().read()
    daemon.process.send_signal(signal.SIGTERM)
    daemon.wait_for_event("server_draining")
    watcher.request("GET", "/metrics")
    assert samples_of(watcher.getresponse().read().decode())["exportd_downloads_in_flight"] == 1
    slow.finish()
    assert daemon.process.wait(60) == 0


def test_any_worker_answers_for_all(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve("--workers", 2)
    count = download_by_both(daemon, published)
    slow = [SlowDownload(daemon, published) for _ in range(5)]

    def agreed() -> list[dict[str, float]] | None:
        each = scrape_each(daemon)
        names = ("exportd_downloads_completed_total", "exportd_downloads_in_flight")
        return each if all([one[name] for name in names] == [count, 5] for one in each) else None

    for found in wait_for("the same from both", agreed):
        assert found["exportd_processes"] == 2
        assert found["exportd_process_starts_total"] == 2
        assert found['exportd_sent_bytes_total{method="sendfile"}'] > 1000 * count
        assert found['exportd_requests_total{route="download",status="206"}'] == count
        assert found["exportd_ledger_flush_events_sum"] == count
        flushes = found["exportd_ledger_flush_events_count"]
        assert 0 < flushes <= count
        assert flushes == found['exportd_ledger_flush_events_bucket{le="+Inf"}']
        assert found["exportd_database_pool_limit"] == 20
        # One answer, and not one for each process.
        assert found["exportd_database_up"] == 1
        assert found['exportd_packages{state="available"}'] == 1
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The daemon raises its own as far as it may.
        assert found["exportd_process_descriptor_limit"] == max(soft, min(hard, 65536))
    for one in slow:
        one.connection.close()
    assert daemon.stop() == 0


def test_any_worker_reports_the_metrics_of_all_workers(exportd: Exportd, source: Path) -> None:
    published = exportd.publish(source)
    daemon = exportd.serve("--workers", 2)
    watcher = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)

    def scrape_here() -> dict[str, float]:
        watcher.request("GET", "/metrics")
        return samples_of(watcher.getresponse().read().decode())

    scrape_here()
    count = download_by_both(daemon, published)
    wait_for("the sum", lambda: scrape_here()["exportd_downloads_completed_total"] == count)
    watcher.close()
    assert daemon.stop() == 0


def test_counts_of_a_dead_worker_stay_and_its_gauges_go(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve("--workers", 2)
    before = wait_for_workers(daemon)
    count = download_by_both(daemon, published)
    slow = [SlowDownload(daemon, published) for _ in range(6)]
    wait_for("six downloads", lambda: scrape(daemon)["exportd_downloads_in_flight"] == 6)
    wait_for("all counts", lambda: scrape(daemon)["exportd_downloads_completed_total"] == count)
    for victim in before:
        os.kill(victim, signal.SIGKILL)
    wait_for("two others", lambda: not wait_for_workers(daemon) & before)
    wait_for("their start", lambda: scrape(daemon)["exportd_process_starts_total"] == 4)
    found = scrape(daemon)
    assert found["exportd_downloads_in_flight"] == 0
    assert found["exportd_processes"] == 2
    assert found["exportd_downloads_completed_total"] == count
    assert found["exportd_downloads_started_total"] == count + 6
    more = download_by_both(daemon, published)
    wait_for("the sum", lambda: scrape(daemon)["exportd_downloads_completed_total"] == count + more)
    for one in slow:
        one.connection.close()
    assert daemon.stop() == 0


@pytest.mark.slow
def test_reloads_leave_no_file_behind(exportd: Exportd, large_source: Path, tmp_path: Path) -> None:
    published = exportd.publish(large_source)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    daemon = exportd.serve("--workers", 2, TMPDIR=str(temporary))
    before = wait_for_workers(daemon)
    total = download_by_both(daemon, published)
    (folder,) = temporary.glob("exportd-metrics-*")
    for turn in range(1, 5):
        daemon.process.send_signal(signal.SIGHUP)
        wait_for("new workers", lambda old=before: not wait_for_workers(daemon) & old)
        before = wait_for_workers(daemon)
        total += download_by_both(daemon, published)
        wait_for("the sum", lambda: scrape(daemon)["exportd_downloads_completed_total"] == total)  # noqa: B023
        wait_for("two processes", lambda: scrape(daemon)["exportd_processes"] == 2)
        assert scrape(daemon)["exportd_process_starts_total"] == 2 + 2 * turn
    # Never more than two old and two new at a time.
    assert len(list(folder.glob("*.lock"))) <= 4
    assert len(list(folder.glob("counter_*.db"))) <= 4
    assert len(list(folder.glob("gauge_*.db"))) <= 4
    assert daemon.stop() == 0
    assert list(temporary.iterdir()) == []

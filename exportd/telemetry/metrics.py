"""Metrics for Prometheus. docs/operations.md describes each one.

No label holds a user, a job, a path or another value that a client can choose: every series costs memory for
as long as the daemon runs.
"""

import contextlib
import platform
import resource
import time
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client import generate_latest as render
from prometheus_client import values as value_classes
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4 as CONTENT_TYPE
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from exportd import __version__
from exportd.telemetry.logging import shed_lines
from exportd.telemetry.shared_metrics import SharedMetrics

__all__ = ["CONTENT_TYPE", "Metrics"]

# It would add an unused series to each counter and histogram.
disable_created_metrics()

_HOUR = 3600
_DURATIONS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, _HOUR, 3 * _HOUR, 6 * _HOUR, 12 * _HOUR)
_RATES = tuple(step * 10**power for power in range(4, 10) for step in (1, 3))
_FIRST_BYTES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLICES = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_LAGS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_FLUSHES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_GROUPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)

# Name (after exportd_), meaning, labels.
_COUNTERS = (
    ("requests_total", "Requests answered", ("route", "status")),
    ("downloads_started_total", "Deliveries begun", ()),
    ("downloads_completed_total", "Deliveries of every byte asked for", ()),
    ("downloads_failed_total", "Downloads that failed", ("reason",)),
    ("access_refused_total", "Requests refused for want of a right", ("reason",)),
    ("sent_bytes_total", "Bytes of packages sent", ("method",)),
    ("connections_refused_total", "Connections closed for what came over them, or did not", ("reason",)),
    ("limits_hit_total", "Requests refused because of a limit", ("limit",)),
    ("cleanup_packages_total", "Expired packages that cleanups met", ("result",)),
    ("cleanup_freed_bytes_total", "Bytes that cleanups freed", ()),
    ("log_lines_shed_total", "Log lines that could not be written", ()),
    ("process_starts_total", "Processes started, replaced ones too", ()),
    ("process_cpu_seconds_total", "Processor time used", ()),
)
# Name, meaning, labels, upper bounds of the buckets.
_HISTOGRAMS = (
    ("first_byte_seconds", "From a request's arrival to its answer's first byte", ("route",), _FIRST_BYTES),
    ("download_duration_seconds", "Duration of completed deliveries", ("size",), _DURATIONS),
    ("download_bytes_per_second", "Throughput of completed deliveries", ("size",), _RATES),
    ("slice_seconds", "Time that one slice of a package took", ("state",), _SLICES),
    ("loop_lag_seconds", "How late the event loop was", (), _LAGS),
    ("ledger_flush_seconds", "Duration of one statement that writes events", ("result",), _FLUSHES),
    ("ledger_flush_events", "Events in one such statement", (), _GROUPS),
)
# Name, meaning, labels, and how the values of several processes become one. The limits are the same for each
# process.
_GAUGES: tuple[tuple[str, str, tuple[str, ...], Literal["livesum", "livemax"]], ...] = (
    ("cleanup_finished_timestamp_seconds", "When the last cleanup went to its end", (), "livemax"),
    ("downloads_in_flight", "Deliveries under way", (), "livesum"),
    ("ledger_waiting_events", "Download events not yet written", (), "livesum"),
    ("spool_events", "Download events that wait for the database", (), "livesum"),
    ("database_pool_connections", "Connections to the database", ("state",), "livesum"),
    ("database_pool_limit", "The most connections there may be", (), "livesum"),
    ("processes", "Processes that serve", (), "livesum"),
    ("process_resident_memory_bytes", "Resident memory", (), "livesum"),
    ("process_open_descriptors", "File descriptors of the process that has most", (), "livemax"),
    ("process_descriptor_limit", "The most file descriptors a process may have", (), "livemax"),
)
# The values of labels that telemetry itself defines.
_VALUES: Mapping[str, Iterable[str]] = {
    "access_refused_total": ("no_token", "bad_token", "bad_link", "not_permitted"),
    "cleanup_packages_total": ("deleted", "failed", "waiting"),
    "slice_seconds": ("hot", "cold"),
    "ledger_flush_seconds": ("written", "failed"),
}


class _Counts:
    """A counter, by the values of its labels.

    Counts in plain numbers until ``flush``. The library's counters, with a lock and with files between
    processes, cost several times as much, and a download counts each of its slices.
    """

    def __init__(self, counter: Counter) -> None:
        self._counter = counter
        self._pending: dict[tuple[str, ...], float] = {}

    def add(self, *labels: str, amount: float = 1) -> None:
        self._pending[labels] = self._pending.get(labels, 0) + amount

    def flush(self) -> None:
        for labels, amount in self._pending.items():
            (self._counter.labels(*labels) if labels else self._counter).inc(amount)
        self._pending.clear()


class _Distribution:
    """A histogram, like ``_Counts``."""

    def __init__(self, histogram: Histogram, bounds: Sequence[float]) -> None:
        self._histogram = histogram
        self._bounds = bounds
        # The count of each bucket, and last the sum.
        self._pending: dict[tuple[str, ...], list[float]] = {}

    def observe(self, amount: float, *labels: str) -> None:
        pending = self._pending.get(labels)
        if pending is None:
            pending = self._pending[labels] = [0] * (len(self._bounds) + 2)
        pending[bisect_left(self._bounds, amount)] += 1
        pending[-1] += amount

    def flush(self) -> None:
        for labels, (*counts, total) in self._pending.items():
            histogram = self._histogram.labels(*labels) if labels else self._histogram
            # The library has no public method to observe many values at once.
            for bucket, count in zip(histogram._buckets, counts, strict=True):
                if count:
                    bucket.inc(count)
            histogram._sum.inc(total)
        self._pending.clear()


class Metrics:
    """The metrics of one application, or of one process among those of ``shared``. Used in the event loop.

    ``values`` lists the values of the label of a counter, by its name. Each series then exists at 0 from the
    start: an alert would miss the first failure if it created the series. ``exposition`` lacks what was
    counted since the last ``flush``.
    """

    def __init__(self, values: Mapping[str, Iterable[str]], shared: SharedMetrics | None = None) -> None:
        self._registry = CollectorRegistry()
        registry = None
        if shared is None:
            value_classes.ValueClass = value_classes.MutexValue
            registry = self._registry
        else:
            number = shared.own_number()
            value_classes.ValueClass = value_classes.MultiProcessValue(lambda: number)
            MultiProcessCollector(self._registry, str(shared.folder))
        self._snapshot = _Snapshot()
        self._registry.register(self._snapshot)

        values = {**_VALUES, **values}
        self._counts: dict[str, _Counts] = {}
        for name, meaning, labels in _COUNTERS:
            counter = Counter(f"exportd_{name}", meaning, labels, registry=registry)
            for value in values.get(name, ()):
                counter.labels(value)
            self._counts[name] = _Counts(counter)
        self._distributions: dict[str, _Distribution] = {}
        for name, meaning, labels, bounds in _HISTOGRAMS:
            histogram = Histogram(f"exportd_{name}", meaning, labels, registry=registry, buckets=bounds)
            for value in values.get(name, ()):
                histogram.labels(value)
            self._distributions[name] = _Distribution(histogram, bounds)
        self._gauges = {
            name: Gauge(f"exportd_{name}", meaning, labels, registry=registry, multiprocess_mode=mode)
            for name, meaning, labels, mode in _GAUGES
        }

        self._under_way = 0
        # A forked process inherits its parent's number.
        self._shed_before = shed_lines()
        self._cpu_before = 0.0
        self._gauges["processes"].set(1)
        self._count("process_starts_total")

    def request_answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a response whose headers are sent, ``seconds`` after its request was received."""
        self._count("requests_total", route, str(status))
        self._observe("first_byte_seconds", seconds, route)

    def download_refused(self, reason: str) -> None:
        """Counts a download that failed before its delivery began."""
        self._count("downloads_failed_total", reason)

    def access_refused(self, reason: Literal["no_token", "bad_token", "bad_link", "not_permitted"]) -> None:
        """Counts a request without a valid token or link, or without permission."""
        self._count("access_refused_total", reason)

    def connection_refused(self, reason: str) -> None:
        """Counts a connection that the server closed."""
        self._count("connections_refused_total", reason)

    def limit_hit(self, limit: str) -> None:
        """Counts a request over a limit."""
        self._count("limits_hit_total", limit)

    def download_started(self) -> None:
        """Counts the start of a delivery. ``download_completed`` or ``download_failed`` must follow."""
        self._count("downloads_started_total")
        self._under_way += 1

    def download_completed(self, size: str, size_bytes: int, seconds: float) -> None:
        """Counts a complete delivery. ``size`` is its range of sizes."""
        self._under_way -= 1
        self._count("downloads_completed_total")
        self._observe("download_duration_seconds", seconds, size)
        self._observe("download_bytes_per_second", size_bytes / max(seconds, 1e-6), size)

    def download_failed(self, reason: str) -> None:
        """Counts a delivery that ended before its last byte."""
        self._under_way -= 1
        self._count("downloads_failed_total", reason)

    def bytes_sent(self, method: str, count: int) -> None:
        """Counts sent bytes during a delivery, which may take hours."""
        self._count("sent_bytes_total", method, amount=count)

    def slice_sent(self, seconds: float, is_cold: bool) -> None:
        """Records the duration of sending or reading one slice."""
        self._observe("slice_seconds", seconds, "cold" if is_cold else "hot")

    def loop_was_late(self, seconds: float) -> None:
        """Records the lag of the event loop."""
        self._observe("loop_lag_seconds", seconds)

    def events_flushed(self, count: int, seconds: float, is_written: bool) -> None:
        """Counts the events of one statement of the ledger."""
        self._observe("ledger_flush_seconds", seconds, "written" if is_written else "failed")
        self._observe("ledger_flush_events", count)

    def cleanup_finished(self, deleted: int, failed: int, waiting: int, freed_bytes: int) -> None:
        """Counts a complete cleanup of this process."""
        for result, count in zip(("deleted", "failed", "waiting"), (deleted, failed, waiting), strict=True):
            self._count("cleanup_packages_total", result, amount=count)
        self._count("cleanup_freed_bytes_total", amount=freed_bytes)
        self.cleanup_was_finished(datetime.now(UTC))

    def cleanup_was_finished(self, at: datetime) -> None:
        """Sets when the last complete cleanup of any daemon finished."""
        self._gauges["cleanup_finished_timestamp_seconds"].set(at.timestamp())

    def flush(
        self,
        *,
        waiting_events: int,
        spooled_events: int,
        pool_in_use: int,
        pool_idle: int,
        pool_limit: int,
    ) -> None:
        """Writes the counts and the present state to where ``exposition`` of every process reads them."""
        shed = shed_lines()
        self._count("log_lines_shed_total", amount=max(0, shed - self._shed_before))
        self._shed_before = shed
        for counts in self._counts.values():
            counts.flush()
        for distribution in self._distributions.values():
            distribution.flush()
        self._gauges["downloads_in_flight"].set(self._under_way)
        self._gauges["ledger_waiting_events"].set(waiting_events)
        self._gauges["spool_events"].set(spooled_events)
        self._gauges["database_pool_connections"].labels("in_use").set(pool_in_use)
        self._gauges["database_pool_connections"].labels("idle").set(pool_idle)
        self._gauges["database_pool_limit"].set(pool_limit)

    def measure_process(self) -> None:
        """Measures this process."""
        used = time.process_time()
        self._count("process_cpu_seconds_total", amount=used - self._cpu_before)
        self._cpu_before = used
        self._gauges["process_descriptor_limit"].set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        # Linux only. Elsewhere both stay at 0.
        with contextlib.suppress(FileNotFoundError):
            self._gauges["process_open_descriptors"].set(sum(1 for _ in Path("/proc/self/fd").iterdir()))
            resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._gauges["process_resident_memory_bytes"].set(resident_pages * resource.getpagesize())

    def exposition(self, *, database_is_up: bool, packages: Mapping[str, tuple[int, int]] | None) -> bytes:
        """Returns the metrics of all processes as text. ``packages``: number and bytes by state, if known.

        May be called in a thread. Reads files if several processes share their metrics.
        """
        self._snapshot.database_is_up = database_is_up
        self._snapshot.packages = packages
        return render(self._registry)

    def _count(self, name: str, *labels: str, amount: float = 1) -> None:
        self._counts[name].add(*labels, amount=amount)

    def _observe(self, name: str, value: float, *labels: str) -> None:
        self._distributions[name].observe(value, *labels)


class _Snapshot(Collector):
    """Metrics of the whole daemon, which any process can report."""

    database_is_up = False
    packages: Mapping[str, tuple[int, int]] | None = None

    def collect(self) -> Iterator[Metric]:
        build = GaugeMetricFamily(
            "exportd_build_info", "Always 1; which exportd this is", labels=["version", "python"]
        )
        build.add_metric([__version__, platform.python_version()], 1)
        yield build
        yield GaugeMetricFamily(
            "exportd_database_up", "Whether the database answers", value=int(self.database_is_up)
        )
        if self.packages is None:
            return
        number = GaugeMetricFamily("exportd_packages", "Export jobs", labels=["state"])
        size = GaugeMetricFamily("exportd_package_bytes", "Bytes of their packages", labels=["state"])
        for state, (count, size_bytes) in self.packages.items():
            number.add_metric([state], count)
            size.add_metric([state], size_bytes)
        yield number
        yield size

"""Metrics for Prometheus. docs/operations.md describes each one.

No label holds a user, a job, a path or another value that a client can choose: every series costs memory for
as long as the daemon runs.

Several processes share their metrics through files in a folder (``shared_metrics``). Each writes its own
file, and any of them answers ``/metrics`` for all.
"""

import contextlib
import fcntl
import itertools
import os
import platform
import resource
import shutil
import tempfile
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
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from exportd import __version__
from exportd.telemetry.logging import shed_lines

__all__ = ["CONTENT_TYPE", "Metrics", "forget_dead_processes", "shared_metrics"]

# It would add an unused series to each counter and histogram.
disable_created_metrics()

_HOUR = 3600
_DURATIONS = (0.1, 0.3, 1, 3, 10, 30, 60, 180, 600, 1800, _HOUR, 3 * _HOUR, 6 * _HOUR, 12 * _HOUR)
_RATES = tuple(step * 10**power for power in range(4, 10) for step in (1, 3))
_FIRST_BYTES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_SLICES = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1, 5)
_LAGS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_FLUSHES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_REFUSALS = ("no_token", "bad_token", "bad_link", "not_permitted")
_CLEANUP_RESULTS = ("deleted", "failed", "waiting")
_GROUPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)

_shared_folder: Path | None = None
_slot: int | None = None


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
    """The metrics of one application, or of one process within ``shared_metrics``. Used in the event loop.

    ``exposition`` lacks what was counted since the last ``flush``.
    """

    def __init__(
        self,
        failure_reasons: Iterable[str],
        delivery_methods: Iterable[str],
        connection_refusals: Iterable[str],
        limits: Iterable[str],
    ) -> None:
        self._registry = CollectorRegistry()
        self._own_registry: CollectorRegistry | None = None
        if _shared_folder is None:
            value_classes.ValueClass = value_classes.MutexValue
            self._own_registry = self._registry
        else:
            slot = _own_slot(_shared_folder)
            value_classes.ValueClass = value_classes.MultiProcessValue(lambda: slot)
            MultiProcessCollector(self._registry, str(_shared_folder))
        self._snapshot = _Snapshot()
        self._registry.register(self._snapshot)
        self._tallies: list[_Counts | _Distribution] = []

        self._requests = self._counts("requests_total", "Requests answered", ("route", "status"))
        self._first_bytes = self._distribution(
            "first_byte_seconds",
            "From a request's arrival to its answer's first byte",
            _FIRST_BYTES,
            ("route",),
        )
        self._started = self._counts("downloads_started_total", "Deliveries begun")
        self._completed = self._counts("downloads_completed_total", "Deliveries of every byte asked for")
        # Every series exists at 0 from the start: an alert would miss the first failure if it created the
        # series.
        self._failed = self._counts(
            "downloads_failed_total", "Downloads that failed", ("reason",), failure_reasons
        )
        self._refused = self._counts(
            "access_refused_total", "Requests refused for want of a right", ("reason",), _REFUSALS
        )
        self._sent = self._counts("sent_bytes_total", "Bytes of packages sent", ("method",), delivery_methods)
        self._durations = self._distribution(
            "download_duration_seconds", "Duration of completed deliveries", _DURATIONS, ("size",)
        )
        self._rates = self._distribution(
            "download_bytes_per_second", "Throughput of completed deliveries", _RATES, ("size",)
        )
        self._slices = self._distribution(
            "slice_seconds", "Time that one slice of a package took", _SLICES, ("state",), ("hot", "cold")
        )
        self._lag = self._distribution("loop_lag_seconds", "How late the event loop was", _LAGS)
        self._flushes = self._distribution(
            "ledger_flush_seconds",
            "Duration of one statement that writes events",
            _FLUSHES,
            ("result",),
            ("written", "failed"),
        )
        self._groups = self._distribution("ledger_flush_events", "Events in one such statement", _GROUPS)
        self._connections_refused = self._counts(
            "connections_refused_total",
            "Connections closed for what came over them, or did not",
            ("reason",),
            connection_refusals,
        )
        self._limits_hit = self._counts(
            "limits_hit_total", "Requests refused because of a limit", ("limit",), limits
        )
        self._cleaned = self._counts(
            "cleanup_packages_total", "Expired packages that cleanups met", ("result",), _CLEANUP_RESULTS
        )
        self._freed = self._counts("cleanup_freed_bytes_total", "Bytes that cleanups freed")
        self._cleanup_end = self._gauge(
            "cleanup_finished_timestamp_seconds", "When the last cleanup went to its end", mode="livemax"
        )
        self._shed = self._counts("log_lines_shed_total", "Log lines that could not be written")
        self._starts = self._counts("process_starts_total", "Processes started, replaced ones too")
        self._cpu = self._counts("process_cpu_seconds_total", "Processor time used")
        self._in_flight = self._gauge("downloads_in_flight", "Deliveries under way")
        self._waiting_events = self._gauge("ledger_waiting_events", "Download events not yet written")
        self._spooled_events = self._gauge("spool_events", "Download events that wait for the database")
        self._pool = self._gauge("database_pool_connections", "Connections to the database", ("state",))
        self._pool_limit = self._gauge("database_pool_limit", "The most connections there may be")
        self._processes = self._gauge("processes", "Processes that serve")
        self._memory = self._gauge("process_resident_memory_bytes", "Resident memory")
        # The maximum, not the sum: the limit is the same for each process.
        self._descriptors = self._gauge(
            "process_open_descriptors", "File descriptors of the process that has most", mode="livemax"
        )
        self._descriptor_limit = self._gauge(
            "process_descriptor_limit", "The most file descriptors a process may have", mode="livemax"
        )

        self._under_way = 0
        # A forked process inherits its parent's number.
        self._shed_before = shed_lines()
        self._cpu_before = 0.0
        self._processes.set(1)
        self._starts.add()

    def request_answered(self, route: str, status: int, seconds: float) -> None:
        """Counts a response whose headers are sent, ``seconds`` after its request was received."""
        self._requests.add(route, str(status))
        self._first_bytes.observe(seconds, route)

    def download_refused(self, reason: str) -> None:
        """Counts a download that failed before its delivery began."""
        self._failed.add(reason)

    def access_refused(self, reason: Literal["no_token", "bad_token", "bad_link", "not_permitted"]) -> None:
        """Counts a request without a valid token or link, or without permission."""
        self._refused.add(reason)

    def connection_refused(self, reason: str) -> None:
        """Counts a connection that the server closed."""
        self._connections_refused.add(reason)

    def limit_hit(self, limit: str) -> None:
        """Counts a request over a limit."""
        self._limits_hit.add(limit)

    def download_started(self) -> None:
        """Counts the start of a delivery. ``download_completed`` or ``download_failed`` must follow."""
        self._started.add()
        self._under_way += 1

    def download_completed(self, size: str, size_bytes: int, seconds: float) -> None:
        """Counts a complete delivery. ``size`` is its range of sizes."""
        self._under_way -= 1
        self._completed.add()
        self._durations.observe(seconds, size)
        self._rates.observe(size_bytes / max(seconds, 1e-6), size)

    def download_failed(self, reason: str) -> None:
        """Counts a delivery that ended before its last byte."""
        self._under_way -= 1
        self._failed.add(reason)

    def bytes_sent(self, method: str, count: int) -> None:
        """Counts sent bytes during a delivery, which may take hours."""
        self._sent.add(method, amount=count)

    def slice_sent(self, seconds: float, is_cold: bool) -> None:
        """Records the duration of sending or reading one slice."""
        self._slices.observe(seconds, "cold" if is_cold else "hot")

    def loop_was_late(self, seconds: float) -> None:
        """Records the lag of the event loop."""
        self._lag.observe(seconds)

    def events_flushed(self, count: int, seconds: float, is_written: bool) -> None:
        """Counts the events of one statement of the ledger."""
        self._flushes.observe(seconds, "written" if is_written else "failed")
        self._groups.observe(count)

    def cleanup_finished(self, deleted: int, failed: int, waiting: int, freed_bytes: int) -> None:
        """Counts a complete cleanup of this process."""
        for result, count in zip(_CLEANUP_RESULTS, (deleted, failed, waiting), strict=True):
            self._cleaned.add(result, amount=count)
        self._freed.add(amount=freed_bytes)
        self.cleanup_was_finished(datetime.now(UTC))

    def cleanup_was_finished(self, at: datetime) -> None:
        """Sets when the last complete cleanup of any daemon finished."""
        self._cleanup_end.set(at.timestamp())

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
        self._shed.add(amount=max(0, shed - self._shed_before))
        self._shed_before = shed
        for tally in self._tallies:
            tally.flush()
        self._in_flight.set(self._under_way)
        self._waiting_events.set(waiting_events)
        self._spooled_events.set(spooled_events)
        self._pool.labels("in_use").set(pool_in_use)
        self._pool.labels("idle").set(pool_idle)
        self._pool_limit.set(pool_limit)

    def measure_process(self) -> None:
        """Measures this process."""
        used = time.process_time()
        self._cpu.add(amount=used - self._cpu_before)
        self._cpu_before = used
        self._descriptor_limit.set(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        # Linux only. Elsewhere both stay at 0.
        with contextlib.suppress(FileNotFoundError):
            self._descriptors.set(sum(1 for _ in Path("/proc/self/fd").iterdir()))
            resident_pages = int(Path("/proc/self/statm").read_text().split()[1])
            self._memory.set(resident_pages * resource.getpagesize())

    def exposition(self, *, database_is_up: bool, packages: Mapping[str, tuple[int, int]] | None) -> bytes:
        """Returns the metrics of all processes as text. ``packages``: number and bytes by state, if known.

        May be called in a thread. Reads files if several processes share their metrics.
        """
        self._snapshot.database_is_up = database_is_up
        self._snapshot.packages = packages
        return render(self._registry)

    def _counts(
        self, name: str, meaning: str, labels: Sequence[str] = (), values: Iterable[str] = ()
    ) -> _Counts:
        counter = Counter(f"exportd_{name}", meaning, labels, registry=self._own_registry)
        for value in values:
            counter.labels(value)
        counts = _Counts(counter)
        self._tallies.append(counts)
        return counts

    def _distribution(
        self,
        name: str,
        meaning: str,
        bounds: Sequence[float],
        labels: Sequence[str] = (),
        values: Iterable[str] = (),
    ) -> _Distribution:
        histogram = Histogram(f"exportd_{name}", meaning, labels, registry=self._own_registry, buckets=bounds)
        for value in values:
            histogram.labels(value)
        distribution = _Distribution(histogram, bounds)
        self._tallies.append(distribution)
        return distribution

    def _gauge(
        self,
        name: str,
        meaning: str,
        labels: Sequence[str] = (),
        mode: Literal["livesum", "livemax"] = "livesum",
    ) -> Gauge:
        return Gauge(f"exportd_{name}", meaning, labels, registry=self._own_registry, multiprocess_mode=mode)


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


@contextlib.contextmanager
def shared_metrics() -> Iterator[None]:
    """Lets processes that are forked while the block runs share their metrics."""
    global _shared_folder
    owner = os.getpid()
    folder = _shared_folder = Path(tempfile.mkdtemp(prefix="exportd-metrics-"))
    # prometheus_client reads the folder from this variable.
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)
    try:
        yield
    finally:
        # A forked worker leaves here too. The folder belongs to its parent.
        if os.getpid() == owner:
            _shared_folder = None
            del os.environ["PROMETHEUS_MULTIPROC_DIR"]
            shutil.rmtree(folder, ignore_errors=True)


def forget_dead_processes() -> None:
    """Removes the gauges of processes that have ended. Their counts stay."""
    assert _shared_folder is not None
    for path in _shared_folder.glob("*.lock"):
        lock = _lock_slot(path)
        if lock is not None:
            mark_process_dead(int(path.stem), str(_shared_folder))
            os.close(lock)


def _own_slot(folder: Path) -> int:
    """Reserves the smallest free number for this process.

    Files are named by it and not by the process id, so that a new process continues in the files of one that
    ended. Otherwise each reload would add files to read.
    """
    global _slot
    if _slot is None:
        # The lock stays open. The kernel frees it when the process ends.
        _slot = next(
            number for number in itertools.count() if _lock_slot(folder / f"{number}.lock") is not None
        )
        mark_process_dead(_slot, str(folder))
    return _slot


def _lock_slot(path: Path) -> int | None:
    """Returns the descriptor that holds the lock, or None if a running process holds it."""
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock

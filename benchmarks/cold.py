"""Packages that are not in memory: what eight such downloads at once do to everybody else."""

import time
from functools import partial

from benchmarks import load, servers
from benchmarks.harness import GIB, KIB, MIB, Bench, Package, drop_from_memory, in_turn
from benchmarks.probe import read_recording
from benchmarks.report import Section, percentile
from benchmarks.servers import Server

DOWNLOADS = 8
# Enough for a p99 of downloads that take a millisecond each.
ALONE_SECONDS = 4
MAX_SECONDS = 120


def run(bench: Bench, section: Section) -> None:
    size = 256 * MIB if bench.quick else GIB
    section.title = f"{DOWNLOADS} cold packages of {size // MIB} MiB at once"
    large = bench.packages(size, DOWNLOADS)
    if not drop_from_memory(large):
        section.missing["cold packages"] = "this file system keeps files in memory; set TMPDIR to a disk"
        return
    _measure_lag(bench, section, large)
    _measure_latency(bench, section, large)


def _measure_lag(bench: Bench, section: Section, large: list[Package]) -> None:
    rounds = 1 if bench.quick else 3
    recording = bench.folder / "lag-cold"
    lags, rates = [], []
    with servers.exportd(bench, probe=recording) as server, server.counting(bench) as counted:
        targets = [server.target(package) for package in large]
        load.discard([server.target(bench.package(64 * KIB))])
        for _ in range(rounds):
            drop_from_memory(large)
            with load.discarding(targets) as under_way:
                started = time.monotonic()
                done = under_way.result(load.TIMEOUT_SECONDS)
                stopped = time.monotonic()
            lags.append(percentile(read_recording(recording).lags_between(started, stopped), 99) * 1e3)
            rates.append(done.bytes_per_second / 1e9)
        counted.completed = 1 + rounds * DOWNLOADS
    section.add("GB/s in sum", "exportd, cold", rates)
    lag = section.add("the loop's lag (p99), ms", "exportd, cold", lags)
    section.hold("the loop's lag (p99) meanwhile", lag.median, "ms", at_most=15.0)


def _measure_latency(bench: Bench, section: Section, large: list[Package]) -> None:
    small = bench.packages(64 * KIB, 16)

    def measure(server: Server, *, beside_cold: bool) -> tuple[float, float]:
        """p50 and p99 of one small download after the other, in ms."""
        bench.quiet()
        targets = [server.target(package) for package in small]
        with server.counting(bench) as counted:
            if not beside_cold:
                storm = load.wrk(targets, server.folder, connections=1, seconds=ALONE_SECONDS)
            else:
                drop_from_memory(large)
                cold = [server.target(package) for package in large]
                with (
                    load.discarding(cold) as under_way,
                    load.storming(targets, server.folder, connections=1, seconds=MAX_SECONDS) as process,
                ):
                    counted.completed += under_way.result(load.TIMEOUT_SECONDS).completed
                    storm = load.end_early(process)
            counted.completed += storm.requests
            counted.cut = 1
        return storm.p50_seconds * 1e3, storm.p99_seconds * 1e3

    rounds = 1 if bench.quick else 3
    with servers.exportd(bench) as server:
        load.check_bytes(server.target(small[0]), small[0].sha256)
        results = in_turn(
            rounds,
            {
                "alone": partial(measure, server, beside_cold=False),
                "beside cold downloads": partial(measure, server, beside_cold=True),
            },
        )
    for number, measure_name in enumerate(("small download (p50), ms", "small download (p99), ms")):
        for name, values in results.items():
            section.add(measure_name, name, [value[number] for value in values])
    section.compare("small download (p99), ms", "beside cold downloads", "alone", at_most=3.0)

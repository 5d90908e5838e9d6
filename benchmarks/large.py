"""One package of 1 GiB over one connection, warm: rate, CPU time, TLS, and the daemon's memory."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial

from benchmarks import load, servers
from benchmarks.harness import GIB, KIB, MIB, Bench, Package, cpu_seconds, in_turn, memory_bytes, reset_peak
from benchmarks.report import Section
from benchmarks.servers import Server

PEERS: dict[str, servers.Start] = {
    "exportd": servers.exportd,
    "exportd, 64 KiB chunks": partial(
        servers.exportd, name="exportd, 64 KiB chunks", download__sendfile=False
    ),
    "nginx": servers.nginx,
    "aiohttp": servers.aiohttp,
    "Starlette": servers.starlette,
    "Express": servers.express,
}
TLS_PEERS: dict[str, servers.Start] = {
    "exportd": partial(servers.exportd, tls=True),
    "nginx": partial(servers.nginx, tls=True),
}
# CPU time is known to 10 ms; several downloads in a row make that small.
DOWNLOADS = 3


def run(bench: Bench, section: Section) -> None:
    section.title = "one package of 1 GiB, one connection, warm"
    package = bench.package(64 * MIB if bench.quick else GIB)
    rounds = 2 if bench.quick else 5
    with ExitStack() as stack:
        running = servers.start_all(stack, bench, PEERS, section.missing)
        _measure_plain(bench, section, package, running, rounds)
    with ExitStack() as stack:
        running = servers.start_all(stack, bench, TLS_PEERS, section.missing)
        _measure_curl(bench, section, package, running, rounds, "GB/s over TLS 1.3")
    section.compare("GB/s over TLS 1.3", "exportd", "nginx", at_least=1.0)
    for way in ("sendfile", "chunks"):
        growth = _measure_growth(bench, package, sendfile=way == "sendfile")
        section.hold(f"memory's growth during a download, by {way}", growth / MIB, "MiB", at_most=2.0)


def _measure_plain(
    bench: Bench, section: Section, package: Package, running: Mapping[str, Server], rounds: int
) -> None:
    def measure(server: Server) -> tuple[float, float, float]:
        """GB/s; CPU-seconds for each GB, the server's and PostgreSQL's."""
        with server.counting(bench) as counted:
            before, before_postgres = cpu_seconds(server.process), cpu_seconds(bench.postgres)
            done = load.discard([server.target(package)], downloads=DOWNLOADS)
            counted.completed = done.completed
        gigabytes = done.received_bytes / 1e9
        used = cpu_seconds(server.process) - before
        return (
            done.bytes_per_second / 1e9,
            used / gigabytes,
            (cpu_seconds(bench.postgres) - before_postgres) / gigabytes,
        )

    _check_bytes(bench, package, running)
    results = in_turn(rounds, {name: partial(measure, server) for name, server in running.items()})
    for number, measure_name in enumerate(("GB/s", "CPU-seconds per GB", "PostgreSQL's CPU-seconds per GB")):
        for name, values in results.items():
            if name != "nginx" or number < 2:
                section.add(measure_name, name, [value[number] for value in values])
    fast = {name: running[name] for name in ("exportd", "nginx") if name in running}
    _measure_curl(bench, section, package, fast, rounds, "GB/s to curl", check=False)
    section.compare("GB/s", "exportd", "nginx", at_least=1.0)
    section.compare("GB/s to curl", "exportd", "nginx")
    section.compare("CPU-seconds per GB", "exportd", "nginx", at_most=0.9)
    section.compare("GB/s", "exportd", "Express", at_least=6.0)


def _measure_curl(
    bench: Bench,
    section: Section,
    package: Package,
    running: Mapping[str, Server],
    rounds: int,
    measure_name: str,
    *,
    check: bool = True,
) -> None:
    def measure(server: Server) -> float:
        with server.counting(bench) as counted:
            seconds = load.curl(server.target(package))
            counted.completed = 1
        return package.size_bytes / seconds / 1e9

    if check:
        _check_bytes(bench, package, running)
    measurements: dict[str, Callable[[], float]] = {
        name: partial(measure, server) for name, server in running.items()
    }
    for name, values in in_turn(rounds, measurements).items():
        section.add(measure_name, name, values)


def _check_bytes(bench: Bench, package: Package, running: Mapping[str, Server]) -> None:
    for server in running.values():
        with server.counting(bench) as counted:
            load.check_bytes(server.target(package), package.sha256)
            counted.completed = 1


def _measure_growth(bench: Bench, package: Package, *, sendfile: bool) -> int:
    """The most, in bytes, that the daemon's resident memory grew during one of three downloads."""
    small = bench.package(64 * KIB)
    growths = []
    with servers.exportd(bench, download__sendfile=sendfile) as server, server.counting(bench) as counted:
        # What Python loads late belongs to no download in particular.
        load.discard([server.target(small)])
        for _ in range(DOWNLOADS):
            reset_peak(server.process.pid)
            before = memory_bytes(server.process.pid, "VmRSS")
            load.discard([server.target(package)])
            growths.append(memory_bytes(server.process.pid, "VmHWM") - before)
        counted.completed = 1 + DOWNLOADS
    return max(growths)

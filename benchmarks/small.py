"""64 KiB packages over 64 connections: requests a second, where every download is checked and counted."""

from contextlib import ExitStack
from functools import partial

from benchmarks import load, servers
from benchmarks.harness import KIB, Bench, Package, cpu_seconds, in_turn
from benchmarks.report import Section
from benchmarks.servers import Server

PEERS: dict[str, servers.Start] = {
    "exportd": servers.exportd,
    "exportd, two workers": lambda bench: servers.exportd(
        bench, "--workers", "2", name="exportd, two workers"
    ),
    "aiohttp": servers.aiohttp,
    "Starlette": servers.starlette,
    "Express": servers.express,
    "nginx, counting nothing": servers.nginx,
}
CONNECTIONS = 64
# So many that no row of the database is hot: peers that count one by one would queue on it.
PACKAGES = 256


def run(bench: Bench, section: Section) -> None:
    section.title = f"packages of 64 KiB, {CONNECTIONS} connections, token checked, each download counted"
    packages = bench.packages(64 * KIB, PACKAGES)
    rounds, seconds = (2, 2) if bench.quick else (5, 5)

    def measure(server: Server, packages: list[Package]) -> tuple[float, float, float]:
        """Requests a second; CPU microseconds for each, the server's and PostgreSQL's."""
        bench.quiet()
        before, before_postgres = cpu_seconds(server.process), cpu_seconds(bench.postgres)
        with server.counting(bench) as counted:
            targets = [server.target(package) for package in packages]
            storm = load.wrk(targets, server.folder, connections=CONNECTIONS, seconds=seconds)
            counted.completed, counted.cut = storm.requests, CONNECTIONS
        used = cpu_seconds(server.process) - before
        used_by_postgres = cpu_seconds(bench.postgres) - before_postgres
        return (
            storm.requests_per_second,
            used / storm.requests * 1e6,
            used_by_postgres / storm.requests * 1e6,
        )

    with ExitStack() as stack:
        running = servers.start_all(stack, bench, PEERS, section.missing)
        for server in running.values():
            with server.counting(bench) as counted:
                load.check_bytes(server.target(packages[0]), packages[0].sha256)
                counted.completed = 1
        results = in_turn(
            rounds, {name: partial(measure, server, packages) for name, server in running.items()}
        )
        hot = {name: running[name] for name in ("exportd", "aiohttp", "Express") if name in running}
        hot_results = in_turn(
            1 if bench.quick else 3,
            {name: partial(measure, server, packages[:1]) for name, server in hot.items()},
        )
    measures = ("requests/s", "CPU µs per request", "PostgreSQL's CPU µs per request")
    for number, measure_name in enumerate(measures):
        for name, values in results.items():
            section.add(measure_name, name, [value[number] for value in values])
    for name, values in hot_results.items():
        section.add("requests/s, all for one package", name, [value[0] for value in values])
    section.compare("requests/s", "exportd", "Express", at_least=5.0)
    section.compare("requests/s", "exportd", "aiohttp", at_least=2.0)
    section.compare("requests/s", "exportd", "Starlette")
    section.compare("requests/s", "exportd", "nginx, counting nothing")
    section.compare("requests/s", "exportd, two workers", "exportd")
    section.compare("requests/s, all for one package", "exportd", "Express")

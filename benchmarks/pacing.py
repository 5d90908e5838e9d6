"""``max_rate_bytes_per_second``: is one download as fast as it may be, and no faster."""

from benchmarks import load, servers
from benchmarks.harness import MIB, Bench
from benchmarks.report import Section

RATE_BYTES_PER_SECOND = 20_000_000


def run(bench: Bench, section: Section) -> None:
    section.title = f"a limit of {RATE_BYTES_PER_SECOND // 10**6} MB/s for each download"
    package = bench.package((16 if bench.quick else 64) * MIB)
    for name, tls in (("sendfile", False), ("chunks over TLS", True)):
        with (
            servers.exportd(
                bench, tls=tls, download__max_rate_bytes_per_second=RATE_BYTES_PER_SECOND
            ) as server,
            server.counting(bench) as counted,
        ):
            rate = package.size_bytes / load.curl(server.target(package))
            counted.completed = 1
        deviation = abs(rate / RATE_BYTES_PER_SECOND - 1) * 100
        section.hold(f"MB/s by {name}", rate / 1e6, "MB/s")
        section.hold(f"off the limit, by {name}", deviation, "%", at_most=10.0)

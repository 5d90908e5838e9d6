"""The cleanup: what a small download meets while it deletes ten thousand packages."""

from benchmarks import load, servers
from benchmarks.harness import KIB, Bench, wait_until
from benchmarks.report import Section
from benchmarks.servers import Server

ALONE_SECONDS = 4
MAX_SECONDS = 120

_EXPIRE = """
INSERT INTO export_jobs (job_id, user_id, status, package_path, package_size_bytes, package_expires_at)
SELECT gen_random_uuid(), 'bench', 'completed', 'expired-' || n, 4096, now() - interval '2 days'
  FROM generate_series(1, %s) AS n
"""
_LEFT = "SELECT count(*) FROM export_jobs WHERE package_path LIKE 'expired-%%'"


def run(bench: Bench, section: Section) -> None:
    count = 1000 if bench.quick else 10_000
    section.title = f"small downloads while {count} packages are deleted"
    small = bench.packages(64 * KIB, 16)
    alone, beside = [], []
    # Every second: it begins when there is something to delete.
    with servers.exportd(bench, retention__cleanup_schedule="* * * * * *") as server:
        targets = [server.target(package) for package in small]
        load.check_bytes(targets[0], small[0].sha256)
        for _ in range(1 if bench.quick else 3):
            bench.quiet()
            with server.counting(bench) as counted:
                storm = load.wrk(targets, server.folder, connections=1, seconds=ALONE_SECONDS)
                counted.completed, counted.cut = storm.requests, 1
            alone.append(storm.p99_seconds * 1e3)
            beside.append(_beside(bench, server, targets, count) * 1e3)
    section.add("small download (p99), ms", "alone", alone)
    section.add("small download (p99), ms", "beside the cleanup", beside)
    section.compare("small download (p99), ms", "beside the cleanup", "alone", at_most=2.0)


def _beside(bench: Bench, server: Server, targets: list[load.Target], count: int) -> float:
    """The p99 of small downloads, in seconds, from the first package's deletion to the last one's."""
    files = [bench.storage / f"expired-{number}" for number in range(1, count + 1)]
    for file in files:
        file.write_bytes(b"x" * 4096)
    bench.query(_EXPIRE, (count,))
    wait_until(lambda: sum(file.exists() for file in files[:100]) < 100)
    with (
        server.counting(bench) as counted,
        load.storming(targets, server.folder, connections=1, seconds=MAX_SECONDS) as process,
    ):
        wait_until(lambda: bench.query(_LEFT) == [(0,)], MAX_SECONDS)
        storm = load.end_early(process)
        counted.completed, counted.cut = storm.requests, 1
    bench.query("DELETE FROM export_jobs WHERE package_deleted_at IS NOT NULL")
    return storm.p99_seconds

"""A million jobs and ten million events: what look-ups, lists, statistics and the cleanup's search take."""

import http.client
import statistics
import time
from collections.abc import Callable

from benchmarks import servers
from benchmarks.harness import KIB, Bench
from benchmarks.report import Section, percentile

_JOBS = """
INSERT INTO export_jobs (job_id, user_id, status, tool_data, created_at, completed_at, package_path,
                         package_size_bytes, package_expires_at, package_deleted_at)
SELECT gen_random_uuid(), 'user-' || n %% 5000,
       CASE n %% 100 WHEN 0 THEN 'failed' ELSE 'completed' END, '{"name": "Bench"}',
       now() - make_interval(secs => n * 30), now() - make_interval(secs => n * 30),
       CASE WHEN n < 100000 THEN 'none-' || n END, 65536,
       now() - make_interval(secs => n * 30) + interval '30 days', now()
  FROM generate_series(1, %s) AS n
"""
_EVENTS = """
INSERT INTO download_events (event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status,
                             requested, received, bytes_sent, package_size_bytes, request_id)
SELECT gen_random_uuid(), job_id, user_id, created_at + make_interval(mins => n), 1, 'completed', 200,
       '{[0,65536)}', '{[0,65536)}', 65536, 65536, 'bench'
  FROM export_jobs, generate_series(1, 10) AS n
"""
_ASKED = 200


def run(bench: Bench, section: Section) -> None:
    jobs = 20_000 if bench.quick else 1_000_000
    section.title = f"{jobs:,} jobs and {10 * jobs:,} events"
    package = bench.package(64 * KIB)
    bench.query(_JOBS, (jobs,))
    bench.query(_EVENTS)
    bench.query("VACUUM ANALYZE export_jobs")
    bench.query("VACUUM ANALYZE download_events")
    ((known,),) = bench.query("SELECT job_id::text FROM export_jobs WHERE user_id = 'user-77' LIMIT 1")
    with servers.exportd(bench) as server:
        port = server.target(package).port
        base = "/api/tool-registry/export-jobs"
        user, admin = bench.authorization("user-77"), bench.authorization("root", "admin")
        asked = {
            "one job": (f"{base}/{known}", user),
            "a user's list": (base, user),
            "a user's list, failed": (f"{base}?status=failed", user),
            "everybody's list": (base, admin),
            "everybody's list, failed": (f"{base}?status=failed", admin),
            "statistics of a job": (f"{base}/{known}/download-stats", user),
            "HEAD of a package": (f"{base}/{package.job_id}/download", bench.authorization()),
        }
        for name, (path, authorization) in asked.items():
            method = "HEAD" if name.startswith("HEAD") else "GET"
            _report(section, name, _asking(port, method, path, authorization))
    statements: dict[str, Callable[[], object]] = {
        "the cleanup's search (SQL)": lambda: bench.query(
            "SELECT job_id FROM export_jobs WHERE status = 'completed' AND package_path IS NOT NULL"
            " AND package_expires_at < now() - interval '1 minute'"
            " ORDER BY package_expires_at, job_id LIMIT 50"
        ),
    }
    for name, ask in statements.items():
        _report(section, name, ask)


def _asking(port: int, method: str, path: str, authorization: str) -> Callable[[], object]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def ask() -> None:
        connection.request(method, path, headers={"Authorization": authorization})
        response = connection.getresponse()
        response.read()
        assert response.status == 200, (path, response.status)

    return ask


def _report(section: Section, name: str, ask: Callable[[], object]) -> None:
    ask()
    times = []
    for _ in range(_ASKED):
        started = time.perf_counter()
        ask()
        times.append((time.perf_counter() - started) * 1e3)
    section.add("p50, ms", name, [statistics.median(times)])
    section.add("p99, ms", name, [percentile(times, 99)])

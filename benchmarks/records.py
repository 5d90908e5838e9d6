"""What recording costs: processor time of the database's server and of exportd, and WAL.

With ``--before FOLDER``, the checkout of an earlier version is measured too, in alternating rounds.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

from benchmarks.harness import REPOSITORY, Bench, BenchmarkBroken
from benchmarks.report import Section

_PROBE = Path(__file__).with_name("record_probe.py")
# The targets: what a record may cost, as a part of the earlier version's cost.
_MAX_RATIOS = {"1 whole": 0.7, "64 whole": 0.7, "64 partial": 0.5}
_MAX_WAL_BYTES = 300


def run(bench: Bench, section: Section, before: Path | None = None) -> None:
    section.title = "Records: cost of a batch; WAL of a checkpoint of a running delivery"
    rounds, times = (1, 6) if bench.quick else (7, 200)
    versions = {"exportd": REPOSITORY} | ({"before": before} if before else {})
    found: dict[str, list[dict[str, dict[str, float]]]] = {version: [] for version in versions}
    with contextlib.ExitStack() as stack:
        probes = {
            version: stack.enter_context(_probe(bench, version, folder, times))
            for version, folder in versions.items()
        }
        for _ in range(rounds):
            for version, probe in probes.items():
                found[version].append(_next_round(probe))
    for batch in found["exportd"][0]:
        for cost in ("server_ms", "client_ms"):
            for version in versions:
                section.add(f"{batch}: {cost}", version, [one[batch][cost] for one in found[version]])
    for version in versions:
        section.add(
            "1 running: wal_bytes", version, [one["1 running"]["wal_bytes"] for one in found[version]]
        )
    for batch, ratio in _MAX_RATIOS.items():
        section.compare(f"{batch}: server_ms", "exportd", "before", at_most=ratio)
    wal = statistics.median(one["1 running"]["wal_bytes"] for one in found["exportd"])
    section.hold("WAL of a checkpoint", wal, "bytes", at_most=_MAX_WAL_BYTES)


@contextlib.contextmanager
def _probe(bench: Bench, version: str, folder: Path, times: int) -> Iterator[subprocess.Popen[str]]:
    name = f"records_{version}"
    bench.query(f"CREATE DATABASE {name}")
    command = [sys.executable, str(_PROBE), psycopg2.extensions.make_dsn(bench.dsn, dbname=name), str(times)]
    environ = {**os.environ, "PYTHONPATH": str(folder)}
    with subprocess.Popen(
        command, env=environ, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as probe:
        yield probe
        assert probe.stdin is not None
        probe.stdin.close()


def _next_round(probe: subprocess.Popen[str]) -> dict[str, Any]:
    assert probe.stdin is not None
    assert probe.stdout is not None
    print(file=probe.stdin, flush=True)
    line = probe.stdout.readline()
    if not line:
        raise BenchmarkBroken("the probe of records failed")
    found: dict[str, Any] = json.loads(line)
    return found

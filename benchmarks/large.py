"""One large package over loopback, token checked and download counted: GB/s, and the daemon's memory.

The real daemon runs in a process of its own with its embedded database; the client is curl where there is
one. Both ways of delivery are measured; each first downloads once to warm the page cache.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import urllib.request
from pathlib import Path

MEGABYTE = 1024 * 1024
MEMORY_LIMIT_BYTES = 8 * MEGABYTE


def run(quick: bool) -> int:
    """Prints the table; 1 where memory grew by more than the limit or a count is wrong."""
    size_bytes, rounds = (64 * MEGABYTE, 2) if quick else (1024 * MEGABYTE, 5)
    with tempfile.TemporaryDirectory(prefix="exportd-bench-") as name:
        folder = Path(name)
        environ = {**os.environ, "EXPORTD_DATA_DIR": str(folder / "data"), "EXPORTD_SERVER__PORT": "0"}
        published = publish(folder, environ, size_bytes)
        token = command(environ, "token", "--user", "bench").stdout.strip()
        print(f"{'delivery':10} {'GB/s':>6} {'memory':>15} {'peak':>9} {'after':>9} {'growth':>9}  counted")
        ways = ("sendfile", "chunks")
        results = [measure(folder, environ, published, token, way, rounds) for way in ways]
    return 0 if all(results) else 1


def command(environ: dict[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "exportd", *map(str, arguments)]
    return subprocess.run(line, env=environ, check=True, capture_output=True, text=True)


def publish(folder: Path, environ: dict[str, str], size_bytes: int) -> dict[str, str]:
    """Publishes a package of about that size that is quick to make: one member, stored uncompressed."""
    payload = folder / "payload"
    with payload.open("wb") as file:
        for _ in range(size_bytes // MEGABYTE):
            file.write(os.urandom(MEGABYTE))
    ready = folder / "ready.tar.gz"
    with tarfile.open(ready, "w:gz", compresslevel=0) as archive:
        archive.add(payload, "payload")
    payload.unlink()
    done = command(environ, "publish", ready, "--user", "bench", "--tool", "Bench")
    ready.unlink()
    published: dict[str, str] = json.loads(done.stdout)
    return published


def measure(
    folder: Path, environ: dict[str, str], published: dict[str, str], token: str, way: str, rounds: int
) -> bool:
    environ = {**environ, "EXPORTD_DOWNLOAD__SENDFILE": str(way == "sendfile").lower()}
    log = folder / f"{way}.log"
    with log.open("w") as stdout:
        daemon = subprocess.Popen([sys.executable, "-m", "exportd", "serve"], env=environ, stdout=stdout)
    try:
        job = f"{wait_for_address(log)}/api/tool-registry/export-jobs/{published['jobId']}"
        counted_before = count(job, token)
        # The first request also loads what Python loads late; it belongs to no download in particular.
        download(job, token, "-r", "0-0")
        before = memory_bytes(daemon.pid, "VmRSS")
        Path(f"/proc/{daemon.pid}/clear_refs").write_text("5")  # resets VmHWM, the peak
        seconds = [download(job, token) for _ in range(rounds + 1)][1:]
        peak, after = memory_bytes(daemon.pid, "VmHWM"), memory_bytes(daemon.pid, "VmRSS")
        counted = wait_for_count(job, token, counted_before + rounds + 1)
    finally:
        daemon.terminate()
        daemon.wait()
    rate = int(published["packageSizeBytes"]) / statistics.median(seconds) / 1e9
    growth = peak - before
    verdict = "ok" if growth < MEMORY_LIMIT_BYTES else f"MISSED: limit {MEMORY_LIMIT_BYTES // MEGABYTE} MiB"
    columns = [f"{value / MEGABYTE:.1f}M" for value in (before, peak, after, growth)]
    print(
        f"{way:10} {rate:6.2f} {columns[0]:>15} {columns[1]:>9} {columns[2]:>9} {columns[3]:>9}  "
        f"{'yes' if counted else 'NO'}  {verdict}"
    )
    return counted and growth < MEMORY_LIMIT_BYTES


def wait_for_address(log: Path) -> str:
    for _ in range(600):
        for line in log.read_text().splitlines():
            if '"server_started"' in line:
                address: str = json.loads(line)["url"]
                return address
        time.sleep(0.05)
    raise TimeoutError("the daemon did not start")


def download(job: str, token: str, *options: str) -> float:
    """Seconds for one download, thrown away by the client."""
    if shutil.which("curl") is None:
        raise FileNotFoundError("this benchmark needs curl")
    line = [
        "curl",
        "-sSf",
        *options,
        "-o",
        "/dev/null",
        "-H",
        f"Authorization: Bearer {token}",
        f"{job}/download",
    ]
    started = time.perf_counter()
    subprocess.run(line, check=True)
    return time.perf_counter() - started


def count(job: str, token: str) -> int:
    request = urllib.request.Request(f"{job}/download-stats", headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(request) as response:
        counted: int = json.load(response)["downloadCount"]
        return counted


def wait_for_count(job: str, token: str, expected: int) -> bool:
    for _ in range(100):
        if count(job, token) >= expected:
            break
        time.sleep(0.05)
    return count(job, token) == expected


def memory_bytes(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)

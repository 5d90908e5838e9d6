"""Several processes under gunicorn: they share the work, are replaced, reloaded and drained."""

import hashlib
import http.client
import os
import random
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import psutil
import pytest

from tests.integration.test_main_job import SlowDownload, get, path_of, statistics
from tests.support.application import ANN
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.postgres import query


@pytest.fixture
def large_source(tmp_path: Path) -> Path:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "data.bin").write_bytes(random.Random(2).randbytes(40_000_000))
    return folder


def workers_of(daemon: Daemon) -> set[int]:
    return {child.pid for child in psutil.Process(daemon.process.pid).children()}


def worker_at(daemon: Daemon, connection: http.client.HTTPConnection) -> int | None:
    """The worker at the other end of an open connection; None until one has accepted it."""
    assert connection.sock is not None
    ours = connection.sock.getsockname()[1]
    return next(
        (
            pid
            for pid in workers_of(daemon)
            for opened in psutil.Process(pid).net_connections("tcp")
            if opened.raddr and opened.raddr.port == ours
        ),
        None,
    )


def pid_that_answers(daemon: Daemon) -> int:
    """The worker at the other end of a new connection."""
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=30)
    connection.request("GET", "/healthz")
    connection.getresponse().read()
    try:
        pid = worker_at(daemon, connection)
        assert pid is not None
        return pid
    finally:
        connection.close()


def test_two_workers_serve_and_count(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve("--workers", 2)
    assert daemon.wait_for_event("server_started")["workers"] == 2
    wait_for("two workers", lambda: len(workers_of(daemon)) == 2)
    for _ in range(6):
        status, body = get(daemon, path_of(published))
        assert (status, hashlib.sha256(body).hexdigest()) == (200, published["sha256"])
    wait_for("the count", lambda: statistics(daemon, published)["downloadCount"] == 6)
    assert daemon.stop() == 0
    assert not [line for line in daemon.log if line["level"] == "error"]


def test_a_worker_that_dies_is_replaced(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_SERVER__WORKERS="2")
    before = wait_for("two workers", lambda: workers_of(daemon) if len(workers_of(daemon)) == 2 else None)
    victim = min(before)
    os.kill(victim, signal.SIGKILL)
    wait_for("a new worker", lambda: len(workers_of(daemon) - before) == 1 and len(workers_of(daemon)) == 2)
    new = workers_of(daemon) - before
    wait_for("an answer of the new worker", lambda: pid_that_answers(daemon) in new)
    assert daemon.stop() == 0


def test_sighup_replaces_the_workers_and_lets_downloads_finish(
    exportd: Exportd, large_source: Path, tmp_path: Path
) -> None:
    published = exportd.publish(large_source)
    config = tmp_path / "reload.toml"
    config.write_text("[auth]\nadmin_role = 'admin'\n")
    daemon = exportd.serve("--workers", 2, "--config", config)
    before = wait_for("two workers", lambda: workers_of(daemon) if len(workers_of(daemon)) == 2 else None)
    slow = SlowDownload(daemon, published)
    config.write_text("[auth]\nuser_claim = 'somebodyElse'\n")
    daemon.process.send_signal(signal.SIGHUP)
    wait_for("new workers", lambda: len(workers_of(daemon) - before) == 2)
    wait_for("one old worker to be done", lambda: len(workers_of(daemon) & before) == 1)
    # The new workers have read the configuration anew.
    # Not by a download: an old one may answer still, and count it.
    statistics = path_of(published, "download-stats")
    wait_for("an answer by the new rules", lambda: get(daemon, statistics, ANN)[0] == 401)
    assert hashlib.sha256(slow.finish()).hexdigest() == published["sha256"]
    wait_for("the old workers' end", lambda: not workers_of(daemon) & before)
    assert query(exportd.dsn, "SELECT download_count FROM export_jobs") == [(1,)]

    # What cannot be read is not taken over.
    config.write_text("nonsense")
    daemon.process.send_signal(signal.SIGHUP)
    assert "not valid TOML" in str(daemon.wait_for_event("settings_not_reloaded")["problems"])
    wait_for("an answer", lambda: get(daemon, "/readyz", {})[0] == 200)
    assert daemon.stop() == 0


def test_sigterm_drains_every_worker(exportd: Exportd, large_source: Path) -> None:
    published = exportd.publish(large_source)
    daemon = exportd.serve("--workers", 2)
    answered: set[int] = set()
    wait_for(
        "an answer of both workers", lambda: answered.add(pid_that_answers(daemon)) or len(answered) == 2
    )
    downloads = [SlowDownload(daemon, published) for _ in range(4)]
    daemon.process.send_signal(signal.SIGTERM)
    wait_for("two drains", lambda: len(daemon.events("server_draining")) == 2)
    for slow in downloads:
        assert hashlib.sha256(slow.finish()).hexdigest() == published["sha256"], daemon.log
    assert daemon.process.wait(60) == 0
    assert query(exportd.dsn, "SELECT download_count FROM export_jobs") == [(4,)]


def test_workers_share_the_embedded_database_and_the_parent_stops_it(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    exportd = Exportd(tmp_path_factory.mktemp("w"), dsn="")
    try:
        daemon = exportd.serve("--workers", 2)
        wait_for("two workers", lambda: len(workers_of(daemon)) == 2)
        pid_file = exportd.folder / "data" / "postgres" / "postmaster.pid"
        victim = min(workers_of(daemon))
        os.kill(victim, signal.SIGTERM)
        wait_for("a new worker", lambda: victim not in workers_of(daemon) and len(workers_of(daemon)) == 2)
        # A worker that leaves does not take the database with it.
        assert pid_file.exists()
        wait_for("an answer", lambda: get(daemon, "/readyz", {})[0] == 200)
        assert daemon.stop() == 0
        assert not pid_file.exists()
    finally:
        exportd.close()


@pytest.mark.slow
def test_workers_that_have_hardly_begun_hear_that_they_shall_stop(exportd: Exportd) -> None:
    for _ in range(3):
        daemon = exportd.serve("--workers", 3, EXPORTD_SERVER__DRAIN_TIMEOUT_SECONDS="1000")
        with urllib.request.urlopen(f"{daemon.url}/healthz") as response:
            assert response.status == 200
        # The others may be on their way still.
        assert daemon.stop() == 0


_FORK_BESIDE_A_COMPANION = """
import os, signal, sys, threading, time
from exportd.process import companion

ends = 0

class Log:
    def error(self, *_, **__):
        global ends
        ends += 1

companion.log = Log()
companion._FIRST_RESTART_SECONDS = 0
workers = []
with companion.Companion(["true"], os.environ):
    for _ in range(300):
        if not (pid := os.fork()):
            signal.pause()
        workers.append(pid)
    before, deadline = ends, time.monotonic() + 20
    while ends < before + 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    print(before, ends)
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    sys.exit(ends < before + 5)
"""


def test_workers_that_start_together_with_the_packer_do_not_keep_it_from_being_replaced() -> None:
    done = subprocess.run([sys.executable, "-c", _FORK_BESIDE_A_COMPANION], timeout=100, check=False)
    assert done.returncode == 0

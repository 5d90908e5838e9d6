"""Real clients whose daemon is killed: each download counts once, whenever the kill was."""

import os
import signal
import subprocess
import time
from pathlib import Path

import jwt
import pytest

from tests.integration.test_faults import count_of, outcomes, running, unused_port
from tests.support.application import ANN, SECRET, Jobs, Package, noise
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.programs import require

# Each of sixteen segments is larger than what its socket holds. A client gets that even after the kill. If it
# is the rest of a segment, the client does not resume it, and nothing shows that the client has it.
SIZE = 64 * 1024 * 1024
RATE = 2_000_000
AUTHORIZATION = f"Authorization: {ANN['Authorization']}"


class Killed:
    """A daemon that is killed and started again, on the same port, and a package of it."""

    def __init__(self, exportd: Exportd, dsn: str) -> None:
        exportd.storage.mkdir(parents=True)
        self._exportd = exportd
        self._environ = {
            "EXPORTD_SERVER__PORT": str(unused_port()),
            "EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND": str(RATE),
        }
        self.package: Package = Jobs(dsn, exportd.storage).add(noise(SIZE))
        self.daemon = self._serve()
        self.address = f"{self.daemon.url}{self.package.url}"

    def _serve(self) -> Daemon:
        daemon = self._exportd.serve(**self._environ)
        assert daemon.port
        return daemon

    def kill(self) -> None:
        self._environ["EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND"] = "0"
        self.daemon.stop(signal.SIGKILL)
        self.daemon = self._serve()


@pytest.fixture
def killed(exportd: Exportd, dsn: str) -> Killed:
    return Killed(exportd, dsn)


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@pytest.mark.parametrize("seconds", [0.05, 0.15, 0.4, 1.7])
def test_curl_resumes_after_a_kill_and_counts_once(
    killed: Killed, dsn: str, tmp_path: Path, seconds: float
) -> None:
    curl, file = require("curl"), tmp_path / "p.tar.gz"
    command = [curl, "-sSf", "-C", "-", "-o", str(file), "-H", AUTHORIZATION, killed.address]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as client:
        wait_for("the first bytes", lambda: size_of(file))
        time.sleep(seconds)
        killed.kill()
        # 18: the transfer ended early; 56: the connection was reset.
        assert client.wait(30) in (18, 56)
    assert 0 < size_of(file) < SIZE
    assert count_of(dsn, killed.package.job_id) == 0
    subprocess.run(command, check=True, timeout=60)
    assert file.read_bytes() == killed.package.content
    wait_for("the count", lambda: count_of(dsn, killed.package.job_id))
    assert killed.daemon.stop() == 0
    assert count_of(dsn, killed.package.job_id) == 1
    assert sorted(outcomes(dsn)) == ["completed", "lost"]
    assert running(dsn) == 0


@pytest.mark.parametrize("seconds", [0.05, 0.4])
def test_aria2_goes_on_over_sixteen_connections_after_a_kill_and_counts_once(
    killed: Killed, dsn: str, tmp_path: Path, seconds: float
) -> None:
    file = tmp_path / "p.tar.gz"
    options = ["-q", "-x16", "-s16", "-k4M", "--max-tries=0", "--retry-wait=1", "--file-allocation=none"]
    names = ["-d", str(tmp_path), "-o", file.name, "--header", AUTHORIZATION, killed.address]
    with subprocess.Popen([require("aria2c"), *options, *names]) as client:
        try:
            wait_for("sixteen connections", lambda: running(dsn) >= 16)
            time.sleep(seconds)
            killed.kill()
            assert client.wait(60) == 0
        finally:
            client.kill()
    assert file.read_bytes() == killed.package.content
    wait_for("the count", lambda: count_of(dsn, killed.package.job_id))
    assert killed.daemon.stop() == 0
    assert count_of(dsn, killed.package.job_id) == 1
    assert "lost" in outcomes(dsn)
    assert running(dsn) == 0


@pytest.mark.parametrize("offset", ["+2h", "-2h"])
def test_a_resume_through_a_node_with_another_clock_counts_once(
    exportd: Exportd, dsn: str, tmp_path: Path, offset: str
) -> None:
    curl, file, port = require("curl"), tmp_path / "p.tar.gz", unused_port()
    exportd.storage.mkdir(parents=True)
    package = Jobs(dsn, exportd.storage).add(noise(SIZE))
    environ = {"EXPORTD_SERVER__PORT": str(port)}
    # Without a time of issue: the daemon's clock may be behind.
    token = jwt.encode({"userId": "ann", "exp": 2**40}, SECRET, algorithm="HS256")
    address = f"http://127.0.0.1:{port}{package.url}"
    command = [curl, "-sSf", "-C", "-", "-o", str(file), "-H", f"Authorization: Bearer {token}", address]
    daemon = exportd.serve(
        under=(require("faketime"), "-f", offset),
        FAKETIME_DONT_FAKE_MONOTONIC="1",
        EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND=str(RATE),
        **environ,
    )
    assert daemon.port == port
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as client:
        wait_for("the first bytes", lambda: size_of(file))
        wait_for("the running delivery", lambda: running(dsn))
        os.killpg(daemon.process.pid, signal.SIGKILL)
        assert client.wait(30) in (18, 56)
    daemon = exportd.serve(**environ)
    assert daemon.port == port
    subprocess.run(command, check=True, timeout=60)
    wait_for("the count", lambda: count_of(dsn, package.job_id))
    assert daemon.stop() == 0
    assert count_of(dsn, package.job_id) == 1
    assert sorted(outcomes(dsn)) == ["completed", "lost"]

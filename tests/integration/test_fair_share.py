"""A total rate is shared by people, however many connections each opens. Ratios of bytes, never times."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.application import Jobs, bearer
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.postgres import query
from tests.support.programs import require

pytestmark = pytest.mark.slow

RATE = 20_000_000
SIZE = 2_000_000_000


@pytest.fixture
def jobs(exportd: Exportd) -> Jobs:
    exportd.storage.mkdir(parents=True)
    return Jobs(exportd.dsn, exportd.storage)


def serve(exportd: Exportd, way: str, workers: int, rate: int = RATE) -> Daemon:
    return exportd.serve(
        "--workers",
        workers,
        EXPORTD_DOWNLOAD__TOTAL_RATE_BYTES_PER_SECOND=str(rate),
        EXPORTD_DOWNLOAD__SENDFILE=str(way == "sendfile").lower(),
    )


# Never more than 250 KB in a second. curl's --limit-rate is an average, and takes more where it was late.
SLOW_READER = """
import socket, sys, time, urllib.parse
_, header, _, name, url = sys.argv
address = urllib.parse.urlsplit(url)
with socket.socket() as client, open(name, "wb", buffering=0) as file:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
    client.connect((address.hostname, address.port))
    lines = [f"GET {address.path} HTTP/1.1", f"Host: {address.netloc}", header, "", ""]
    client.sendall("\\r\\n".join(lines).encode())
    while data := client.recv(25_000):
        file.write(data)
        time.sleep(0.1)
"""


class Client:
    """A program that downloads a package of a user's own."""

    def __init__(self, jobs: Jobs, daemon: Daemon, folder: Path, user: str, *command: str) -> None:
        package = jobs.add(user_id=user)
        with package.file.open("wb") as file:
            file.truncate(SIZE)
        query(
            jobs.dsn,
            "UPDATE export_jobs SET package_size_bytes = %s, package_sha256 = NULL WHERE job_id = %s",
            (SIZE, package.job_id),
        )
        self._file = folder / f"{user}.gz"
        self.process = subprocess.Popen(
            [*command, "-o", f"{user}.gz", f"{daemon.url}{package.url}"],
            cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip

    def taken(self) -> int:
        """Bytes on disk so far."""
        return self._file.stat().st_blocks * 512 if self._file.exists() else 0


def measure(clients: list[Client], rate: int = RATE, settling_seconds: int = 4) -> list[int]:
    """What each takes meanwhile, once all are under way. A new connection begins with more than its share:
    the kernel does not pace its first ten segments, which on loopback have 64 KiB each."""

    def total() -> int:
        return sum(client.taken() for client in clients)

    wait_for("all to be under way", lambda: all(client.taken() > rate // 20 for client in clients))
    begun = total()
    wait_for("the beginning to be over", lambda: total() > begun + settling_seconds * rate)
    before = [client.taken() for client in clients]
    wait_for("some seconds' worth", lambda: total() > sum(before) + 4 * rate)
    return [client.taken() - taken for client, taken in zip(clients, before, strict=True)]


def assert_soon(
    condition: Callable[[int, int], bool], clients: list[Client], rate: int = RATE, settling_seconds: int = 4
) -> None:
    """What two clients take, in the first, second or third stretch: where the machine is busy, a program may
    not take its share for some seconds."""
    measured = []
    for _ in range(3):
        first, second = measure(clients, rate, settling_seconds)
        measured.append((first, second))
        if condition(first, second):
            return
    pytest.fail(f"never so: {measured}")


def header(user: str) -> str:
    return f"Authorization: {bearer(user)['Authorization']}"


@pytest.fixture
def clients() -> Iterator[list[Client]]:
    running: list[Client] = []
    yield running
    for client in running:
        client.process.kill()
        client.process.wait()


@pytest.mark.parametrize(("way", "workers"), [("sendfile", 1), ("chunks", 1), ("sendfile", 2)])
def test_sixteen_connections_get_no_more_than_one(
    exportd: Exportd, jobs: Jobs, tmp_path: Path, clients: list[Client], way: str, workers: int
) -> None:
    curl, aria2 = require("curl"), require("aria2c")
    daemon = serve(exportd, way, workers)
    clients += [
        Client(jobs, daemon, tmp_path, "ann", aria2, "-q", "-x16", "-s16", "-k1M", "--file-allocation=none",
               "--disk-cache=0",
               "--header", header("ann")),
        Client(jobs, daemon, tmp_path, "eve", curl, "-s", "-H", header("eve")),
    ]  # fmt: skip
    assert_soon(lambda anns, eves: anns == pytest.approx(eves, rel=0.1), clients)


def test_the_unused_share_of_a_slow_client_goes_to_the_others(
    exportd: Exportd, jobs: Jobs, tmp_path: Path, clients: list[Client]
) -> None:
    curl = require("curl")
    rate = RATE // 4
    daemon = serve(exportd, "sendfile", 1, rate)
    clients += [
        Client(jobs, daemon, tmp_path, "slow", sys.executable, "-c", SLOW_READER, header("slow")),
        Client(jobs, daemon, tmp_path, "fast", curl, "-s", "-H", header("fast")),
    ]
    # Equal shares, one of them hardly used, would make it ten or eleven to one.
    assert_soon(lambda slow, fast: fast > 14 * slow, clients, rate, settling_seconds=8)

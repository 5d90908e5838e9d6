"""The count after faults: the daemon killed, the database gone, both."""

import contextlib
import http.client
import json
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exportd.db.migrate import migrate_up
from tests.integration.test_main_job import SlowDownload
from tests.support.application import ANN, Jobs, Package, bearer, noise
from tests.support.cluster import unused_port
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.postgres import OwnServer, database_dsn, query

# What the socket held when the daemon was killed still goes out; so the package is much larger than that.
SIZE = 50_000_000
RATE = 10_000_000


def count_of(dsn: str, job_id: object) -> int:
    ((count,),) = query(dsn, "SELECT download_count FROM export_jobs WHERE job_id = %s", (str(job_id),))
    return int(count)


def outcomes(dsn: str) -> list[str]:
    return [outcome for (outcome,) in query(dsn, "SELECT outcome FROM download_events")]


def running(dsn: str) -> int:
    ((number,),) = query(dsn, "SELECT count(*) FROM exportd_running")
    return int(number)


class Resuming:
    """A client that takes up again where it was cut off, until it has the whole."""

    def __init__(self, port: int, package: Package) -> None:
        self.received = bytearray()
        self._port = port
        self._package = package
        self.is_whole = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def finish(self) -> bytes:
        self._thread.join(60)
        return bytes(self.received)

    def _run(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.received) < len(self._package.content) and time.monotonic() < deadline:
            with contextlib.suppress(OSError, http.client.HTTPException):
                self._continue()
        self.is_whole.set()

    def _continue(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
        try:
            fields = {"Range": f"bytes={len(self.received)}-"} if self.received else {}
            connection.request("GET", self._package.url, headers={**ANN, **fields})
            response = connection.getresponse()
            if response.status not in (200, 206):
                time.sleep(0.05)
                return
            while data := response.read1(65536):
                self.received += data
        finally:
            connection.close()


@pytest.fixture
def jobs(exportd: Exportd, dsn: str) -> Jobs:
    exportd.storage.mkdir(parents=True)
    return Jobs(dsn, exportd.storage)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_a_resume_after_a_kill_at_any_moment_is_one_download(
    exportd: Exportd, jobs: Jobs, dsn: str, seed: int
) -> None:
    moments = random.Random(seed)
    package = jobs.add(noise(SIZE))
    port = unused_port()
    environ = {
        "EXPORTD_SERVER__PORT": str(port),
        "EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND": str(RATE),
    }
    daemon = exportd.serve(**environ)
    assert daemon.port == port
    client = Resuming(port, package)
    for _ in range(moments.choice([1, 2])):
        wait_for("a running delivery", lambda: running(dsn))
        client.is_whole.wait(moments.uniform(0, 0.3))
        daemon.stop(signal.SIGKILL)
        daemon = exportd.serve(**environ)
        assert daemon.port == port
    assert client.finish() == package.content
    wait_for("the count", lambda: count_of(dsn, package.job_id))
    assert daemon.stop() == 0
    assert count_of(dsn, package.job_id) == 1
    assert {"lost", "completed"} <= set(outcomes(dsn))
    assert running(dsn) == 0


class Load:
    """Clients that download one package after the other, each on a connection of its own. The clients
    ``in_parts`` are users of their own, and request the package in two parts."""

    def __init__(self, port: int, package: Package, clients: int, in_parts: int = 0) -> None:
        self.completed = 0
        self.refused: list[tuple[int, str, str | None]] = []
        self.clients = clients
        self._port = port
        self._package = package
        self._stop = threading.Event()
        self._lock = threading.Lock()
        half = len(package.content) // 2
        whole, parts = (None,), (f"bytes=0-{half - 1}", f"bytes={half}-")
        self._threads = [threading.Thread(target=self._run, args=(ANN, whole)) for _ in range(clients)]
        for number in range(in_parts):
            user = bearer(f"user {number}", "admin")
            self._threads.append(threading.Thread(target=self._run, args=(user, parts)))
        for thread in self._threads:
            thread.start()

    def finish(self) -> int:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
        return self.completed

    def _run(self, user: dict[str, str], ranges: tuple[str | None, ...]) -> None:
        received: list[bytes] = []
        while not self._stop.is_set():
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=30)
                with contextlib.closing(connection):
                    while not self._stop.is_set():
                        wanted = ranges[len(received)]
                        fields = {"Range": wanted} if wanted else {}
                        connection.request("GET", self._package.url, headers={**user, **fields})
                        response = connection.getresponse()
                        body = response.read()
                        if self._is_served(response, body):
                            received.append(body)
                        if len(received) == len(ranges):
                            with self._lock:
                                self.completed += b"".join(received) == self._package.content
                            received = []

    def _is_served(self, response: http.client.HTTPResponse, body: bytes) -> bool:
        with self._lock:
            if response.status not in (200, 206):
                retry_after = response.getheader("Retry-After")
                self.refused.append((response.status, json.loads(body)["code"], retry_after))
        return response.status in (200, 206)


def test_a_kill_under_load_loses_at_most_the_last_download_of_each_connection(
    exportd: Exportd, jobs: Jobs, dsn: str
) -> None:
    package = jobs.add(noise(30_000))
    daemon = exportd.serve()
    load = Load(daemon.port, package, clients=8)
    wait_for("some downloads", lambda: load.completed > 100)
    daemon.stop(signal.SIGKILL)
    completed = load.finish()
    counted = count_of(dsn, package.job_id)
    # Nothing else is answered on a connection before the count is durable.
    assert completed - load.clients <= counted <= completed + load.clients
    assert query(dsn, "SELECT count(*) FROM download_events WHERE outcome = 'completed'") == [(counted,)]


@pytest.fixture
def on_own_server(tmp_path: Path, own_server: OwnServer) -> Iterator[tuple[Exportd, Jobs]]:
    dsn = database_dsn(own_server.server_dsn, "postgres")
    migrate_up(dsn)
    exportd = Exportd(tmp_path, dsn)
    exportd.storage.mkdir(parents=True)
    yield exportd, Jobs(dsn, exportd.storage)
    exportd.close()


def ask(daemon: Daemon, path: str) -> tuple[int, dict[str, object], str | None]:
    connection = http.client.HTTPConnection("127.0.0.1", daemon.port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=ANN)
        response = connection.getresponse()
        return response.status, json.loads(response.read()), response.getheader("Retry-After")


@pytest.mark.parametrize("killed", [False, True])
def test_downloads_under_way_when_the_database_goes_are_counted_when_it_is_back(
    on_own_server: tuple[Exportd, Jobs], own_server: OwnServer, killed: bool
) -> None:
    exportd, jobs = on_own_server
    package = jobs.add(noise(20_000_000))
    daemon = exportd.serve()
    slow = [SlowDownload(daemon, {"jobId": package.job_id}) for _ in range(3)]
    own_server.stop()
    # What was permitted goes on to its end; nothing new begins.
    for download in slow[:2]:
        connection_reads_whole(download, package)
    wait_for("the events to be spooled", lambda: daemon.events("events_spooled"))
    status, body, retry_after = ask(daemon, package.url)
    assert (status, body["code"]) == (503, "DATABASE_UNAVAILABLE")
    assert retry_after
    assert ask(daemon, "/readyz")[0] == 503
    wait_for("both events", lambda: spooled_lines(exportd) == 2)
    if killed:
        daemon.stop(signal.SIGKILL)
        own_server.start()
        daemon = exportd.serve()
        assert daemon.port
    else:
        own_server.start()
        connection_reads_whole(slow[2], package)
    wait_for("the replay", lambda: daemon.events("spool_replayed"))
    expected = 2 if killed else 3
    wait_for("the count", lambda: count_of(exportd.dsn, package.job_id) == expected)
    # It is back by itself.
    wait_for("readiness", lambda: ask(daemon, "/readyz")[0] == 200)
    connection_reads_whole(SlowDownload(daemon, {"jobId": package.job_id}), package)
    wait_for("the count", lambda: count_of(exportd.dsn, package.job_id) == expected + 1)
    assert daemon.stop() == 0
    assert count_of(exportd.dsn, package.job_id) == expected + 1
    assert spooled_lines(exportd) == 0
    for download in slow:
        download.connection.close()


@pytest.mark.parametrize("fault", ["stop", "kill"])
def test_a_database_that_restarts_under_load_costs_no_count(
    on_own_server: tuple[Exportd, Jobs], own_server: OwnServer, fault: str
) -> None:
    exportd, jobs = on_own_server
    package = jobs.add(noise(30_000))
    daemon = exportd.serve(EXPORTD_LIMITS__REQUESTS_PER_MINUTE_PER_ADDRESS="0")
    load = Load(daemon.port, package, clients=6, in_parts=4)
    for turn in range(1, 4):
        wait_for("some downloads", lambda turn=turn: load.completed > 100 * turn)
        getattr(own_server, fault)()
        before = len(load.refused)
        wait_for("a refusal", lambda before=before: len(load.refused) > before)
        own_server.start()
        served = load.completed
        wait_for("downloads again", lambda served=served: load.completed > served)
    completed = load.finish()
    assert {refusal[:2] for refusal in load.refused} == {(503, "DATABASE_UNAVAILABLE")}
    assert all(refusal[2] for refusal in load.refused)
    assert daemon.stop() == 0
    if spooled_lines(exportd):
        daemon = exportd.serve()
        assert daemon.port
        assert daemon.stop() == 0
    assert count_of(exportd.dsn, package.job_id) == completed


def spooled_lines(exportd: Exportd) -> int:
    files = (exportd.folder / "data" / "ledger").glob("*.spool")
    lines = [line for file in files for line in file.read_text().splitlines() if line]
    return sum('"outcome":"running"' not in line for line in lines)


def connection_reads_whole(download: SlowDownload, package: Package) -> None:
    """Reads one answer and leaves the connection open: the daemon must not need its end."""
    head, _, body = download.received.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200")
    parts = [body]
    left = len(package.content) - len(body)
    while left:
        data = download.connection.recv(1 << 20)
        assert data
        parts.append(data)
        left -= len(data)
    assert b"".join(parts) == package.content
    download.connection.close()

"""What is in deploy/: the unit, and nginx in front, with a real nginx."""

import hashlib
import os
import re
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import trustme

from tests.support.application import ANN, BASE, Jobs, Package, noise
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.postgres import query
from tests.support.programs import require

pytestmark = pytest.mark.slow

DEPLOY = Path(__file__).parent.parent.parent / "deploy"
DEPLOYMENT = (DEPLOY.parent / "docs" / "deployment.md").read_text()
GIB = 1024**3


def test_the_unit_is_as_hardened_as_the_page_says() -> None:
    command = [require("systemd-analyze"), "security", "--offline=true", str(DEPLOY / "exportd.service")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    found = re.search(r"Overall exposure level for exportd.service: ([\d.]+)", done.stdout)
    assert found, done.stderr
    said = re.search(r"exposure level of ([\d.]+)", DEPLOYMENT)
    assert said
    assert float(found[1]) <= float(said[1]) + 0.3  # versions of systemd weigh a little differently


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("is_abstract", [False, True])
def test_systemd_is_told_when_it_serves_and_when_it_stops(
    exportd: Exportd, tmp_path: Path, workers: int, is_abstract: bool
) -> None:
    address = f"@exportd-test-{tmp_path.name}" if is_abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(address.replace("@", "\0", 1) if is_abstract else address)
        manager.settimeout(60)
        daemon = exportd.serve("--workers", workers, NOTIFY_SOCKET=address)
        # Under gunicorn, which tells it too.
        assert manager.recv(100).startswith(b"READY=1")
        with urllib.request.urlopen(f"{daemon.url}/healthz") as response:
            assert response.status == 200
        assert daemon.stop() == 0
        while not manager.recv(100).startswith(b"STOPPING=1"):
            pass


def test_a_missing_notify_socket_is_ignored(exportd: Exportd, tmp_path: Path) -> None:
    daemon = exportd.serve(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    assert daemon.url
    assert daemon.stop() == 0


def test_the_container_s_health_check_works(exportd: Exportd) -> None:
    daemon = exportd.serve()
    line = re.search(r'\["python", "-c", "(.*)"\]', (DEPLOY / "Dockerfile").read_text())
    assert line
    code = line[1].replace("8080", str(daemon.port))
    assert subprocess.run(["python3", "-c", code], timeout=60, check=False).returncode == 0
    daemon.stop()
    assert subprocess.run(["python3", "-c", code], timeout=60, check=False, stderr=-3).returncode != 0


class Nginx:
    """A real nginx with deploy/nginx.conf, of which only addresses and paths are others."""

    def __init__(self, folder: Path, daemon: Daemon) -> None:
        program = require("nginx")
        authority = trustme.CA()
        certificate = authority.issue_cert("127.0.0.1")
        certificate.private_key_and_cert_chain_pem.write_to_path(str(folder / "tls.pem"))
        self.tls = ssl.create_default_context()
        authority.configure_trust(self.tls)
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        text = (DEPLOY / "nginx.conf").read_text()
        for ours, theirs in (
            (r"server 127\.0\.0\.1:8080", f"server 127.0.0.1:{daemon.port}"),
            (r"listen 443", f"listen 127.0.0.1:{self.port}"),
            (r"listen \[::\].*", ""),
            (r"server_name .*", "server_name 127.0.0.1;"),
            (r"/etc/ssl/\S+;", f"{folder}/tls.pem;"),
            (r"/var/log/nginx", str(folder)),
        ):
            text, count = re.subn(ours, theirs, text)
            assert count, ours
        (folder / "site.conf").write_text(text)
        self.temporary = folder / "proxy-temp"
        (folder / "nginx.conf").write_text(
            f"daemon off; pid {folder}/pid; error_log {folder}/error.log; worker_processes 1;"
            f" {'user root;' if os.geteuid() == 0 else ''}"
            f" events {{ worker_connections 1024; }} http {{ proxy_temp_path {self.temporary};"
            f" client_body_temp_path {folder}/body; include {folder}/site.conf; }}"
        )
        self.folder = folder
        self.connections: list[ssl.SSLSocket] = []
        self.process = subprocess.Popen([program, "-c", str(folder / "nginx.conf"), "-p", str(folder)])

    def connect(self) -> ssl.SSLSocket:
        plain = wait_for("nginx", self._try)
        connection = self.tls.wrap_socket(plain, server_hostname="127.0.0.1")
        self.connections.append(connection)
        return connection

    def _try(self) -> socket.socket | None:
        assert self.process.poll() is None
        try:
            return socket.create_connection(("127.0.0.1", self.port), timeout=60)
        except ConnectionRefusedError:
            return None

    def ask(self, target: str, *fields: str) -> tuple[ssl.SSLSocket, int, dict[str, str], bytes]:
        """The connection, status and fields of an answer, and what came of its body with them."""
        connection = self.connect()
        lines = [f"GET {target} HTTP/1.1", "Host: 127.0.0.1", "Connection: close", *fields, "", ""]
        connection.sendall("\r\n".join(lines).encode("utf-8", "surrogateescape"))
        received = b""
        while b"\r\n\r\n" not in received:
            received += connection.recv(4096)
        head, _, rest = received.partition(b"\r\n\r\n")
        status, *answered = head.decode().split("\r\n")
        names = {name.lower(): value for name, _, value in (line.partition(": ") for line in answered)}
        return connection, int(status.split()[1]), names, rest

    def close(self) -> None:
        for connection in self.connections:
            connection.close()
        self.process.terminate()
        self.process.wait(30)

    def spooled(self) -> list[Path]:
        return [path for path in self.temporary.rglob("*") if path.is_file()]


@pytest.fixture
def daemon(exportd: Exportd) -> Daemon:
    exportd.storage.mkdir(parents=True)
    return exportd.serve(
        EXPORTD_SERVER__TRUSTED_PROXIES='["127.0.0.1"]', EXPORTD_SERVER__ALLOWED_HOSTS='["127.0.0.1"]'
    )


@pytest.fixture
def nginx(daemon: Daemon, tmp_path: Path) -> Iterator[Nginx]:
    folder = tmp_path / "nginx"
    folder.mkdir()
    running = Nginx(folder, daemon)
    yield running
    running.close()


@pytest.fixture
def large(exportd: Exportd, daemon: Daemon) -> Package:
    """A package of more than a gibibyte, most of it a hole."""
    jobs = Jobs(exportd.dsn, exportd.storage)
    package = jobs.add()
    with package.file.open("wb") as file:
        file.write(noise(1_000_000))
        file.seek(GIB + 100_000_000)
        file.write(noise(1_000_001))
    query(
        jobs.dsn,
        "UPDATE export_jobs SET package_size_bytes = %s, package_sha256 = NULL",
        (package.file.stat().st_size,),
    )
    return package


AUTHORIZATION = f"Authorization: {ANN['Authorization']}"


def test_more_than_a_gigabyte_comes_through_and_touches_no_disk(
    daemon: Daemon, nginx: Nginx, large: Package
) -> None:
    connection, status, fields, start = nginx.ask(large.url, AUTHORIZATION)
    assert (status, int(fields["content-length"])) == (200, large.file.stat().st_size)
    assert "strict-transport-security" in fields
    time.sleep(2)  # a client that lets nginx get ahead, if it would
    assert nginx.spooled() == []
    digest, size = hashlib.sha256(start), len(start)
    while data := connection.recv(1 << 20):
        digest.update(data)
        size += len(data)
    assert size == large.file.stat().st_size
    with large.file.open("rb") as file:
        assert digest.digest() == hashlib.file_digest(file, "sha256").digest()
    assert nginx.spooled() == []
    event = daemon.wait_for_event("download_completed")
    assert event["bytes_acknowledged"] == size


def test_a_resume_through_nginx_goes_on_where_it_was(nginx: Nginx, large: Package) -> None:
    size = large.file.stat().st_size
    etag = nginx.ask(large.url, AUTHORIZATION, "Range: bytes=0-0")[2]["etag"]
    connection, status, fields, body = nginx.ask(
        large.url, AUTHORIZATION, f"Range: bytes={size - 2_000_000}-", f"If-Range: {etag}"
    )
    assert (status, fields["content-range"]) == (206, f"bytes {size - 2_000_000}-{size - 1}/{size}")
    while data := connection.recv(1 << 20):
        body += data
    with large.file.open("rb") as file:
        file.seek(size - 2_000_000)
        assert body == file.read()


def test_a_client_that_leaves_is_noticed_and_credited_with_little_more(
    daemon: Daemon, nginx: Nginx, large: Package
) -> None:
    connection, _, _, body = nginx.ask(large.url, AUTHORIZATION)
    taken = len(body)
    while taken < 50_000_000:
        taken += len(connection.recv(1 << 20))
    time.sleep(1)
    connection.close()
    event = daemon.wait_for_event("download_aborted")
    assert re.search(r"at most two receive buffers and one send buffer", DEPLOYMENT)
    buffers = 2 * largest_buffer("tcp_rmem") + largest_buffer("tcp_wmem")
    assert 0 <= event["bytes_acknowledged"] - taken <= buffers + 1_000_000  # and what nginx itself holds


def largest_buffer(setting: str) -> int:
    """The kernel's limit for a TCP socket's buffer, in bytes."""
    return int(Path("/proc/sys/net/ipv4", setting).read_text().split()[2])


def test_an_address_has_so_many_connections(daemon: Daemon, nginx: Nginx, large: Package) -> None:
    answers = [nginx.ask(large.url, AUTHORIZATION) for _ in range(257)]
    assert [status for _, status, _, _ in answers] == [200] * 256 + [429]
    assert answers[-1][2]["server"] == "nginx"


def test_errors_and_addresses_come_through_and_tickets_stay_out_of_logs(
    daemon: Daemon, nginx: Nginx, large: Package
) -> None:
    connection, status, fields, body = nginx.ask(f"{BASE}/x/download?ticket=secret-ticket")
    assert (status, fields["content-type"]) == (400, "application/json")
    while data := connection.recv(4096):
        body += data
    assert b"INVALID_JOB_ID" in body
    assert nginx.ask("/metrics")[1] == 404
    nginx.ask(large.url, AUTHORIZATION, "Range: bytes=0-9")
    event = daemon.wait_for_event("download_completed")
    assert event["client"] == "127.0.0.1"
    daemon.stop()
    assert nginx.ask(f"{BASE}?ticket=secret-ticket")[1] == 502
    logs = [path.read_text() for path in nginx.folder.glob("*.log")]
    assert logs
    assert "secret-ticket" not in "".join(logs) + str(daemon.log)


def test_no_user_gets_the_answer_to_another_user_through_nginx(exportd: Exportd, tmp_path: Path) -> None:
    """nginx keeps its connections to exportd: a second answer to one request would go to the next one."""
    exportd.storage.mkdir(parents=True)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    daemon = exportd.serve(
        "--port", port, EXPORTD_LOGGING__FORMAT="console", EXPORTD_SERVER__TRUSTED_PROXIES='["127.0.0.1"]'
    )
    # In this format no line is JSON.
    daemon.url = f"http://127.0.0.1:{port}"
    (tmp_path / "nginx").mkdir()
    nginx = Nginx(tmp_path / "nginx", daemon)
    jobs = Jobs(exportd.dsn, exportd.storage)
    anns = jobs.add(noise(50_000))
    try:
        wait_for("the daemon", lambda: nginx.ask("/healthz")[1] == 200)
        for _ in range(20):
            # Bytes that are no UTF-8 become lone surrogates, which the log's format cannot encode.
            _, status, fields, body = nginx.ask(anns.url, AUTHORIZATION, "User-Agent: \udcff")
            assert (status, fields["content-length"]) == (200, "50000")
            assert anns.content.startswith(body)
            _, status, _, body = nginx.ask("/healthz")
            assert (status, body) == (200, b'{"status":"ok"}')
    finally:
        nginx.close()
    assert daemon.stop() == 0
    assert jobs.counts(anns) == (20, 20 * 50_000)
    assert "request_failed" not in daemon.output.read_text()


def unacknowledged_bytes(port: int) -> int:
    """In the send queues of that port's connections, as the kernel tells it."""
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    established = [row for row in rows if row[3] == "01" and row[1].endswith(f":{port:04X}")]
    return sum(int(row[4].partition(":")[0], 16) for row in established)


def test_clients_that_read_nothing_through_nginx_leave_the_daemon_its_connections(
    exportd: Exportd, tmp_path: Path
) -> None:
    daemon = exportd.serve(
        EXPORTD_SERVER__TRUSTED_PROXIES='["127.0.0.1"]', EXPORTD_DOWNLOAD__STALL_TIMEOUT_SECONDS="1"
    )
    (tmp_path / "nginx").mkdir()
    nginx = Nginx(tmp_path / "nginx", daemon)
    try:
        for _ in range(10):
            connection = nginx.connect()
            request = "GET /api-docs/swagger-ui-bundle.js HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            connection.sendall(request.encode() * 10)

        wait_for("answers that are not taken", lambda: unacknowledged_bytes(daemon.port))
        wait_for("the end of their connections", lambda: not unacknowledged_bytes(daemon.port))
        assert nginx.ask("/healthz")[1] == 200
    finally:
        nginx.close()

"""What comes over a socket before it is a request, and what is none: the real command answers."""

import contextlib
import json
import resource
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests.support.application import ANN, BASE, Jobs, Package, noise
from tests.support.daemon import Daemon, Exportd, serve_https, wait_for
from tests.support.scrape import samples_of

HOST = b"Host: localhost\r\n"


def converse(daemon: Daemon, sent: bytes, seconds: float = 20.0) -> bytes:
    """Everything the daemon says to these bytes, until it closes or the other side has said all it will."""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=seconds) as client:
        with contextlib.suppress(ConnectionError):
            client.sendall(sent)
        received = b""
        with contextlib.suppress(ConnectionError):
            while data := client.recv(65536):
                received += data
    return received


def answers(received: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Status, fields and body of each answer."""
    found = []
    while received:
        head, separator, rest = received.partition(b"\r\n\r\n")
        assert separator, received
        status, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        length = int(fields.get("content-length", 0))
        found.append((int(status.split()[1]), fields, rest[:length]))
        received = rest[length:]
    return found


def download(package: Package) -> bytes:
    return f"GET {package.url} HTTP/1.1\r\nHost: x\r\nAuthorization: {ANN['Authorization']}\r\n\r\n".encode()


def metric(daemon: Daemon, name: str) -> float:
    with urllib.request.urlopen(f"{daemon.url}/metrics") as response:
        return samples_of(response.read().decode()).get(name, 0)


GET = b"GET /healthz HTTP/1.1\r\n" + HOST
END = b"Connection: close\r\n\r\n"
SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
JOBS = BASE.encode()

# Bytes, and the statuses that are right for them: one answer for each request, whatever the rest could mean.
MALFORMED: dict[str, bytes] = {
    "no request": b"hello\r\n\r\n",
    "an early TLS hello": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 100 + b"\r\n\r\n",
    "HTTP/2's preface": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "a method of its own": b"GE\0T /healthz HTTP/1.1\r\n" + HOST + b"\r\n",
    "length and chunks": b"POST /healthz HTTP/1.1\r\n" + HOST
    + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "two lengths": b"POST /healthz HTTP/1.1\r\n" + HOST
    + b"Content-Length: 0\r\nContent-Length: 35\r\n\r\n" + SMUGGLED,
    "a list of lengths": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 0, 35\r\n\r\n" + SMUGGLED,
    "a signed length": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: +0\r\n\r\n" + SMUGGLED,
    "a negative length": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: -1\r\n\r\n" + SMUGGLED,
    "a huge length": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 9999999999999999999999\r\n\r\n",
    "an unknown coding": b"POST /healthz HTTP/1.1\r\n" + HOST
    + b"Transfer-Encoding: xchunked\r\n\r\n" + SMUGGLED,
    "a coding after chunked": b"POST /healthz HTTP/1.1\r\n" + HOST
    + b"Transfer-Encoding: chunked, gzip\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a space before the colon": GET + b"Content-Length : 35\r\n\r\n" + SMUGGLED,
    "a folded field": GET + b"A: b\r\n Content-Length: 35\r\n\r\n" + SMUGGLED,
    "a field without a colon": GET + b"nonsense\r\n\r\n",
    "a field without a name": GET + b": x\r\n\r\n",
    "NUL in a field": GET + b"A: b\0c\r\n\r\n",
    "a bare CR in a field": GET + b"A: b\rContent-Length: 35\r\n\r\n" + SMUGGLED,
    "a bad chunk": b"POST /healthz HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
    "two hosts": b"GET /nothing HTTP/1.1\r\nHost: a\r\nHost: b\r\n" + END,
    "chunks in HTTP/1.0": b"POST /healthz HTTP/1.0\r\nConnection: keep-alive\r\n" + HOST
    + b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "another coding first": b"POST /healthz HTTP/1.1\r\n" + HOST
    + b"Transfer-Encoding: identity, chunked\r\n\r\n0\r\n\r\n" + SMUGGLED,
    "a user in the host": b"GET /nothing HTTP/1.1\r\nHost: x@localhost\r\n" + END,
    "a path in the host": b"GET /nothing HTTP/1.1\r\nHost: localhost/x\r\n" + END,
    "a fragment in the host": b"GET /nothing HTTP/1.1\r\nHost: localhost#x\r\n" + END,
    "a port that is none": b"GET /nothing HTTP/1.1\r\nHost: localhost:x\r\n" + END,
    "no host": b"GET /nothing HTTP/1.1\r\n" + END,
}  # fmt: skip


@pytest.fixture(scope="module")
def daemon(shared_exportd: Exportd) -> Daemon:
    return shared_exportd.serve(EXPORTD_SERVER__HEAD_TIMEOUT_SECONDS="2")


def test_a_malformed_request_gets_one_error_response(daemon: Daemon) -> None:
    wrong = {}
    for name, sent in MALFORMED.items():
        found = answers(converse(daemon, sent))
        refused = [status for status, _, _ in found if status not in (200, 405)]
        if refused != [400] or len(found) > 2:
            wrong[name] = found
            continue
        _, fields, body = found[-1]
        error = json.loads(body)
        assert error["code"] == "BAD_REQUEST", name
        assert error["requestId"] == fields["x-request-id"]
        assert fields["x-content-type-options"] == "nosniff"
        assert (fields["server"], fields["cache-control"]) == ("exportd", "no-store")
    assert not wrong
    assert b"smuggled" not in json.dumps(daemon.log).encode()
    # Some are HTTP, and refused by the edge.
    assert metric(daemon, 'exportd_connections_refused_total{reason="malformed"}') >= len(MALFORMED) - 8
    assert not [line for line in daemon.log if line["level"] == "error"]


@pytest.mark.parametrize("version", ["0.9", "2.0", "3.0", "1.2", "9.9"])
def test_another_version_of_http_is_505(daemon: Daemon, version: str) -> None:
    received = converse(daemon, f"GET /healthz HTTP/{version}\r\n".encode() + HOST + b"\r\n")
    assert received.startswith(b"HTTP/1.")
    ((status, _, body),) = answers(received)
    assert (status, json.loads(body)["code"]) == (505, "HTTP_VERSION_NOT_SUPPORTED")


@pytest.mark.parametrize(
    ("target", "statuses"),
    [
        (b"http://localhost/healthz", {200}), (b"//healthz", {404}), (b"/%00", {404}),
        (b"/%2e%2e/%2e%2e/etc/passwd", {404}), (b"/\xc3\xa9", {400, 404}), (b"*", {400, 404}),
        (b"/../healthz", {200, 404}), (b"healthz", {400, 404}), (b"http://[::1", {400}),
        (b"/healthz?" + b"x" * 5000, {200}), (JOBS + b"/%2e%2e%2f%2e%2e", {400, 404}),
        (b"http://a:b:c/", {400}), (b"/%zz", {404}), (b"/a b", {400}),
        (JOBS + b"/\xff/download", {400, 401, 404}),
        (JOBS + b"?limit=%ff", {401}),
    ],
)  # fmt: skip
def test_a_strange_target_is_answered(daemon: Daemon, target: bytes, statuses: set[int]) -> None:
    ((status, fields, _),) = answers(converse(daemon, b"GET " + target + b" HTTP/1.1\r\n" + HOST + END))
    assert status in statuses
    assert fields["server"] == "exportd"
    assert not [line for line in daemon.log if line["level"] == "error"]


@pytest.mark.parametrize("method", ["TRACE", "CONNECT", "OPTIONS", "PUT", "PROPFIND", "BREW"])
def test_a_strange_method_is_answered(daemon: Daemon, method: str) -> None:
    for target in ("/healthz", f"{BASE}/x/download", "*", "localhost:80"):
        request = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        ((status, fields, body),) = answers(converse(daemon, request.encode()))
        assert status in (400, 404, 405), (target, body)
        assert fields["content-type"].startswith("application/json")


def test_malformed_requests_count_as_requests_and_fill_no_log(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_LIMITS__REQUESTS_PER_MINUTE_PER_ADDRESS="5")
    found = [answers(converse(daemon, b"nonsense\r\n\r\n"))[0] for _ in range(12)]
    assert [status for status, _, _ in found] == [400] * 5 + [429] * 7
    assert json.loads(found[-1][2])["limit"] == "requests_per_minute_per_address"
    assert int(found[-1][1]["retry-after"]) > 0
    assert len(daemon.events("request_malformed")) == 1


def test_a_429_closes_the_connection(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_LIMITS__REQUESTS_PER_MINUTE_PER_ADDRESS="2")
    request = b"GET /nothing HTTP/1.1\r\n" + HOST + b"\r\n"
    found = answers(converse(daemon, request * 5))
    assert [status for status, _, _ in found] == [404, 404, 429]
    assert found[-1][1]["connection"] == "close"


def test_metrics_are_for_those_who_may(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_SERVER__METRICS_FROM='["10.0.0.0/8"]')
    ask = b"GET /metrics HTTP/1.1\r\n" + HOST + END
    ((status, _, body),) = answers(converse(daemon, ask))
    assert (status, json.loads(body)["code"]) == (404, "NOT_FOUND")
    proxied = exportd.serve(EXPORTD_SERVER__TRUSTED_PROXIES='["127.0.0.1"]')
    assert answers(converse(proxied, ask))[0][0] == 200
    outside = b"GET /metrics HTTP/1.1\r\nX-Forwarded-For: 203.0.113.7\r\n" + HOST + END
    assert answers(converse(proxied, outside))[0][0] == 404


def test_an_upgrade_is_not_taken(daemon: Daemon) -> None:
    request = GET + b"Connection: Upgrade, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n"
    ((status, _, _),) = answers(converse(daemon, request))
    assert status == 200


def test_an_expectation_is_met_or_refused(daemon: Daemon) -> None:
    link = b"POST " + JOBS + b"/x/download-link HTTP/1.1\r\n" + HOST
    found = answers(converse(daemon, link + b"Expect: 100-continue\r\nContent-Length: 2\r\n" + END + b"{}"))
    assert [status for status, _, _ in found] == [400]
    found = answers(converse(daemon, link + b"Expect: the-unexpected\r\n" + END))
    assert [status for status, _, _ in found] == [417]


def test_a_body_that_nobody_asked_for_ends(daemon: Daemon) -> None:
    sent = b"GET /healthz HTTP/1.1\r\n" + HOST + b"Content-Length: 100000000000\r\n\r\n" + b"x" * 1_000_000
    ((status, _, _),) = answers(converse(daemon, sent))
    assert status == 200


def test_a_body_is_not_unpacked(daemon: Daemon) -> None:
    """A small one could become as large as it likes."""
    body = GET + b"Content-Encoding: deflate\r\nContent-Length: 7\r\n\r\ngarbage"
    assert [status for status, _, _ in answers(converse(daemon, body + GET + END))] == [200, 200]


def test_a_head_that_is_too_large_is_told_so(daemon: Daemon) -> None:
    for head in (
        b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\n" + HOST + b"\r\n",
        GET + b"A: " + b"x" * 20_000 + b"\r\n\r\n",
        GET + b"".join(b"A%d: x\r\n" % n for n in range(500)) + b"\r\n",
    ):
        ((status, _, body),) = answers(converse(daemon, head))
        assert status == 431
        assert json.loads(body)["code"] == "HEADERS_TOO_LARGE"


def test_a_head_that_comes_slowly_is_cut_off(daemon: Daemon) -> None:
    """Slowloris: neither silence nor a byte now and then holds a connection, before or after a request."""
    begun = time.monotonic()
    assert converse(daemon, b"") == b""
    assert converse(daemon, GET) == b""
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as client:
        client.sendall(GET + b"\r\n")
        assert b"200 OK" in client.recv(65536)
        client.settimeout(0.2)
        with contextlib.suppress(ConnectionError):
            for byte in b"GET /healthz HTTP/1.1\r\n" * 10:
                client.sendall(bytes([byte]))
                with contextlib.suppress(TimeoutError):
                    if not client.recv(1):
                        break
            else:
                pytest.fail("the connection was never cut off")
    assert time.monotonic() - begun > 4
    assert metric(daemon, 'exportd_connections_refused_total{reason="slow_head"}') == 3


def test_an_idle_connection_is_closed_and_a_busy_one_is_not(exportd: Exportd) -> None:
    exportd.storage.mkdir(parents=True)
    package = Jobs(exportd.dsn, exportd.storage).add(noise(3_000_000))
    daemon = exportd.serve(
        EXPORTD_SERVER__KEEPALIVE_TIMEOUT_SECONDS="1",
        EXPORTD_SERVER__HEAD_TIMEOUT_SECONDS="1",
        EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND="1000000",
    )
    ((status, _, body),) = answers(converse(daemon, download(package)))
    assert (status, body) == (200, package.content)
    daemon.wait_for_event("download_completed")


@pytest.mark.parametrize("workers", [1, 2])
def test_more_connections_than_allowed_are_closed(exportd: Exportd, workers: int) -> None:
    daemon = exportd.serve(
        "--workers", workers, EXPORTD_SERVER__MAX_CONNECTIONS="5", EXPORTD_SERVER__HEAD_TIMEOUT_SECONDS="3"
    )
    url = daemon.url
    idle = [socket.create_connection(("127.0.0.1", daemon.port)) for _ in range(5 * workers + 10)]
    daemon.wait_for_event("connections_exhausted")
    assert daemon.events("connections_exhausted")[0]["limit"] == 5

    def answered() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/healthz") as response:
            return bool(response.status == 200)
        return False

    # The idle ones are gone by their own limit.
    wait_for("an answer", answered)
    for client in idle:
        client.close()


def test_connections_of_an_address_are_limited_and_those_of_a_proxy_are_not(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_LIMITS__CONNECTIONS_PER_ADDRESS="3")
    held = [open_connection(daemon) for _ in range(3)]
    refused = open_connection(daemon)
    assert not is_answered(refused)
    held.pop().close()

    def finds_room() -> bool:
        with open_connection(daemon) as another:
            return is_answered(another)

    wait_for("the place of the one that left", finds_room)
    assert metric_of(held[0], 'exportd_connections_refused_total{reason="too_many_of_address"}') >= 1
    proxied = exportd.serve(
        EXPORTD_LIMITS__CONNECTIONS_PER_ADDRESS="3", EXPORTD_SERVER__TRUSTED_PROXIES='["127.0.0.1"]'
    )
    many = [open_connection(proxied) for _ in range(9)]
    assert all(map(is_answered, many))
    for client in (*held, refused, *many):
        client.close()


def open_connection(daemon: Daemon) -> socket.socket:
    return socket.create_connection(("127.0.0.1", daemon.port), timeout=20)


def is_answered(client: socket.socket, path: str = "/healthz") -> bool:
    """Whether the connection brings an answer; it is kept."""
    with contextlib.suppress(ConnectionError):
        client.sendall(f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        return client.recv(65536).startswith(b"HTTP/1.1 200 ")
    return False


def metric_of(client: socket.socket, name: str) -> float:
    """As ``metric``, by a connection that is open already."""
    client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = b""
    while data := client.recv(65536):
        received += data
    return samples_of(received.partition(b"\r\n\r\n")[2].decode()).get(name, 0)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_tls_client_that_never_says_hello_is_cut_off(
    exportd: Exportd, tmp_path: Path, workers: int
) -> None:
    daemon, context = serve_https(
        exportd, tmp_path, "--workers", workers, EXPORTD_SERVER__HEAD_TIMEOUT_SECONDS="1"
    )
    # The loop's own limit is a minute.
    silent = [socket.create_connection(("127.0.0.1", daemon.port), timeout=30) for _ in range(20)]
    for client in silent:
        assert client.recv(1) == b""
        client.close()
    with open_connection(daemon) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as client:
        assert is_answered(client)


def test_a_daemon_that_ran_out_of_descriptors_recovers(exportd: Exportd, tmp_path: Path) -> None:
    exportd.storage.mkdir(parents=True)
    package = Jobs(exportd.dsn, exportd.storage).add(noise(20_000_000))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    daemon = exportd.serve(
        under=("prlimit", "--nofile=200:200"),
        EXPORTD_SERVER__HEAD_TIMEOUT_SECONDS="3",
        EXPORTD_DOWNLOAD__MAX_RATE_BYTES_PER_SECOND="5000000",
    )
    assert (soft, hard) == resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=60) as client:
        client.sendall(download(package))
        received = client.recv(65536)
        idle = []
        for _ in range(300):
            with contextlib.suppress(OSError):
                idle.append(socket.create_connection(("127.0.0.1", daemon.port), timeout=5))
        while len(received) < len(package.content):
            received += client.recv(65536)
    for held in idle:
        held.close()
    ((status, _, body),) = answers(received)
    assert (status, body) == (200, package.content)
    assert daemon.events("connections_exhausted")

    def answered() -> bool:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{daemon.url}/readyz") as response:
            return bool(response.status == 200)
        return False

    wait_for("an answer", answered)


def test_only_allowed_hosts_are_served(exportd: Exportd) -> None:
    daemon = exportd.serve(EXPORTD_SERVER__ALLOWED_HOSTS='["Downloads.example.com", "[::1]"]')

    def status(host: str, target: str = f"{BASE}") -> int:
        request = f"GET {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        ((status, _, _),) = answers(converse(daemon, request.encode()))
        return status

    assert (
        status("downloads.example.com") == status("DOWNLOADS.example.com:8080") == status("[::1]:80") == 401
    )
    for host in ("evil.example.com", "downloads.example.com.evil.com", "downloads.example.com@evil.com",
                 "127.0.0.1", "", "[", "a:b:c", "downloads.example.com:x", "\xe9"):  # fmt: skip
        assert status(host) in (400, 421), host
    assert status("downloads.example.com", f"http://evil.com{BASE}") == 421
    assert status("evil.com", f"http://downloads.example.com{BASE}") == 401
    assert status("127.0.0.1", "/healthz") == status("127.0.0.1", "/readyz") == 200
    assert (status("127.0.0.1", "/metrics"), status("downloads.example.com", "/metrics")) == (421, 200)


def test_pages_of_listed_origins_may_call(exportd: Exportd) -> None:
    exportd.storage.mkdir(parents=True)
    package = Jobs(exportd.dsn, exportd.storage).add(noise(3_000_000))
    daemon = exportd.serve(EXPORTD_SERVER__CORS_ORIGINS='["https://app.example.com"]')

    def ask(method: str, origin: str | None, **fields: str) -> tuple[int, dict[str, str]]:
        headers = {**fields, **({"Origin": origin} if origin else {})}
        request = urllib.request.Request(f"{daemon.url}{package.url}", method=method, headers=headers)
        try:
            with urllib.request.urlopen(request) as response:
                return response.status, dict(response.headers)
        except urllib.error.HTTPError as error:
            return error.code, dict(error.headers)

    listed = "https://app.example.com"
    status, headers = ask("OPTIONS", listed, **{"Access-Control-Request-Method": "GET"})
    assert status == 204
    assert headers["Access-Control-Allow-Origin"] == listed
    assert "Range" in headers["Access-Control-Allow-Headers"]
    for fields in (ANN, {}, {**ANN, "Range": "bytes=0-9"}, {**ANN, "Range": "bytes=9999999-"}):
        status, headers = ask("GET", listed, **fields)
        assert headers["Access-Control-Allow-Origin"] == listed
        assert {
            "Content-Disposition",
            "Content-Range",
            "ETag",
            "Repr-Digest",
            "X-Package-Size",
            "X-Request-ID",
        } <= set(headers["Access-Control-Expose-Headers"].split(", "))
        assert "Origin" in headers["Vary"]
        assert "Access-Control-Allow-Credentials" not in headers
    for origin in (
        "https://evil.example.com",
        "null",
        "https://app.example.com.evil.com",
        "http://app.example.com",
        None,
    ):
        status, headers = ask("GET", origin, **ANN)
        assert status == 200
        assert "Access-Control-Allow-Origin" not in headers
        assert "Origin" in headers["Vary"].split(", ")
    assert ask("OPTIONS", "https://evil.example.com", **{"Access-Control-Request-Method": "GET"})[0] == 405


def test_without_a_list_no_origin_is_mentioned(daemon: Daemon) -> None:
    request = urllib.request.Request(f"{daemon.url}/healthz", headers={"Origin": "https://app.example.com"})
    with urllib.request.urlopen(request) as response:
        assert "Access-Control-Allow-Origin" not in response.headers
        assert "Vary" not in response.headers

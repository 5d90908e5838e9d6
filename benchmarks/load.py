"""The clients. None of them may be what limits the figures: wrk and curl are written in C, and the
discarding client has the kernel throw the bytes away (``MSG_TRUNC``) instead of copying them."""

import contextlib
import hashlib
import json
import selectors
import shutil
import signal
import socket
import ssl
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

TIMEOUT_SECONDS = 120.0

_PIECE_BYTES = 1024 * 1024
_WRK_SCRIPT = Path(__file__).parent / "wrk.lua"


class LoadFailed(Exception):
    """A client did not get what it asked for. The message says what it got."""


class ClientMissing(Exception):
    """The program that makes the load is not installed."""


@dataclass(frozen=True)
class Target:
    """What to ask for, and of whom on loopback."""

    port: int
    path: str
    authorization: str
    size_bytes: int
    tls_authority: Path | None = None

    @property
    def url(self) -> str:
        scheme = "http" if self.tls_authority is None else "https"
        return f"{scheme}://127.0.0.1:{self.port}{self.path}"

    @property
    def request(self) -> bytes:
        lines = (f"GET {self.path} HTTP/1.1", "Host: 127.0.0.1", f"Authorization: {self.authorization}")
        return "\r\n".join([*lines, "", ""]).encode()


@dataclass(frozen=True)
class Discarded:
    """What the discarding client took: whole downloads, and how many it left unfinished at the end."""

    seconds: float
    received_bytes: int
    completed: int
    cut: int

    @property
    def bytes_per_second(self) -> float:
        return self.received_bytes / self.seconds


def is_listening(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def check_bytes(target: Target, sha256: str) -> None:
    """One download whose bytes are compared; it also warms the page cache. Raises LoadFailed."""
    request = urllib.request.Request(target.url, headers={"Authorization": target.authorization})
    context = ssl.create_default_context(cafile=target.tls_authority) if target.tls_authority else None
    with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS, context=context) as response:
        digest = hashlib.file_digest(response, "sha256").hexdigest()
    if digest != sha256:
        raise LoadFailed(f"{target.url}: wrong bytes")


def discard(targets: Sequence[Target], *, downloads: int = 1, seconds: float | None = None) -> Discarded:
    """Downloads each target over a connection of its own, ``downloads`` times or for ``seconds``.

    The clock runs from the first request to the last byte; connections are made before. Raises LoadFailed.
    """
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        connections = [stack.enter_context(_Connection(target)) for target in targets]
        started = time.monotonic()
        deadline = started + (TIMEOUT_SECONDS if seconds is None else seconds)
        for connection in connections:
            connection.ask()
            selector.register(connection.socket, selectors.EVENT_READ, connection)
        working = len(connections)
        while working and time.monotonic() < deadline:
            for key, _ in selector.select(0.1):
                connection = key.data
                if not connection.take():
                    continue
                if seconds is None and connection.completed == downloads:
                    selector.unregister(connection.socket)
                    working -= 1
                else:
                    connection.ask()
        elapsed = time.monotonic() - started
        if seconds is None and working:
            raise LoadFailed(f"{working} downloads were not over in {TIMEOUT_SECONDS} s")
        completed = sum(connection.completed for connection in connections)
        received = sum(connection.received_bytes for connection in connections)
        return Discarded(elapsed, received, completed, working)


class _Connection:
    """One connection of the discarding client, kept alive from download to download."""

    def __init__(self, target: Target) -> None:
        self.socket = socket.create_connection(("127.0.0.1", target.port), TIMEOUT_SECONDS)
        self.socket.setblocking(False)
        self.completed = 0
        self.received_bytes = 0
        self._target = target
        self._head = b""
        self._left: int | None = None

    def __enter__(self) -> "_Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def ask(self) -> None:
        self._head, self._left = b"", None
        self.socket.sendall(self._target.request)

    def take(self) -> bool:
        """Takes what is there; True at the end of a download."""
        try:
            if self._left is None:
                self._take_head()
            else:
                taken = self.socket.recv_into(_SCRATCH, min(_PIECE_BYTES, self._left), socket.MSG_TRUNC)
                if not taken:
                    raise LoadFailed(f"{self._target.url}: ended {self._left} bytes short")
                self.received_bytes += taken
                self._left -= taken
        except BlockingIOError:
            return False
        if self._left == 0:
            self.completed += 1
            return True
        return False

    def _take_head(self) -> None:
        data = self.socket.recv(4096)
        if not data:
            raise LoadFailed(f"{self._target.url}: ended before the headers did")
        self._head += data
        head, separator, body = self._head.partition(b"\r\n\r\n")
        if not separator:
            return
        status, _, fields = head.partition(b"\r\n")
        length = f"content-length: {self._target.size_bytes}".encode()
        if status.split()[1] != b"200" or length not in fields.lower().split(b"\r\n"):
            raise LoadFailed(f"{self._target.url}: {status.decode(errors='replace')}")
        self.received_bytes += len(body)
        self._left = self._target.size_bytes - len(body)


_SCRATCH = bytearray(_PIECE_BYTES)


@contextlib.contextmanager
def discarding(
    targets: Sequence[Target], *, downloads: int = 1, seconds: float | None = None
) -> Iterator["Future[Discarded]"]:
    """``discard`` in a process of its own while the block runs; the future has what it did."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        processes.submit(int).result(TIMEOUT_SECONDS)  # started before anything is measured
        yield processes.submit(discard, targets, downloads=downloads, seconds=seconds)


@dataclass(frozen=True)
class Storm:
    """What wrk did. Latencies run from the request to the last byte."""

    seconds: float
    requests: int
    p50_seconds: float
    p99_seconds: float

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds


def wrk(targets: Sequence[Target], folder: Path, *, connections: int, seconds: float) -> Storm:
    """Downloads the targets of one server in turn, over and over. Raises LoadFailed, ClientMissing."""
    with storming(targets, folder, connections=connections, seconds=seconds) as process:
        output, _ = process.communicate(timeout=seconds + TIMEOUT_SECONDS)
    return parse_wrk(output)


@contextlib.contextmanager
def storming(
    targets: Sequence[Target], folder: Path, *, connections: int, seconds: float
) -> Iterator["subprocess.Popen[str]"]:
    """wrk while the block runs; SIGINT makes it end early and print what it has."""
    program = find_client("wrk")
    paths = folder / "wrk-paths"
    paths.write_text("".join(f"{target.path}\n" for target in targets))
    line = [
        program,
        "-t1",
        f"-c{connections}",
        f"-d{seconds:.0f}s",
        "--timeout",
        "30s",
        "-s",
        str(_WRK_SCRIPT),
    ]
    line += [f"http://127.0.0.1:{targets[0].port}", "--", targets[0].authorization, str(paths)]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def end_early(process: "subprocess.Popen[str]") -> Storm:
    """Ends a running wrk; what it did until now."""
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=TIMEOUT_SECONDS)
    return parse_wrk(output)


def parse_wrk(output: str) -> Storm:
    """Reads the last line, which ``wrk.lua`` wrote. Raises LoadFailed."""
    try:
        said = json.loads(output.splitlines()[-1])
    except (ValueError, IndexError):
        raise LoadFailed(f"wrk: {output.strip() or 'no output'}") from None
    if said["failed"]:
        raise LoadFailed(f"wrk: {said['failed']} of {said['requests']} requests failed")
    return Storm(said["duration_us"] / 1e6, said["requests"], said["p50_us"] / 1e6, said["p99_us"] / 1e6)


def curl(target: Target, *options: str) -> float:
    """Seconds for one download by curl, thrown away; connecting counts. Raises LoadFailed, ClientMissing."""
    line = [find_client("curl"), "-sS", "-f", "-o", "/dev/null", "-w", "%{time_total} %{size_download}"]
    line += ["--max-time", str(TIMEOUT_SECONDS), "-H", f"Authorization: {target.authorization}", *options]
    if target.tls_authority is not None:
        line += ["--tlsv1.3", "--cacert", str(target.tls_authority)]
    done = subprocess.run([*line, target.url], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LoadFailed(f"curl: {done.stderr.strip()}")
    seconds, size = done.stdout.split()
    if int(size) != target.size_bytes:
        raise LoadFailed(f"{target.url}: {size} bytes of {target.size_bytes}")
    return float(seconds)


def find_client(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise ClientMissing(f"{name} is not installed (apt install {name})")
    return path

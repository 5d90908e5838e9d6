"""Many downloads at once: the sum of their rates, the loop's lag, and the memory that slow ones hold."""

import socket
import time
from contextlib import ExitStack
from functools import partial

from benchmarks import load, servers
from benchmarks.harness import GIB, KIB, MIB, Bench, BenchmarkBroken, in_turn, memory_bytes
from benchmarks.probe import read_recording
from benchmarks.report import Section, percentile
from benchmarks.servers import Server

CONNECTIONS = 100
SLOW_DOWNLOADS = 1000
FAST_CLIENTS = 4
# What each slow reader takes before it holds, and the receive buffer it asks for.
TAKEN_BYTES = 16 * KIB
RECEIVE_BUFFER_BYTES = 4 * KIB
HOLD_SECONDS = 3


def run(bench: Bench, section: Section) -> None:
    section.title = "many downloads at once, warm"
    _measure_sum(bench, section)
    _measure_lag(bench, section)
    for way in ("sendfile", "chunks"):
        held, growth = _measure_slow(bench, sendfile=way == "sendfile")
        section.hold(
            f"resident memory for each of {held} slow downloads, by {way}",
            growth / held / KIB,
            "KiB",
            at_most=48.0 if way == "sendfile" else None,
        )


def _measure_sum(bench: Bench, section: Section) -> None:
    package = bench.package(64 * MIB if bench.quick else GIB)
    rounds, seconds = (2, 1.0) if bench.quick else (5, 3.0)

    def measure(server: Server, connections: int) -> float:
        with server.counting(bench) as counted:
            done = load.discard([server.target(package)] * connections, seconds=seconds)
            counted.completed, counted.cut = done.completed, done.cut
        return done.bytes_per_second / 1e9

    with ExitStack() as stack:
        running = servers.start_all(
            stack, bench, {"exportd": servers.exportd, "nginx": servers.nginx}, section.missing
        )
        for server in running.values():
            with server.counting(bench) as counted:
                load.check_bytes(server.target(package), package.sha256)
                counted.completed = 1
        measurements = {
            _label(name, connections): partial(measure, server, connections)
            for name, server in running.items()
            for connections in (1, CONNECTIONS)
        }
        for name, values in in_turn(rounds, measurements).items():
            section.add("GB/s in sum", name, values)
    for name in running:
        section.compare(
            "GB/s in sum",
            _label(name, CONNECTIONS),
            _label(name, 1),
            at_least=0.9 if name == "exportd" else None,
        )


def _label(name: str, connections: int) -> str:
    return f"{name}, {connections} connection{'s' if connections > 1 else ''}"


def _measure_lag(bench: Bench, section: Section) -> None:
    package = bench.package(64 * MIB if bench.quick else GIB)
    seconds = 2.0 if bench.quick else 10.0
    recording = bench.folder / "lag-warm"
    with servers.exportd(bench, probe=recording) as server, server.counting(bench) as counted:
        target = server.target(package)
        load.discard([target])
        started = time.monotonic()
        time.sleep(seconds / 2)
        idle = read_recording(recording).lags_between(started, time.monotonic())
        with load.discarding([target] * FAST_CLIENTS, seconds=seconds) as under_way:
            started = time.monotonic()
            done = under_way.result(seconds + load.TIMEOUT_SECONDS)
            stopped = time.monotonic()
        busy = read_recording(recording).lags_between(started, stopped)
        counted.completed, counted.cut = 1 + done.completed, done.cut
    section.hold("the loop's lag (p99) with nothing to do", percentile(idle, 99) * 1e3, "ms")
    section.hold(
        f"the loop's lag (p99) with {FAST_CLIENTS} clients at full speed",
        percentile(busy, 99) * 1e3,
        "ms",
        at_most=5.0,
    )


def _measure_slow(bench: Bench, *, sendfile: bool) -> tuple[int, int]:
    """How many downloads were under way, and by how many bytes the daemon's memory had grown.

    The kernel's own buffers are not the daemon's memory and not counted.
    """
    package = bench.package(16 * MIB)
    number = SLOW_DOWNLOADS // 10 if bench.quick else SLOW_DOWNLOADS
    with (
        ExitStack() as stack,
        servers.exportd(bench, download__sendfile=sendfile) as server,
        server.counting(bench) as counted,
    ):
        target = server.target(package)
        load.discard([target])
        counted.completed = 1
        before = memory_bytes(server.process.pid, "VmRSS")
        readers = [stack.enter_context(_SlowReader(target)) for _ in range(number)]
        for reader in readers:
            reader.take()
        time.sleep(HOLD_SECONDS)
        growth = memory_bytes(server.process.pid, "VmRSS") - before
        for reader in readers:
            # Each of them is still under way: it has more to give.
            reader.take()
        stack.close()
    return number, growth


class _SlowReader:
    """A client that takes a little and then holds, with a small receive buffer."""

    def __init__(self, target: load.Target) -> None:
        self._socket = socket.socket()
        self._socket.settimeout(load.TIMEOUT_SECONDS)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)
        self._socket.connect(("127.0.0.1", target.port))
        self._socket.sendall(target.request)

    def __enter__(self) -> "_SlowReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def take(self) -> None:
        left = TAKEN_BYTES
        while left:
            taken = len(self._socket.recv(left))
            if not taken:
                raise BenchmarkBroken("a slow download was ended by the daemon")
            left -= taken

"""Clients of every temper for minutes on end: at the end the daemon must be as it was at the start.

They download, abort, resume, ask for parts, for headers, for what has not changed, and for packages that have
left memory; every byte is compared. A download counts when its client has received the whole package, in one
delivery or in several, and the counts must be exactly right. Each story has a user of its own, so that one
client's parts never complete another's.
"""

import contextlib
import hashlib
import http.client
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

from benchmarks import load, servers
from benchmarks.harness import KIB, MIB, Bench, Package, drop_from_memory, memory_bytes, wait_until
from benchmarks.probe import read_recording
from benchmarks.report import Section
from benchmarks.servers import Server

CLIENTS = 12
# Until caches, pools and threads have reached their size; not counted as growth.
WARM_UP_SECONDS = 30.0
IDLE_SECONDS = 20.0
MEMORY_LIMIT_BYTES = 4 * MIB
SIZES = (64 * KIB, MIB, 32 * MIB)
# An aborted download must not have reached the kernel's buffers whole: then it would count, and rightly.
ABORTED_SIZE = 32 * MIB
PIECE_BYTES = 64 * KIB


@dataclass(frozen=True)
class Vitals:
    """What a process holds."""

    memory_bytes: int
    descriptors: int
    threads: int
    tasks: int


def run(bench: Bench, section: Section, minutes: float) -> None:
    section.title = f"a soak of {minutes:g} minutes, {CLIENTS} clients"
    recording = bench.folder / "soak-probe"
    with servers.exportd(bench, probe=recording) as server:

        def look() -> Vitals:
            process = server.process
            return Vitals(
                memory_bytes(process.pid, "VmRSS"),
                process.num_fds(),
                process.num_threads(),
                int(read_recording(recording).tasks[-1][1]),
            )

        with server.counting(bench) as counted:
            for package in bench.packages(SIZES[-1], 8):
                drop_from_memory([package])
            # All the threads for cold packages, at once.
            counted.completed = load.discard(
                [server.target(package) for package in bench.packages(SIZES[-1], 8)]
            ).completed
            counted.completed += sum(_storm(bench, server, WARM_UP_SECONDS).values())
        before = _rest(look)
        with server.counting(bench) as counted:
            stories = _storm(bench, server, minutes * 60)
            counted.completed = sum(stories.values())
        after = _rest(look, before)
    section.hold("downloads counted", counted.completed)
    _compare(section, before, after)


def _compare(section: Section, before: Vitals, after: Vitals) -> None:
    growth = after.memory_bytes - before.memory_bytes
    section.hold("memory's growth", growth / MIB, "MiB", at_most=MEMORY_LIMIT_BYTES / MIB)
    if growth > MEMORY_LIMIT_BYTES:
        section.faults.append(f"memory grew by {growth / MIB:.1f} MiB")
    for name in [field.name for field in fields(Vitals)][1:]:
        more = getattr(after, name) - getattr(before, name)
        section.hold(f"more {name} than at the start", more, at_most=0)
        if more > 0:
            section.faults.append(f"{more} {name} more than at the start")


def _rest(look: Callable[[], Vitals], before: Vitals | None = None) -> Vitals:
    """The vitals once nothing is under way any more: no more than ``before``, or when time is up."""
    time.sleep(3)  # the daemon's own pauses are shorter

    def is_as_before() -> bool:
        now = look()
        return before is None or (
            now.descriptors <= before.descriptors
            and now.threads <= before.threads
            and now.tasks <= before.tasks
        )

    wait_until(is_as_before, IDLE_SECONDS)
    return look()


def _storm(bench: Bench, server: Server, seconds: float) -> dict[str, int]:
    """Runs the clients; how many downloads were completed, by kind of story."""
    deadline = time.monotonic() + seconds
    completed: dict[str, int] = {}
    lock = threading.Lock()

    def client(number: int) -> None:
        chance = random.Random(number)
        story_number = 0
        while time.monotonic() < deadline:
            story_number += 1
            story = chance.choice(_STORIES)
            user_id = f"soak-{number}-{story_number}-{seconds:g}"
            size = chance.choice(SIZES) if story is _whole else ABORTED_SIZE
            package = chance.choice(bench.packages(size, 8))
            visit = Visit(server, package, bench.authorization(user_id, "admin"), chance)
            downloads = story(visit)
            with lock:
                completed[story.__name__] = completed.get(story.__name__, 0) + downloads

    for size in SIZES:
        bench.packages(size, 8)
    with ThreadPoolExecutor(CLIENTS) as clients:
        for done in [clients.submit(client, number) for number in range(CLIENTS)]:
            done.result()
    return completed


@dataclass
class Visit:
    """One client, one package."""

    server: Server
    package: Package
    authorization: str
    chance: random.Random

    def ask(
        self, headers: dict[str, str] | None = None, method: str = "GET", status: int = 200
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        connection = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=load.TIMEOUT_SECONDS)
        path = self.server.target(self.package).path
        connection.request(method, path, headers={"Authorization": self.authorization, **(headers or {})})
        response = connection.getresponse()
        if response.status != status:
            raise load.LoadFailed(f"soak: {method} answered {response.status}, not {status}")
        return connection, response

    def take(
        self,
        digest: "hashlib._Hash",
        start: int = 0,
        stop: int | None = None,
        leave_at: int | None = None,
        etag: str | None = None,
    ) -> int:
        """Takes bytes from ``start`` to ``stop``, or leaves at ``leave_at``; where it got to."""
        headers = {}
        if start or stop is not None:
            headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        if etag is not None:
            headers["If-Range"] = etag
        connection, response = self.ask(headers, status=206 if headers else 200)
        offset, end = start, leave_at or stop or self.package.size_bytes
        with contextlib.closing(connection), response:
            while offset < end:
                data = response.read(min(PIECE_BYTES, end - offset))
                if not data:
                    raise load.LoadFailed(f"soak: ended at byte {offset}, not {end}")
                digest.update(data)
                offset += len(data)
        return offset

    def compare(self, digest: "hashlib._Hash") -> None:
        if digest.hexdigest() != self.package.sha256:
            raise load.LoadFailed("soak: wrong bytes")

    def somewhere(self) -> int:
        """An offset that is far enough from the end for the rest not to be on its way already."""
        return self.chance.randrange(1, self.package.size_bytes // 4)


def _whole(visit: Visit) -> int:
    digest = hashlib.sha256()
    visit.take(digest)
    visit.compare(digest)
    return 1


def _cold(visit: Visit) -> int:
    drop_from_memory([visit.package])
    return _whole(visit)


def _resumed(visit: Visit) -> int:
    digest = hashlib.sha256()
    connection, response = visit.ask(method="HEAD")
    etag = response.headers["ETag"]
    connection.close()
    offset = 0
    for _ in range(visit.chance.randint(1, 3)):
        offset = visit.take(
            digest, offset, leave_at=offset + visit.somewhere() // 2, etag=etag if offset else None
        )
    visit.take(digest, offset, etag=etag)
    visit.compare(digest)
    return 1


def _in_parts(visit: Visit) -> int:
    digest = hashlib.sha256()
    middle = visit.somewhere()
    visit.take(digest, 0, middle)
    visit.take(digest, middle)
    visit.compare(digest)
    return 1


def _aborted(visit: Visit) -> int:
    visit.take(hashlib.sha256(), leave_at=visit.somewhere())
    return 0


def _part_only(visit: Visit) -> int:
    start = visit.somewhere()
    visit.take(hashlib.sha256(), start, start + 1000)
    return 0


def _headers_only(visit: Visit) -> int:
    connection, response = visit.ask(method="HEAD")
    connection.close()
    connection, _ = visit.ask({"If-None-Match": response.headers["ETag"]}, status=304)
    connection.close()
    return 0


_STORIES: tuple[Callable[[Visit], int], ...] = (
    _whole, _whole, _whole, _cold, _resumed, _in_parts, _aborted, _part_only, _headers_only,
)  # fmt: skip

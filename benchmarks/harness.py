"""What every benchmark stands on: a folder, a PostgreSQL, packages and processes, all gone when the run ends.

Servers share the packages and the database. PostgreSQL is the embedded one, durable as by default.
"""

import contextlib
import hashlib
import itertools
import os
import random
import resource
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import psutil
import psycopg2
import trustme

from exportd.auth.tokens import Claims, Tokens
from exportd.db.embedded import embedded_server
from exportd.db.migrate import migrate_up

KIB, MIB, GIB = 1024, 1024**2, 1024**3

REPOSITORY = Path(__file__).parent.parent
PEERS = Path(__file__).parent / "peers"
# Installed peers stay from run to run; git ignores the folder.
CACHE = Path(__file__).parent / ".cache"

_START_SECONDS = 60.0
_STOP_SECONDS = 15.0
_SETTLE_SECONDS = 5.0
_DROP_SECONDS = 10.0
_OPEN_FILES = 16384

Value = TypeVar("Value")


class BenchmarkBroken(Exception):
    """A server that fails, a disk that is full: there is nothing to measure."""


@dataclass(frozen=True)
class Package:
    """A completed job and its file."""

    job_id: str
    file: Path
    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Certificate:
    """Paths of PEM files: the authority that clients trust, and what servers show."""

    authority: Path
    chain: Path
    key: Path


class Bench:
    """One run. Made by ``open_bench``.

    ``faults`` gathers what exportd did wrong, ``oddities`` what a peer did: that is the peer's own affair.
    """

    def __init__(self, folder: Path, dsn: str, quick: bool) -> None:
        self.folder = folder
        self.quick = quick
        self.dsn = dsn
        self.storage = folder / "packages"
        self.storage.mkdir(mode=0o755)
        self.secret = uuid.uuid4().hex
        self.faults: list[str] = []
        self.oddities: list[str] = []
        self._packages: dict[int, list[Package]] = {}
        self._database = psycopg2.connect(dsn)
        self._database.autocommit = True
        self._numbers = itertools.count()

    def packages(self, size_bytes: int, count: int) -> list[Package]:
        """``count`` different packages of that size, made when first asked for."""
        made = self._packages.setdefault(size_bytes, [])
        while len(made) < count:
            made.append(self._make_package(size_bytes))
        return made[:count]

    def package(self, size_bytes: int) -> Package:
        return self.packages(size_bytes, 1)[0]

    def _make_package(self, size_bytes: int) -> Package:
        # Jobs are inserted as an application would; packing 9 GiB would measure gzip.
        free = shutil.disk_usage(self.storage).free
        if free < size_bytes + GIB:
            raise BenchmarkBroken(f"{free // MIB} MiB left on the disk; a package needs {size_bytes // MIB}")
        job_id = str(uuid.uuid4())
        file = self.storage / f"{job_id}.tar.gz"
        block = random.Random(job_id).randbytes(min(size_bytes, 16 * MIB))
        digest = hashlib.sha256()
        with file.open("wb") as output:
            for offset in range(0, size_bytes, len(block)):
                # No two blocks are alike: a wrong offset is a wrong digest.
                piece = (offset.to_bytes(8) + block[8:])[: size_bytes - offset]
                output.write(piece)
                digest.update(piece)
            output.flush()
            os.fsync(output.fileno())
        file.chmod(0o644)
        self.query(
            """
            INSERT INTO export_jobs (
                job_id, user_id, status, tool_data, completed_at, package_path, package_size_bytes,
                package_sha256, package_expires_at
            )
            VALUES (%s, 'bench', 'completed', '{"name": "Bench"}', now(), %s, %s, %s,
                now() + interval '1 day')
            """,
            (job_id, file.name, size_bytes, digest.hexdigest()),
        )
        return Package(job_id, file, size_bytes, digest.hexdigest())

    def authorization(self, user_id: str = "bench", role: str | None = None) -> str:
        """The value of the header."""
        tokens = Tokens(Claims(), ["HS256"], secret=self.secret)
        return f"Bearer {tokens.sign(user_id, role, 86400)}"

    def query(self, statement: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        with self._database.cursor() as cursor:
            cursor.execute(statement, parameters)
            return cursor.fetchall() if cursor.description else []

    def count(self) -> int:
        """How many downloads all jobs have counted so far."""
        ((total,),) = self.query("SELECT sum(download_count)::bigint FROM export_jobs")
        return int(total or 0)

    @contextlib.contextmanager
    def counted(self, who: str, wrong: list[str]) -> Iterator["Counted"]:
        """Checks, at the block's end, that as many downloads were counted as the block says; if not, it
        tells ``wrong``."""
        before = self.count()
        counted = Counted()
        yield counted
        lowest, highest = counted.completed, counted.completed + counted.cut
        found = self._settled_count(before + lowest) - before
        if not lowest <= found <= highest:
            cut = f", {counted.cut} cut" if counted.cut else ""
            wrong.append(f"{who}: {found} downloads counted; {lowest} completed{cut}")

    def _settled_count(self, expected: int) -> int:
        """The count once it is as expected, or has not changed for a while."""
        found, changed_at = self.count(), time.monotonic()
        while found < expected and time.monotonic() - changed_at < _SETTLE_SECONDS:
            time.sleep(0.02)
            if (now := self.count()) != found:
                found, changed_at = now, time.monotonic()
        return found

    def quiet(self) -> None:
        """Lets what the last measurement left behind be over: dirty pages of the database, mostly."""
        self.query("CHECKPOINT")

    @property
    def postgres_environ(self) -> dict[str, str]:
        """Where the database is, as every driver reads it."""
        parsed = psycopg2.extensions.parse_dsn(self.dsn)
        names = {"host": "PGHOST", "port": "PGPORT", "user": "PGUSER", "dbname": "PGDATABASE"}
        return {variable: parsed[name] for name, variable in names.items() if parsed.get(name)}

    @cached_property
    def postgres(self) -> psutil.Process:
        pid_file = self.folder / "data" / "postgres" / "postmaster.pid"
        return psutil.Process(int(pid_file.read_text().split()[0]))

    @cached_property
    def certificate(self) -> Certificate:
        authority = trustme.CA()
        issued = authority.issue_cert("127.0.0.1", "localhost")
        certificate = Certificate(*(self.folder / name for name in ("ca.pem", "chain.pem", "key.pem")))
        authority.cert_pem.write_to_path(str(certificate.authority))
        for blob in issued.cert_chain_pems:
            blob.write_to_path(str(certificate.chain), append=True)
        issued.private_key_pem.write_to_path(str(certificate.key))
        return certificate

    def subfolder(self, name: str) -> Path:
        """A new folder for one server's logs and the like."""
        folder = self.folder / f"{name}-{next(self._numbers)}"
        folder.mkdir(mode=0o755)
        return folder


@dataclass
class Counted:
    """What a load did: downloads that it completed, and others that it cut at its end, which may count or
    not: their last bytes may have been on the way."""

    completed: int = 0
    cut: int = 0


@contextlib.contextmanager
def open_bench(quick: bool) -> Iterator[Bench]:
    """The folder is below TMPDIR, which should be a real disk: cold files are measured too."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, _OPEN_FILES), hard))
    with tempfile.TemporaryDirectory(prefix="exportd-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx's workers and PostgreSQL may be other users
        with embedded_server(folder / "data") as dsn:
            migrate_up(dsn)
            yield Bench(folder, dsn, quick)


@contextlib.contextmanager
def running(
    command: Sequence[object], environ: dict[str, str], folder: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, its output in ``folder/output``; stopped with all its children."""
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=environ,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def clean_environ() -> dict[str, str]:
    """This process's, without what would configure exportd, PostgreSQL's clients or Python."""
    prefixes = ("EXPORTD_", "PG", "PYTHON")
    return {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as opened:
        port: int = opened.getsockname()[1]
        return port


def wait_until(condition: Callable[[], Any], seconds: float = _START_SECONDS) -> Any:
    """The first true value of ``condition``, or its last false one once the time is up."""
    deadline = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return value


def cpu_seconds(process: psutil.Process) -> float:
    """User and system time of a process and all that descends from it, those that have ended too."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            times = one.cpu_times()
            total += times.user + times.system + times.children_user + times.children_system
    return total


def memory_bytes(pid: int, field: str) -> int:
    """A field of /proc/PID/status: VmRSS is what is resident now, VmHWM the most since ``reset_peak``."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * KIB
    raise KeyError(field)


def reset_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def drop_from_memory(packages: Sequence[Package]) -> bool:
    """Makes files cold; False where the system keeps them in memory all the same (tmpfs)."""

    def drop() -> bool:
        for package in packages:
            with package.file.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return all(_resident_bytes(package.file) < package.size_bytes / 100 for package in packages)

    os.sync()
    # What is still on its way to a client stays until it has arrived.
    return bool(wait_until(drop, _DROP_SECONDS))


def _resident_bytes(file: Path) -> int:
    """How much of a file is in the page cache. A read that may not wait would start one that may."""
    done = subprocess.run(["fincore", "-bnro", "RES", file], capture_output=True, text=True, check=True)
    return int(done.stdout)


def in_turn(rounds: int, measurements: Mapping[str, Callable[[], Value]]) -> dict[str, list[Value]]:
    """Takes the measurements one after the other, ``rounds`` times, so that a machine that becomes slower
    becomes so for all of them."""
    results: dict[str, list[Value]] = {name: [] for name in measurements}
    for _ in range(rounds):
        for name, measure in measurements.items():
            results[name].append(measure())
    return results

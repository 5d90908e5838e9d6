"""The packer with the real command: what it makes, and what becomes of a job whose packer dies."""

import asyncio
import gzip
import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tarfile
import urllib.request
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from exportd.db.packing import take_job
from exportd.db.pool import open_database
from exportd.jobs import packer as packer_module
from tests.support.application import ANN, BASE
from tests.support.daemon import Daemon, Exportd, wait_for
from tests.support.postgres import query


@pytest.fixture
def exports(exportd: Exportd) -> Path:
    """The allowed source root."""
    folder = exportd.folder / "exports"
    folder.mkdir()
    exportd.environ["EXPORTD_PACKER__SOURCE_ROOTS"] = json.dumps([str(folder)])
    exportd.environ["EXPORTD_PACKER__POLL_SECONDS"] = "0.2"
    return folder


def folder_of(exports: Path, size: int = 100_000) -> Path:
    folder = exports / f"export-{uuid.uuid4().hex[:8]}"
    folder.mkdir()
    (folder / "data.bin").write_bytes(
        random.Random(size).randbytes(min(size, 1_000_000)) * max(1, size // 1_000_000)
    )
    return folder


def slow_folder(exports: Path) -> Path:
    """Eight gigabytes of nothing: seconds of work, and no room on the disk."""
    folder = folder_of(exports)
    os.truncate(folder / "data.bin", 8 * 2**30)
    return folder


def ask(exportd: Exportd, source: object, **columns: object) -> str:
    """A job that waits, as an application hands it in."""
    row = {
        "job_id": str(uuid.uuid4()),
        "user_id": "ann",
        "status": "pending",
        "tool_data": '{"name": "Form"}',
        "pack_source": str(source),
        **columns,
    }
    names = ", ".join(row)
    query(
        exportd.dsn,
        f"INSERT INTO export_jobs ({names}) VALUES ({', '.join(['%s'] * len(row))})",
        tuple(row.values()),
    )
    query(exportd.dsn, "SELECT pg_notify('export_requested', %s)", (row["job_id"],))
    return str(row["job_id"])


def state(exportd: Exportd, job_id: str) -> tuple[Any, ...]:
    """status, percent, attempts, reason, packer."""
    (row,) = query(
        exportd.dsn,
        "SELECT status, pack_percent, pack_attempts, failure_reason, packer_id FROM export_jobs"
        " WHERE job_id = %s",
        (job_id,),
    )
    return tuple(row)


def wait_until(exportd: Exportd, job_id: str, status: str) -> tuple[Any, ...]:
    found: tuple[Any, ...] = wait_for(
        f"the job to be {status}", lambda: (now := state(exportd, job_id))[0] == status and now
    )
    return found


class PackerProcess(Daemon):
    """A running ``exportd packer``."""


@pytest.fixture
def start_packer(exportd: Exportd) -> Iterator[Any]:
    started: list[PackerProcess] = []

    def start(**environ: str) -> PackerProcess:
        output = exportd.folder / f"packer-{len(started)}.log"
        with output.open("w") as stdout:
            process = subprocess.Popen(
                [sys.executable, "-m", "exportd", "packer"],
                env={**exportd.environ, **environ},
                cwd=exportd.folder,
                stdout=stdout,
                stderr=subprocess.STDOUT,
                text=True,
            )
        packer = PackerProcess(process, output)
        started.append(packer)
        return packer

    yield start
    for packer in started:
        packer.close()


def test_the_daemon_packs_a_waiting_job_and_serves_it(exportd: Exportd, exports: Path) -> None:
    source = folder_of(exports)
    before = ask(exportd, source)
    daemon = exportd.serve(EXPORTD_PACKER__ENABLED="true")
    wait_until(exportd, before, "completed")
    job_id = ask(exportd, source, package_retention_days=3)
    assert wait_until(exportd, job_id, "completed") == ("completed", 100, 1, None, None)
    ((sha256, size, days),) = query(
        exportd.dsn,
        "SELECT package_sha256, package_size_bytes, (package_expires_at - completed_at)::text"
        "  FROM export_jobs WHERE job_id = %s",
        (job_id,),
    )
    request = urllib.request.Request(f"{daemon.url}{BASE}/{job_id}/download", headers=ANN)
    with urllib.request.urlopen(request) as response:
        content = response.read()
    assert (hashlib.sha256(content).hexdigest(), len(content), days) == (sha256, size, "3 days")
    (exportd.folder / "got.tar.gz").write_bytes(content)
    with tarfile.open(exportd.folder / "got.tar.gz") as archive:
        member = archive.extractfile(f"{source.name}/data.bin")
        assert member is not None
        assert member.read() == (source / "data.bin").read_bytes()
    line = daemon.wait_for_event("package_packed")
    assert (line["job_id"], line["attempt"]) == (before, 1)
    assert daemon.stop() == 0
    assert not list(exportd.storage.glob(".incoming/*"))
    assert not [line for line in daemon.log if line["level"] == "error"]


def test_the_percentage_goes_up_and_a_killed_packers_job_is_taken_up_by_the_next(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    source = slow_folder(exports)
    job_id = ask(exportd, source)
    first = start_packer()
    moved = wait_for(
        "the first percents", lambda: (state(exportd, job_id)[1] or 0) > 0 and state(exportd, job_id)
    )
    assert moved[0] == "processing"
    assert 0 < moved[1] < 100
    first.stop(signal.SIGKILL)
    assert list(exportd.storage.glob(".incoming/*"))
    # Nothing more to learn from all that work.
    os.truncate(source / "data.bin", 1000)
    second = start_packer()
    assert wait_until(exportd, job_id, "completed") == ("completed", 100, 2, None, None)
    assert second.stop() == 0
    assert not list(exportd.storage.glob(".incoming/*"))
    assert len(list(exportd.storage.glob("*.tar.gz"))) == 1


def test_a_packer_that_is_told_to_stop_gives_its_job_back(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    job_id = ask(exportd, slow_folder(exports))
    packer = start_packer()
    wait_until(exportd, job_id, "processing")
    assert packer.stop() == 0
    assert state(exportd, job_id) == ("pending", None, 0, None, None)
    assert not list(exportd.storage.glob(".incoming/*"))
    assert packer.events("packer_stopped")


def slow_archive(exports: Path) -> Path:
    """A sound .tar.gz of five megabytes that unpacks to sixteen gigabytes of nothing."""
    member = tarfile.TarInfo("zeros")
    member.size = 16 * 2**30
    archive = exports / "slow.tar.gz"
    zeros = gzip.compress(bytes(2**26), 1)
    with archive.open("wb") as file:
        file.write(gzip.compress(member.tobuf(tarfile.PAX_FORMAT)))
        for _ in range(member.size // 2**26):
            file.write(zeros)
        file.write(gzip.compress(bytes(1024)))
    return archive


def test_a_packer_that_checks_an_archive_is_heard_of_and_stops_when_told(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    job_id = ask(exportd, slow_archive(exports))
    packer = start_packer()
    (check,) = wait_for("the check", lambda: psutil.Process(packer.process.pid).children())

    def seen_at() -> Any:
        return query(exportd.dsn, "SELECT packer_seen_at FROM export_jobs WHERE job_id = %s", (job_id,))

    before = seen_at()
    wait_for("another heartbeat", lambda: seen_at() != before)
    assert check.is_running()
    assert packer.stop() == 0
    assert not check.is_running()
    assert state(exportd, job_id) == ("pending", None, 0, None, None)
    assert not list(exportd.storage.glob("*.tar.gz"))


def test_a_job_that_somebody_took_over_is_discarded(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    job_id = ask(exportd, slow_folder(exports))
    packer = start_packer()
    # It knows of the job: taking and finding it are two statements.
    wait_for("some of it to be packed", lambda: state(exportd, job_id)[1])
    other = str(uuid.uuid4())
    query(exportd.dsn, "UPDATE export_jobs SET packer_id = %s", (other,))
    placed = exportd.storage / f"{job_id}.tar.gz"
    placed.write_bytes(b"the other's package")
    packer.wait_for_event("package_discarded")
    assert str(state(exportd, job_id)[4]) == other
    assert placed.read_bytes() == b"the other's package"


def test_a_job_whose_packer_is_not_heard_of_is_taken_over(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    silent, alive = (
        ask(exportd, folder_of(exports), status="processing", packer_id=str(uuid.uuid4()), pack_attempts=1)
        for _ in range(2)
    )
    query(exportd.dsn, "UPDATE export_jobs SET packer_seen_at = now()")
    query(
        exportd.dsn,
        "UPDATE export_jobs SET packer_seen_at = now() - interval '61 s' WHERE job_id = %s",
        (silent,),
    )
    start_packer()
    assert wait_until(exportd, silent, "completed")[2] == 2
    assert state(exportd, alive)[0] == "processing"


def test_two_packers_make_each_package_once(exportd: Exportd, exports: Path, start_packer: Any) -> None:
    jobs = [ask(exportd, folder_of(exports)) for _ in range(20)]
    root = str(exportd.storage)
    packers = [
        start_packer(EXPORTD_DATA_DIR=str(exportd.folder / name), EXPORTD_STORAGE__ROOT=root)
        for name in ("data", "data-2")
    ]
    for job_id in jobs:
        wait_until(exportd, job_id, "completed")

    def packed() -> list[str]:
        return [line["job_id"] for packer in packers for line in packer.events("package_packed")]

    # The line follows the row.
    wait_for("the last line", lambda: len(packed()) >= len(jobs))
    for packer in packers:
        packer.stop()
    assert sorted(packed()) == sorted(jobs)
    assert {state(exportd, job_id)[2] for job_id in jobs} == {1}


def test_a_second_packer_of_the_same_data_folder_waits(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    first = start_packer()
    first.wait_for_event("packer_started")
    second = start_packer()
    second.wait_for_event("packer_waiting")
    assert not second.events("packer_started")
    first.stop()
    second.wait_for_event("packer_started")


@pytest.mark.parametrize("kind", ["missing", "outside", "link", "device", "unsound", "long"])
def test_a_permanent_failure_fails_at_once_with_a_reason_for_the_user(
    exportd: Exportd, exports: Path, start_packer: Any, kind: str
) -> None:
    secret = exportd.folder / "secret"
    secret.mkdir()
    (secret / "file").write_text("x")
    source: object = exports / "source"
    match kind:
        case "outside":
            source = exports / ".." / "secret"
        case "link":
            (exports / "source").symlink_to(secret)
        case "device":
            (exports / "source").mkdir()
            os.mkfifo(exports / "source" / "fifo")
        case "unsound":
            (exports / "source").write_text("no package")
        case "long":
            source = f"{exports}/" + "x" * 300
    job_id = ask(exportd, source)
    packer = start_packer()
    status, _, attempts, reason, holder = wait_until(exportd, job_id, "failed")
    assert (status, attempts, holder) == ("failed", 1, None)
    assert reason
    assert "/" not in reason
    line = packer.wait_for_event("package_failed")
    assert line["is_last"] is True
    assert not list(exportd.storage.glob("*.tar.gz"))
    # Others are none the worse for it.
    wait_until(exportd, ask(exportd, folder_of(exports)), "completed")


def test_temporary_failures_are_retried_up_to_max_attempts(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    folder = folder_of(exports, 3_000_000)
    job_id = ask(exportd, folder)
    packer = start_packer(EXPORTD_PACKER__MAX_ATTEMPTS="2")
    packer.wait_for_event("packer_started")
    wait_until(exportd, job_id, "completed")
    # No file may grow beyond a megabyte: to the packer, the disk is full.
    resource.prlimit(packer.process.pid, resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    job_id = ask(exportd, folder)
    packer.wait_for_event("package_failed")
    status, percent, attempts, _, _ = wait_until(exportd, job_id, "pending")
    assert (status, percent, attempts) == ("pending", None, 1)
    ((delay,),) = query(
        exportd.dsn, "SELECT pack_due_at > now() FROM export_jobs WHERE job_id = %s", (job_id,)
    )
    assert delay
    query(exportd.dsn, "UPDATE export_jobs SET pack_due_at = now() WHERE job_id = %s", (job_id,))
    status, _, attempts, reason, _ = wait_until(exportd, job_id, "failed")
    assert (attempts, reason) == (2, "The server could not make the package")
    assert not list(exportd.storage.glob(".incoming/*"))


def test_a_job_that_kills_its_packer_each_time_fails_in_the_end(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    job_id = ask(exportd, folder_of(exports), pack_attempts=3)
    start_packer()
    wait_until(exportd, job_id, "failed")


def children(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children(recursive=True) if "packer" in child.cmdline()]


@pytest.mark.parametrize("workers", [1, 2])
def test_the_daemon_has_one_packer_and_replaces_it_when_it_dies(
    exportd: Exportd, exports: Path, workers: int
) -> None:
    daemon = exportd.serve("--workers", workers, EXPORTD_PACKER__ENABLED="true")
    assert daemon.url
    process = psutil.Process(daemon.process.pid)
    (first,) = wait_for("the packer", lambda: children(process))
    daemon.wait_for_event("packer_started")
    first.kill()
    assert daemon.wait_for_event("companion_ended")["restart_in_seconds"] == 1.0
    (second,) = wait_for("another packer", lambda: [c for c in children(process) if c.pid != first.pid])
    wait_for("its start", lambda: len(daemon.events("packer_started")) == 2)
    assert daemon.stop() == 0
    assert not second.is_running()


@pytest.mark.parametrize("workers", [1, 2])
def test_no_packer_outlives_its_daemon(exportd: Exportd, exports: Path, workers: int) -> None:
    daemon = exportd.serve("--workers", workers, EXPORTD_PACKER__ENABLED="true")
    process = psutil.Process(daemon.process.pid)
    (packer,) = wait_for("the packer", lambda: children(process))
    daemon.wait_for_event("packer_started")
    daemon.stop(signal.SIGKILL)
    wait_for("the packer to end", lambda: not packer.is_running() or packer.status() == psutil.STATUS_ZOMBIE)


@pytest.mark.slow
def test_a_database_that_is_away_for_a_while_costs_nothing(
    exportd: Exportd, exports: Path, start_packer: Any
) -> None:
    packer = start_packer()
    packer.wait_for_event("packer_started")
    query(exportd.dsn, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                       " AND datname = current_database()")  # fmt: skip
    wait_until(exportd, ask(exportd, folder_of(exports)), "completed")


async def test_a_packer_that_is_stopped_while_it_takes_a_job_gives_it_back(
    exportd: Exportd, exports: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = ask(exportd, folder_of(exports))
    database = await open_database(
        exportd.dsn,
        pool_min_size=1,
        pool_max_size=3,
        connect_timeout_seconds=5,
        statement_timeout_seconds=5,
    )
    taken = asyncio.Event()

    async def take_and_wait(*arguments: Any) -> None:
        await take_job(*arguments)
        taken.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(packer_module, "take_job", take_and_wait)
    monkeypatch.setattr(packer_module.os, "nice", lambda _: 0)
    packer = packer_module.Packer(
        database, uuid.uuid4(), exportd.storage, [exports], max_attempts=3, poll_seconds=1
    )
    running = asyncio.create_task(packer.run())
    await taken.wait()
    assert state(exportd, job_id)[0] == "processing"
    running.cancel()
    await asyncio.wait([running])
    assert state(exportd, job_id) == ("pending", None, 0, None, None)
    await database.close()

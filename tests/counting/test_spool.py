"""The spool: what was appended comes back, whole and in order, whatever happened to the file."""

import fcntl
import os
import uuid
import zlib
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import structlog

from exportd.counting.spool import Spool
from exportd.domain.delivery import DownloadEvent, Outcome
from tests.counting.test_ledger import event

JOB = uuid.uuid4()


def events(count: int) -> list[DownloadEvent]:
    return [event(JOB, request_id=f"r{number}", reason="é\n") for number in range(count)]


class Writer:
    """Takes events, and fails as often as asked."""

    def __init__(self, failures: int = 0) -> None:
        self.written: list[DownloadEvent] = []
        self.failures = failures

    async def __call__(self, events: list[DownloadEvent]) -> None:
        if self.failures:
            self.failures -= 1
            raise ConnectionError
        self.written += events


async def replay(spool: Spool, write: Callable[[list[DownloadEvent]], Awaitable[None]]) -> None:
    while waiting := spool.waiting(JOB):
        await write(list(waiting))
        await spool.written(JOB, len(waiting))


@pytest.fixture
def spool(tmp_path: Path) -> Iterator[Spool]:
    spool = Spool.create(tmp_path / "ledger", uuid.uuid4())
    yield spool
    spool.close()


def file_of(spool: Spool, folder: Path) -> Path:
    return folder / "ledger" / f"{spool.owner}.spool"


async def test_appended_events_are_read_in_order(spool: Spool, tmp_path: Path) -> None:
    given = events(5)
    await spool.append(given[:2])
    await spool.append(given[2:])
    assert len(spool) == 5
    writer = Writer()
    await replay(spool, writer)
    assert writer.written == given
    assert len(spool) == 0
    assert file_of(spool, tmp_path).stat().st_size == 0


async def test_a_replay_that_fails_keeps_everything(spool: Spool) -> None:
    given = events(3)
    await spool.append(given)
    writer = Writer(failures=1)
    with pytest.raises(ConnectionError):
        await replay(spool, writer)
    assert len(spool) == 3
    await replay(spool, writer)
    assert writer.written == given


async def test_events_appended_during_a_replay_are_kept(spool: Spool) -> None:
    given = events(2)
    await spool.append(given[:1])
    writer = Writer()

    async def write(batch: list[DownloadEvent]) -> None:
        if not writer.written:
            await spool.append(given[1:])
        await writer(batch)

    await replay(spool, write)
    assert {item.event_id for item in writer.written} == {item.event_id for item in given}
    assert len(spool) == 0


async def test_an_incomplete_last_line_is_dropped(spool: Spool, tmp_path: Path) -> None:
    await spool.append(events(2))
    file = file_of(spool, tmp_path)
    whole = file.read_bytes()
    for cut in range(1, len(whole.splitlines()[-1]) + 1):
        os.truncate(file, len(whole) - cut)
        assert len(list(spool.read())) == 1
        file.write_bytes(whole)


async def test_damage_costs_one_line_is_told_and_kept(spool: Spool, tmp_path: Path) -> None:
    given = events(3)
    await spool.append(given)
    file = file_of(spool, tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"ann", b"eve")
    file.write_bytes(b"".join(lines))
    with structlog.testing.capture_logs() as logs:
        assert list(spool.read()) == [given[0], given[2]]
    assert [(line["event"], line["line"]) for line in logs] == [("spool_line_damaged", 3)]
    assert file.with_suffix(".damaged").read_bytes() == b"".join(lines)


async def test_a_full_disk_leaves_the_file_as_it_was(
    spool: Spool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = events(2)
    await spool.append(given[:1])
    before = file_of(spool, tmp_path).read_bytes()
    real = os.write
    calls: list[int] = []

    def write(descriptor: int, block: memoryview) -> int:
        calls.append(len(block))
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        return real(descriptor, block[:50])

    with monkeypatch.context() as patch:
        patch.setattr("exportd.counting.spool.os.write", write)
        with pytest.raises(OSError, match="No space"):
            await spool.append(given[1:])
    assert len(calls) == 2
    assert file_of(spool, tmp_path).read_bytes() == before
    assert len(spool) == 1
    await spool.append(given[1:])
    assert list(spool.read()) == given


async def test_the_spool_of_a_dead_process_is_adopted_once(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    mine = Spool.create(folder, uuid.uuid4())
    # A process that was killed: its file is there, the lock is not.
    dead = Spool.create(folder, uuid.uuid4())
    given = events(2)
    await dead.append(given)
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)

    (adopted,) = Spool.adopt(folder, set())
    assert (adopted.owner, len(adopted)) == (dead.owner, 2)
    # Who looks at the same time finds nothing: both the living and the adopted are locked.
    assert Spool.adopt(folder, set()) == []
    writer = Writer()
    await replay(adopted, writer)
    assert writer.written == given
    adopted.close()
    assert Spool.adopt(folder, set()) == []
    assert [path.stem for path in folder.iterdir()] == [str(mine.owner)]
    mine.close()
    assert list(folder.iterdir()) == []
    os.close(dead._descriptor)


async def test_a_spool_that_is_closed_with_events_in_it_stays(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    spool = Spool.create(folder, uuid.uuid4())
    await spool.append(events(1))
    spool.close()
    (found,) = Spool.adopt(folder, set())
    assert len(found) == 1
    found.close()


def test_the_folder_is_its_owners_alone(spool: Spool, tmp_path: Path) -> None:
    assert (tmp_path / "ledger").stat().st_mode & 0o777 == 0o700
    assert file_of(spool, tmp_path).stat().st_mode & 0o777 == 0o600


async def test_an_event_is_the_same_after_a_round_trip(spool: Spool) -> None:
    given = replace(
        event(JOB),
        requested=((0, 5), (7, 12)),
        received=(),
        outcome=Outcome.ABORTED,
        reason=None,
        method=None,
    )
    await spool.append([given])
    assert list(spool.read()) == [given]


async def test_only_unwritten_events_stay_in_the_spool(spool: Spool, tmp_path: Path) -> None:
    given = events(4)
    other = event(uuid.uuid4())
    await spool.append([*given[:2], other])
    await spool.written(JOB, 1)
    await spool.append(given[2:])
    assert spool.waiting(JOB) == tuple(given[1:])
    assert (len(spool), list(spool.job_ids)) == (4, [JOB, other.job_id])
    await spool.written(other.job_id, 1)
    # Another process that finds the file gets all of the events again.
    assert len(list(spool.read())) == 5
    await spool.written(JOB, 3)
    assert (len(spool), set(spool.job_ids)) == (0, set())
    assert file_of(spool, tmp_path).stat().st_size == 0


async def test_an_unwritable_event_waits_in_memory_once(spool: Spool) -> None:
    given = events(3)
    await spool.append(given[:1])
    for _ in range(2):
        spool.keep(given[1:])
    assert (spool.waiting(JOB), len(spool), spool.unsaved) == (tuple(given), 3, given[1:])
    await spool.written(JOB, 2)
    assert (len(spool), spool.unsaved) == (1, given[2:])
    await spool.written(JOB, 1)
    assert (len(spool), spool.unsaved) == (0, [])


async def test_a_spool_that_is_being_created_is_not_adopted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a process that looks round between its making and its lock."""
    folder = tmp_path / "ledger"
    lock = fcntl.flock

    def others_first(descriptor: int, how: int) -> None:
        monkeypatch.setattr("fcntl.flock", lock)
        (empty,) = Spool.adopt(folder, set())
        empty.close()
        lock(descriptor, how)

    monkeypatch.setattr("fcntl.flock", others_first)
    spool = Spool.create(folder, uuid.uuid4())
    assert file_of(spool, tmp_path).exists()
    await spool.append(events(1))
    fcntl.flock(spool._descriptor, fcntl.LOCK_UN)
    assert [len(found) for found in Spool.adopt(folder, set())] == [1]


async def test_a_file_that_is_no_spool_costs_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "ledger"
    dead = Spool.create(folder, uuid.UUID(int=5))
    await dead.append(events(2))
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)
    (folder / "copy-of-yesterday.spool").write_bytes(file_of(dead, tmp_path).read_bytes())
    (folder / f"{uuid.UUID(int=1)}.spool").mkdir()
    passed_over: set[str] = set()
    with structlog.testing.capture_logs() as logs:
        (found,) = Spool.adopt(folder, passed_over)
        assert len(found) == 2
        Spool.adopt(folder, passed_over)
    assert [line["file"] for line in logs] == [f"{uuid.UUID(int=1)}.spool", "copy-of-yesterday.spool"]
    found.close()


async def test_a_line_of_another_version_is_told_and_kept(spool: Spool, tmp_path: Path) -> None:
    await spool.append(events(2))
    file = file_of(spool, tmp_path)
    lines = file.read_bytes().splitlines(keepends=True)
    content = lines[1][9:-1].replace(b'"reason"', b'"why"')
    file.write_bytes(b"\n%08x %b\n" % (zlib.crc32(content), content) + lines[2])
    with structlog.testing.capture_logs() as logs:
        assert [event.request_id for event in spool.read()] == ["r1"]
    assert [line["event"] for line in logs] == ["spool_line_damaged"]
    assert file.with_suffix(".damaged").exists()


async def test_a_line_of_the_earlier_version_is_read(spool: Spool, tmp_path: Path) -> None:
    """It had no SHA-256 of the package."""
    (given,) = events(1)
    await spool.append([given])
    file = file_of(spool, tmp_path)
    content = file.read_bytes()[10:-1].replace(b',"package_sha256":""', b"")
    assert b"package_sha256" not in content
    file.write_bytes(b"\n%08x %b\n" % (zlib.crc32(content), content))
    assert list(spool.read()) == [given]

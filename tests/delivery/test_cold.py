"""Pages that are not in memory are fetched in a thread, and the bytes are the same."""

import os
import threading
from pathlib import Path

import pytest

from exportd.delivery import cold
from tests.support.application import ANN, Jobs, Start, noise


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(noise(3_000_000))
    return path


def drop_from_memory(path: Path) -> None:
    with path.open("rb") as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


async def test_a_cached_slice_is_read_without_a_thread(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "_read_and_go_on", lambda *_: pytest.fail("a thread was asked"))
    content = file.read_bytes()
    with file.open("rb") as opened:
        # The first touch may be refused for the access time's sake.
        cold.read_resident(opened.fileno(), 0, 1)
        assert cold.is_resident(opened.fileno(), 0, len(content))
        expected = (content[1_000_000:1_065_536], False)
        assert await cold.read(opened.fileno(), 1_000_000, 65536) == expected
        assert await cold.read(opened.fileno(), len(content), 10) == (b"", False)


async def test_a_thread_reads_a_slice_that_is_not_cached(file: Path) -> None:
    content = file.read_bytes()
    drop_from_memory(file)
    with file.open("rb") as opened:
        if cold.is_resident(opened.fileno(), 2_000_000, 524_288):
            pytest.skip("this file system keeps its pages")
        await cold.make_resident(opened.fileno(), 2_000_000, 524_288)
        assert cold.is_resident(opened.fileno(), 2_000_000, 524_288)
        expected = (content[2_000_000:2_000_100], False)
        assert await cold.read(opened.fileno(), 2_000_000, 100) == expected


async def test_reading_past_the_end_ends(file: Path) -> None:
    with file.open("rb") as opened:
        await cold.make_resident(opened.fileno(), 2_900_000, 524_288)
        data, _ = await cold.read(opened.fileno(), 2_999_999, 524_288)
        assert data == file.read_bytes()[-1:]


@pytest.mark.parametrize("sender", ["sendfile", "chunks"], indirect=True)
async def test_a_cold_package_comes_whole_with_its_reads_in_threads(
    start: Start, jobs: Jobs, sender: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start(download={"sendfile": sender == "sendfile"})
    package = jobs.add(noise(5_000_000))
    threads: set[str] = set()
    name = {"sendfile": "_touch", "chunks": "_read_and_go_on"}[sender]
    real = getattr(cold, name)

    def noting(*arguments: int) -> object:
        threads.add(threading.current_thread().name)
        return real(*arguments)

    monkeypatch.setattr(cold, name, noting)
    # Every page counts as cold, so that the test does not hang on what this machine keeps.
    monkeypatch.setattr(cold, "_NO_WAIT", 0)
    async with client.get(package.url, headers=ANN) as response:
        assert await response.read() == package.content
    assert threads
    assert all(thread.startswith("exportd-cold") for thread in threads)

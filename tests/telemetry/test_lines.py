"""Log lines: whole, in order, never blocking, and counted where they are shed."""

import fcntl
import multiprocessing
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from exportd.telemetry import lines
from exportd.telemetry.lines import LineWriter
from tests.support.daemon import wait_for


def describe(count: int) -> bytes:
    return b"shed %d" % count


@contextmanager
def writer_to(target: int | Path) -> Iterator[LineWriter]:
    writer = LineWriter(target, describe)
    try:
        yield writer
    finally:
        writer.close()


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    reader, target = os.pipe()
    yield reader, target
    os.close(reader)
    os.close(target)


def test_lines_arrive_whole_and_in_order(tmp_path: Path) -> None:
    expected = [b"line %d" % number for number in range(20_000)]
    with writer_to(tmp_path / "log") as writer:
        for line in expected:
            writer.write(line)
    assert (tmp_path / "log").read_bytes().splitlines() == expected


def test_a_lone_line_does_not_wait_for_others(pipe: tuple[int, int]) -> None:
    with writer_to(pipe[1]) as writer:
        writer.write(b"one")
        assert os.read(pipe[0], 100) == b"one\n"


def test_a_pipe_that_nobody_reads_blocks_nobody_and_what_is_shed_is_told(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "_MAX_WAITING_BYTES", 100_000)
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    line = b"x" * 999
    written = 500
    with writer_to(pipe[1]) as writer:
        for _ in range(written):
            writer.write(line)
        shed = writer.shed_lines
        # A hundred wait, a hundred are in the thread's hands, and four may be in the pipe.
        assert shed >= written - 204
        # The thread may have taken lines meanwhile, and then reports in several lines.
        received = b""
        while sum(shed_in(received)) < shed:
            received += os.read(pipe[0], 65536)
        assert sum(shed_in(received)) == shed
        arrived = [found for found in received.splitlines() if not found.startswith(b"shed")]
        assert arrived == [line] * (written - shed)


def shed_in(received: bytes) -> list[int]:
    """The numbers of the complete lines that report dropped lines."""
    return [int(number) for number in re.findall(rb"^shed (\d+)\n", received, re.MULTILINE)]


def test_a_reader_that_left_is_no_error(pipe: tuple[int, int]) -> None:
    reader, target = os.pipe()
    os.close(reader)
    with writer_to(target) as writer:
        writer.write(b"nobody reads this")
        wait_for("the line to be shed", lambda: writer.shed_lines == 1)
    os.close(target)


def test_a_full_disk_sheds_and_recovers(tmp_path: Path) -> None:
    descriptor = os.open("/dev/full", os.O_WRONLY)
    with writer_to(descriptor) as writer:
        writer.write(b"no room")
        wait_for("the line to be shed", lambda: writer.shed_lines == 1)
        room = os.open(tmp_path / "log", os.O_WRONLY | os.O_CREAT)
        os.dup2(room, descriptor)
        writer.write(b"room")
    assert (tmp_path / "log").read_bytes().splitlines()[0] == b"room"
    assert b"shed 1" in (tmp_path / "log").read_bytes()
    os.close(room)
    os.close(descriptor)


def test_a_pipe_that_somebody_made_nonblocking_loses_nothing(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    fcntl.fcntl(pipe[1], fcntl.F_SETPIPE_SZ, 4096)
    received = bytearray()
    expected = [b"%06d" % number for number in range(5000)]

    def read() -> None:
        while received.count(b"\n") < len(expected):
            received.extend(os.read(pipe[0], 4096))

    thread = threading.Thread(target=read)
    with writer_to(pipe[1]) as writer:
        for line in expected:
            writer.write(line)
        thread.start()
        thread.join(30)
        assert received.splitlines() == expected
        assert writer.shed_lines == 0


def test_a_file_that_was_moved_is_reopened(tmp_path: Path) -> None:
    with writer_to(tmp_path / "log") as writer:
        writer.write(b"before")
        wait_for("the line", lambda: (tmp_path / "log").read_bytes() == b"before\n")
        (tmp_path / "log").rename(tmp_path / "log.1")
        writer.reopen()
        writer.write(b"after")
    assert (tmp_path / "log.1").read_bytes() == b"before\n"
    assert (tmp_path / "log").read_bytes() == b"after\n"


def test_several_processes_keep_their_lines_whole(pipe: tuple[int, int]) -> None:
    context = multiprocessing.get_context("fork")
    with writer_to(pipe[1]) as writer:
        writer.write(b"parent")

        def write(name: bytes) -> None:
            for _ in range(2000):
                writer.write(name * 300)
            writer.close()

        children = [context.Process(target=write, args=(name,)) for name in (b"a", b"b")]
        for child in children:
            child.start()
        received = b""
        while received.count(b"\n") < 4001:
            received += os.read(pipe[0], 65536)
        for child in children:
            child.join(30)
    arrived = received.splitlines()
    assert {line: arrived.count(line) for line in set(arrived)} == {
        b"parent": 1,
        b"a" * 300: 2000,
        b"b" * 300: 2000,
    }

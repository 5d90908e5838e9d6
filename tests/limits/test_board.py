"""Who is downloading: counted across processes, and forgotten with the process."""

import contextlib
import math
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection

from exportd.limits.board import Board
from exportd.limits.memory import ENTRIES, SharedMemory, make_shared_memory


def test_connections_of_one_download_are_one() -> None:
    board = Board(make_shared_memory(1))
    with board.entry("ann", "a"), board.entry("ann", "a") as second:
        assert board.count_downloads(second) == (1, 1, 2)
        with board.entry("ann", "b") as other, board.entry("eve", "a") as eves:
            assert board.count_downloads(other) == (2, 3, 1)
            assert board.count_downloads(eves) == (1, 3, 1)
        assert board.count_downloads(second) == (1, 1, 2)
    with board.entry("ann", "c") as entry:
        assert board.count_downloads(entry) == (1, 1, 1)


def _download(shared: SharedMemory, pipe: Connection) -> None:
    board = Board(shared)
    with board.entry("ann", "a") as entry:
        entry.demand = 5.0
        board.publish(entry)
        pipe.send("there")
        pipe.recv()


def test_processes_see_each_other_until_they_are_replaced() -> None:
    shared = make_shared_memory(2)
    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=_download, args=(shared, there))
    process.start()
    assert here.recv() == "there"
    board = Board(shared)
    with board.entry("ann", "b") as entry:
        assert board.count_downloads(entry) == (2, 2, 1)
        assert [other.demand for other in board.others()] == [5.0]
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        # Whoever takes the dead one's place begins anew.
        process = context.Process(target=_download, args=(shared, there))
        process.start()
        assert here.recv() == "there"
        assert board.count_downloads(entry) == (2, 2, 1)
        here.send("go")
        process.join()
        assert board.count_downloads(entry) == (1, 1, 1)
        assert board.others() == []


def test_more_deliveries_than_there_is_room_for_still_count_here() -> None:
    board = Board(make_shared_memory(1))
    with contextlib.ExitStack() as stack:
        for n in range(ENTRIES + 10):
            entry = stack.enter_context(board.entry("ann", f"{n}"))
        assert board.count_downloads(entry) == (ENTRIES + 10, ENTRIES + 10, 1)
        assert entry.demand == math.inf
    with board.entry("ann", "x") as entry:
        assert board.count_downloads(entry) == (1, 1, 1)

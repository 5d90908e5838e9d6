"""The division of a total rate, look by look."""

from contextlib import ExitStack

from exportd.delivery.fair_share import FairShare
from exportd.limits.board import Board
from exportd.limits.memory import make_shared_memory

TOTAL = 1_000_000
SECOND = 1.0


class Reader:
    """A delivery that takes the rate it is given, up to ``most``."""

    def __init__(self, most: float) -> None:
        self.most = most
        self.rate = 0.0
        self.taken = 0

    def set_rate(self, rate: int) -> None:
        self.rate = rate

    def read(self) -> None:
        self.taken += round(min(self.rate, self.most) * SECOND)


def settle(share: FairShare, readers: list[Reader]) -> None:
    for _ in range(60):
        for reader in readers:
            reader.read()
        share.look(SECOND)


def test_connections_that_read_nothing_leave_the_line_to_the_others() -> None:
    board = Board(make_shared_memory(1))
    share = FairShare(TOTAL, board)
    idle, bob = [Reader(0) for _ in range(50)], Reader(10 * TOTAL)
    with ExitStack() as stack:
        for user, reader in [*(("ann", reader) for reader in idle), ("bob", bob)]:
            entry = stack.enter_context(board.entry(user, user))
            stack.enter_context(share.member(entry, lambda reader=reader: reader.taken, reader.set_rate))
        settle(share, [*idle, bob])
    assert bob.rate > 0.95 * TOTAL

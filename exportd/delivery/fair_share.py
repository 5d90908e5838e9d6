"""Divides a total rate among users by what they can take, however many connections each one opens.

Four times a second every process measures what its connections took and shares it with the others (the
board). All processes compute the same division, and each applies it to its own connections.
"""

import asyncio
import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from exportd.limits.board import Board, Entry
from exportd.limits.fairness import share_by_group

_LOOK_SECONDS = 0.25
# A connection that takes less than this part of its rate is limited by its client. It is offered a little
# more than it takes, to notice when it can take more: ``_HEADROOM`` times as much, and its share of
# ``_MIN_PART`` of the total rate, which a user's connections divide.
_CONTENT = 0.75
_HEADROOM = 1.3
_MIN_PART = 0.01
# Clients read in bursts, so the measurements are averaged over about one and a half seconds.
_SMOOTHING = 0.15
# A new connection is not judged yet, because TCP starts slowly.
_GRACE_LOOKS = 12


@dataclass(eq=False, slots=True)
class _Member:
    entry: Entry
    acknowledged: Callable[[], int]
    set_rate: Callable[[int], None]
    taken_before: int
    takes: float = 0.0
    rate: float = math.inf
    looks: int = 0


class FairShare:
    """Keeps the deliveries of this process at their shares."""

    def __init__(self, total_bytes_per_second: int, board: Board) -> None:
        self._total = total_bytes_per_second
        self._board = board
        self._members: dict[Entry, _Member] = {}

    @contextlib.contextmanager
    def member(
        self, entry: Entry, acknowledged: Callable[[], int], set_rate: Callable[[int], None]
    ) -> Iterator[None]:
        """Adds a delivery while the block runs.

        ``acknowledged`` returns the bytes that the client has. ``set_rate`` is called with bytes per second,
        immediately and at each change.
        """
        self._members[entry] = _Member(entry, acknowledged, set_rate, acknowledged())
        self._divide()
        try:
            yield
        finally:
            del self._members[entry]
            self._divide()

    async def run(self) -> None:
        """Measures and divides until it is cancelled."""
        loop = asyncio.get_running_loop()
        before = loop.time()
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            now = loop.time()
            self.look(now - before)
            before = now

    def look(self, seconds: float) -> None:
        """Divides by what each connection took in the seconds since the last call."""
        connections = Counter(entry.user for entry in self._members)
        for member in self._members.values():
            taken = member.acknowledged()
            member.takes += _SMOOTHING * ((taken - member.taken_before) / seconds - member.takes)
            member.taken_before, member.looks = taken, member.looks + 1
            if member.looks <= _GRACE_LOOKS or member.takes >= _CONTENT * member.rate:
                member.entry.demand = math.inf
            else:
                least = self._total * _MIN_PART / connections[member.entry.user]
                member.entry.demand = member.takes * _HEADROOM + least
            self._board.publish(member.entry)
        self._divide()

    def _divide(self) -> None:
        own = list(self._members)
        everybody = [(entry.user, entry.demand) for entry in own + self._board.others()]
        for entry, rate in zip(own, share_by_group(self._total, everybody), strict=False):
            member = self._members[entry]
            # A change of two per cent is not worth a system call.
            if abs(rate - member.rate) > 0.02 * rate or not math.isfinite(member.rate):
                member.set_rate(max(1, round(rate)))
                member.rate = rate

"""The running deliveries in all processes of a daemon."""

import hashlib
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from exportd.limits.memory import ENTRIES, SharedMemory


@dataclass(eq=False, slots=True)
class Entry:
    """One delivery. ``demand`` is the rate that it can take, in bytes per second; inf: any rate."""

    user: int
    download: int
    demand: float = field(default=math.inf)


class Count(NamedTuple):
    """Downloads of a user, downloads of all, and deliveries of one download."""

    of_user: int
    in_all: int
    connections: int


class Board:
    """Every process writes its own segment of the shared memory and reads the others.

    A segment holds 4096 deliveries. The other processes do not see further ones.
    """

    def __init__(self, shared: SharedMemory) -> None:
        own = shared.claim_segment()
        segments = [_Columns(shared.segment(number)) for number in range(shared.segments)]
        self._own = None if own is None else segments[own]
        self._others = [segment for segment in segments if segment is not self._own]
        self._free = list(range(ENTRIES))[::-1]
        self._slots: dict[Entry, int | None] = {}
        self._key = shared.key

    @contextmanager
    def entry(self, user_id: str, download_id: str) -> Iterator[Entry]:
        """Adds a delivery while the block runs. Deliveries of one user with the same ``download_id`` belong
        to one download."""
        entry = Entry(self._hash(user_id), self._hash(f"{download_id} {user_id}"))
        slot = self._free.pop() if self._own is not None and self._free else None
        self._slots[entry] = slot
        self.publish(entry)
        try:
            yield entry
        finally:
            del self._slots[entry]
            if self._own is not None and slot is not None:
                self._own.users[slot] = 0
                self._free.append(slot)

    def publish(self, entry: Entry) -> None:
        """Writes the entry's present state for the other processes."""
        slot = self._slots[entry]
        if self._own is not None and slot is not None:
            self._own.downloads[slot] = entry.download
            self._own.demands[slot] = entry.demand
            # Written last, because it makes the entry visible.
            self._own.users[slot] = entry.user

    @property
    def own(self) -> list[Entry]:
        """This process's entries."""
        return list(self._slots)

    def others(self) -> list[Entry]:
        """The other processes' entries, as published."""
        return [
            Entry(user, segment.downloads[slot], segment.demands[slot])
            for segment in self._others
            if segment.is_used
            for slot, user in enumerate(segment.users.tolist())
            if user
        ]

    def count_downloads(self, entry: Entry) -> Count:
        """Counts the running deliveries, including the entry."""
        entries = self.own + self.others()
        return Count(
            of_user=len({other.download for other in entries if other.user == entry.user}),
            in_all=len({other.download for other in entries}),
            connections=sum(other.download == entry.download for other in entries),
        )

    def _hash(self, name: str) -> int:
        digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8, key=self._key).digest()
        return int.from_bytes(digest, "little") or 1


class _Columns:
    """One process's segment."""

    def __init__(self, memory: memoryview) -> None:
        size = ENTRIES * 8
        self._bytes = memory[:size]
        self.users = memory[:size].cast("Q")
        self.downloads = memory[size : 2 * size].cast("Q")
        self.demands = memory[2 * size :].cast("d")

    @property
    def is_used(self) -> bool:
        return any(self._bytes)

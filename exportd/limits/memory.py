"""The memory that the processes of one daemon share for counting."""

import fcntl
import mmap
import os
import tempfile
from dataclasses import dataclass

RATE_SLOTS = 65536
_RATE_SLOT_BYTES = 16
ENTRIES = 4096
ENTRY_BYTES = 24


@dataclass(frozen=True, slots=True)
class SharedMemory:
    """Shared memory of a fixed size. For several processes it is an unnamed file, made before the processes
    are forked, whose locks assign the segments. For one process it is plain memory.

    ``key`` makes hashes unpredictable, so that outsiders cannot choose names that collide.
    """

    file_descriptor: int | None
    memory: mmap.mmap | bytearray
    segments: int
    key: bytes

    @property
    def rates(self) -> memoryview:
        return memoryview(self.memory)[: RATE_SLOTS * _RATE_SLOT_BYTES]

    def segment(self, number: int) -> memoryview:
        """One process's segment."""
        start = RATE_SLOTS * _RATE_SLOT_BYTES + number * ENTRIES * ENTRY_BYTES
        return memoryview(self.memory)[start : start + ENTRIES * ENTRY_BYTES]

    def claim_segment(self) -> int | None:
        """Reserves a segment for this process until it ends, even by a kill. None: all are taken."""
        if self.file_descriptor is None:
            return 0
        for number in range(self.segments):
            try:
                fcntl.lockf(self.file_descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
            except BlockingIOError:
                continue
            self.segment(number)[:] = bytes(ENTRIES * ENTRY_BYTES)
            return number
        return None


def make_shared_memory(processes: int) -> SharedMemory:
    """For a number of processes, and as many that replace them during a drain."""
    segments = 1 if processes == 1 else 2 * processes + 2
    size = RATE_SLOTS * _RATE_SLOT_BYTES + segments * ENTRIES * ENTRY_BYTES
    key = os.urandom(16)
    if processes == 1:
        return SharedMemory(None, bytearray(size), segments, key)
    with tempfile.TemporaryFile() as file:
        file.truncate(size)
        descriptor = os.dup(file.fileno())
    return SharedMemory(descriptor, mmap.mmap(descriptor, size), segments, key)

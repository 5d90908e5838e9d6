"""A limit on the rate of one download. The kernel keeps it where it can (``SO_MAX_PACING_RATE``, Linux)."""

import asyncio
import socket
import struct
import sys

# Not in the socket module; asm-generic/socket.h.
_SO_MAX_PACING_RATE = 47
_UNLIMITED = 2**64 - 1


def pace_by_kernel(connection: int, rate_bytes_per_second: int) -> bool:
    """Limits what the socket sends from now on; 0 lifts the limit. False where the kernel cannot."""
    if sys.platform != "linux":
        return False
    rate = struct.pack("Q", rate_bytes_per_second or _UNLIMITED)
    # A socket object for the call alone: detach() leaves the descriptor to its owner.
    handle = socket.socket(fileno=connection)
    try:
        handle.setsockopt(socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)
    except OSError:
        return False
    finally:
        handle.detach()
    return True


class Pacer:
    """Keeps a rate by waiting, for where the kernel does not: call ``pace`` after each chunk."""

    def __init__(self, rate_bytes_per_second: int) -> None:
        self._loop = asyncio.get_running_loop()
        self._rate = rate_bytes_per_second
        self._due = self._loop.time()

    async def pace(self, sent_bytes: int) -> None:
        """Waits until ``sent_bytes`` more are within the rate."""
        now = self._loop.time()
        # What a stalled client did not use is not saved up for a burst.
        self._due = max(self._due, now - 0.1) + sent_bytes / self._rate
        if self._due > now:
            await asyncio.sleep(self._due - now)

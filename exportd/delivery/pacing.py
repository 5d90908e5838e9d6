"""The rate of a connection, and the unsent bytes in its socket. The kernel limits both if it can (Linux)."""

import asyncio
import socket
import struct
import sys

# Missing in the socket module; from asm-generic/socket.h.
_SO_MAX_PACING_RATE = 47
_UNLIMITED = 2**64 - 1
_MAX_UNSENT_BYTES = 1024 * 1024
# The rate may have changed meanwhile.
_MAX_WAIT_SECONDS = 0.25


def pace_by_kernel(connection: int, rate_bytes_per_second: int) -> bool:
    """Limits the rate of the socket from now on; 0 removes the limit. False if the kernel cannot."""
    if sys.platform != "linux":
        return False
    rate = struct.pack("Q", rate_bytes_per_second or _UNLIMITED)
    return _set_option(connection, socket.SOL_SOCKET, _SO_MAX_PACING_RATE, rate)


def limit_unsent(connection: int) -> None:
    """Limits the bytes that wait unsent in the socket.

    Otherwise the buffer grows to many megabytes. If the daemon were killed, nobody would know which of them
    arrived; and they leave the processor's cache before they are sent.
    """
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        limit = struct.pack("i", _MAX_UNSENT_BYTES)
        _set_option(connection, socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, limit)


def _set_option(connection: int, level: int, option: int, value: bytes) -> bool:
    # A temporary socket object: detach() leaves the descriptor to its owner.
    handle = socket.socket(fileno=connection)
    try:
        handle.setsockopt(level, option, value)
    except OSError:
        return False
    finally:
        handle.detach()
    return True


class Pacer:
    """Limits a rate by waiting, if the kernel cannot: call ``pace`` after each chunk.

    ``rate`` (bytes per second) may be changed at any time.
    """

    def __init__(self, rate: int) -> None:
        self._loop = asyncio.get_running_loop()
        self.rate = rate
        self._ahead = 0.0
        self._looked_at = self._loop.time()

    async def pace(self, sent_bytes: int) -> None:
        """Waits until ``sent_bytes`` more are within the rate."""
        self._look()
        # The rate that a stalled client did not use is not saved for a burst.
        self._ahead = max(self._ahead, -0.1 * self.rate) + sent_bytes
        while self._ahead >= 1:
            await asyncio.sleep(min(self._ahead / self.rate, _MAX_WAIT_SECONDS))
            self._look()

    def _look(self) -> None:
        now = self._loop.time()
        self._ahead -= (now - self._looked_at) * self.rate
        self._looked_at = now

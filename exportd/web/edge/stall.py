"""Stall detection for every response.

Deliveries of packages have a watch of their own (``delivery/watch.py``), which also knows the reason. This
guard covers every other response, and only asks the kernel.
"""

import asyncio
import socket
import struct

from exportd.delivery.watch import interval_seconds, queued_bytes

# tcpi_bytes_acked in Linux' struct tcp_info (include/uapi/linux/tcp.h).
_BYTES_ACKNOWLEDGED = struct.Struct("=120xQ")
_PAUSE_SECONDS = 0.001
_MAX_PAUSE_SECONDS = 0.1


class StallGuard:
    """Aborts a connection whose client acknowledges nothing of a response for ``timeout_seconds``."""

    def __init__(self, transport: asyncio.Transport, timeout_seconds: float) -> None:
        self._transport = transport
        self._interval = interval_seconds(timeout_seconds)
        # Longer than ``delivery/watch.py`` waits, so that it aborts a stalled delivery first and records the
        # reason. It may be two intervals late.
        self._timeout_seconds = timeout_seconds + 3 * self._interval
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._is_answering = False
        self._acknowledged = -1
        self._progressed_at = 0.0

    def __enter__(self) -> None:
        """A response begins."""
        self._is_answering = True
        if self._timer is None:
            self._progressed_at = self._loop.time()
            self._timer = self._loop.call_later(self._interval, self._look)

    def __exit__(self, *_: object) -> None:
        """The kernel has the whole response. The guard continues until the client has it."""
        self._is_answering = False

    def close(self) -> None:
        """The connection has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _look(self) -> None:
        self._timer = None
        if self._transport.is_closing():
            return
        unacknowledged, acknowledged = _measure(self._transport)
        if not unacknowledged and not self._is_answering:
            return
        if not unacknowledged or acknowledged != self._acknowledged:
            self._acknowledged, self._progressed_at = acknowledged, self._loop.time()
        elif self._loop.time() - self._progressed_at >= self._timeout_seconds:
            self._transport.abort()
            return
        self._timer = self._loop.call_later(self._interval, self._look)


async def wait_until_handed_over(transport: asyncio.Transport) -> None:
    """Returns when the kernel has every written byte, or the connection has ended."""
    pause = _PAUSE_SECONDS
    while transport.get_write_buffer_size() and not transport.is_closing():
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, _MAX_PAUSE_SECONDS)


def _measure(transport: asyncio.Transport) -> tuple[int, int]:
    """Returns the number of bytes that the client has not acknowledged, and of those that it has, on this
    connection.

    Without TCP_INFO (not Linux), a smaller first number is progress too.
    """
    connection = transport.get_extra_info("socket")
    unacknowledged = queued_bytes(connection.fileno()) + transport.get_write_buffer_size()
    try:
        information = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKNOWLEDGED.size)
        return unacknowledged, _BYTES_ACKNOWLEDGED.unpack(information)[0]
    except (AttributeError, OSError, struct.error):
        return unacknowledged, -unacknowledged

"""Clients that take nothing: a delivery whose other side makes no progress is ended.

Progress is what leaves the socket's send queue, as the kernel counts it, and not when the socket has room
again: a slow client may need minutes for that.
"""

import asyncio
import fcntl
import os
import struct
import termios
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from exportd.delivery.outcome import DeliveryAborted, Progress


@dataclass(frozen=True, slots=True)
class Patience:
    """How little progress is enough.

    No byte for ``stall_timeout_seconds``, or fewer than ``least_rate_bytes_per_second`` on average over
    ``least_rate_window_seconds`` (a rate of 0: no limit), ends the delivery. There is no limit on the whole.
    """

    stall_timeout_seconds: float
    least_rate_bytes_per_second: int
    least_rate_window_seconds: float


class Watch:
    """Watches one delivery while its block lasts: ends it when patience does, or when the client has left."""

    def __init__(self, transport: asyncio.Transport, progress: Progress, patience: Patience) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._progress = progress
        self._patience = patience
        self._interval = min(max(patience.stall_timeout_seconds / 4, 0.02), 5.0)
        self._waiter: asyncio.Future[None] | None = None
        self._connection = -1
        self._taken = 0
        self._progressed_at = self._window_began_at = self._loop.time()
        self._taken_before_window = 0
        self.reason: str | None = None

    def __enter__(self) -> Self:
        # A descriptor of our own outlives the transport's, and no other connection can get its number.
        self._connection = os.dup(self._transport.get_extra_info("socket").fileno())
        self._timer = self._loop.call_later(self._interval, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        os.close(self._connection)

    @property
    def connection(self) -> int:
        """The socket's descriptor."""
        return self._connection

    async def wait_until_writable(self) -> None:
        """Raises DeliveryAborted when it is no use waiting any longer."""
        waiter = self._waiter = self._loop.create_future()
        self._loop.add_writer(self._connection, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            self._loop.remove_writer(self._connection)

    def _look(self) -> None:
        now = self._loop.time()
        self.reason = self._judge(now)
        if self.reason is None:
            self._timer = self._loop.call_later(self._interval, self._look)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(DeliveryAborted(self.reason))
        else:
            # Whoever waits for the transport to drain hears of it from the transport.
            self._transport.abort()

    def _judge(self, now: float) -> str | None:
        if self._transport.is_closing():
            return "client disconnected"
        taken = self._progress.bytes_sent - self._queued_bytes()
        if taken > self._taken:
            self._taken, self._progressed_at = taken, now
        elif now - self._progressed_at >= self._patience.stall_timeout_seconds:
            return "stalled"
        elapsed = now - self._window_began_at
        if elapsed >= self._patience.least_rate_window_seconds:
            rate = (taken - self._taken_before_window) / elapsed
            if rate < self._patience.least_rate_bytes_per_second:
                return "too slow"
            self._window_began_at, self._taken_before_window = now, taken
        return None

    def _queued_bytes(self) -> int:
        """Bytes in the kernel's send queue that the other side has not acknowledged."""
        answer = fcntl.ioctl(self._connection, termios.TIOCOUTQ, b"\0\0\0\0")
        queued: int = struct.unpack("i", answer)[0]
        return queued


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

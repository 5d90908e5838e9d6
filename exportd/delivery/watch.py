"""Stall detection: aborts a delivery whose client stops acknowledging data.

Progress is measured by the socket's send queue, and not by the socket becoming writable: a slow client may
need minutes for that.
"""

import asyncio
import fcntl
import os
import socket
import struct
import termios
from types import TracebackType
from typing import Self

from exportd.delivery.progress import DeliveryAborted, Progress
from exportd.settings import DownloadSettings

# A client that has everything acknowledges it within a round trip.
_FIRST_PAUSE_SECONDS = 0.001
_MAX_PAUSE_SECONDS = 0.1
_TCP_CLOSE = 7  # Linux, include/net/tcp_states.h
# A TLS client that has everything and disconnects never acknowledges close_notify (24 bytes in TLS 1.3, at
# most 31 in 1.2). So a connection that is reset with less than this missing counts as complete.
_MAX_ALERT_BYTES = 32


class Watch:
    """Watches one delivery while its block runs. Ends it when the client makes too little progress, or left.

    Too little is no byte for ``stall_timeout_seconds``, or fewer than ``min_rate_bytes_per_second`` on
    average over ``min_rate_window_seconds`` (a rate of 0: no limit). The whole delivery has no time limit.
    """

    def __init__(self, transport: asyncio.Transport, progress: Progress, settings: DownloadSettings) -> None:
        self._loop = asyncio.get_running_loop()
        self._transport = transport
        self._progress = progress
        self._settings = settings
        self._interval = interval_seconds(settings.stall_timeout_seconds)
        self._waiter: asyncio.Future[None] | None = None
        self._connection = -1
        self._taken = 0
        self._progressed_at = self._window_began_at = self._loop.time()
        self._taken_before_window = 0
        self._all_is_sent = False
        self.reason: str | None = None

    def __enter__(self) -> Self:
        # A duplicate outlives the transport's descriptor, and no other connection can get its number.
        self._connection = os.dup(self._transport.get_extra_info("socket").fileno())
        self._timer = self._loop.call_later(self._interval, self._look)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        self._count_acknowledged()
        os.close(self._connection)

    @property
    def connection(self) -> int:
        """The socket's descriptor."""
        return self._connection

    def acknowledged(self) -> int:
        """The bytes of the package that the client's kernel has now."""
        self._count_acknowledged()
        return self._progress.bytes_acknowledged

    async def wait_until_writable(self) -> None:
        """Raises DeliveryAborted when the client stalls or has disconnected."""
        waiter = self._waiter = self._loop.create_future()
        self._loop.add_writer(self._connection, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            self._loop.remove_writer(self._connection)

    async def wait_until_acknowledged(self) -> None:
        """After the last byte was sent, waits until the client's kernel has acknowledged it.

        Raises DeliveryAborted if the client disconnects first, or makes no progress. A client may have closed
        its sending side; it still gets the rest.
        """
        self._all_is_sent = True
        is_encrypted = self._transport.get_extra_info("sslcontext") is not None
        pause = _FIRST_PAUSE_SECONDS
        # Below TLS, uvloop's transport may hold bytes and offers no way to ask. It writes them as soon as
        # the socket has room. If the socket's queue stays empty, uvloop has nothing left to send.
        while self._queued_bytes() or (is_encrypted and not await self._stays_empty()):
            if self._has_connection_ended():
                if self._queued_bytes() > (_MAX_ALERT_BYTES if is_encrypted else 0):
                    raise DeliveryAborted("client disconnected")
                break
            if self.reason is not None:
                raise DeliveryAborted(self.reason)
            await asyncio.sleep(pause)
            pause = min(pause * 1.5, _MAX_PAUSE_SECONDS)
        self._progress.bytes_acknowledged = self._progress.bytes_sent

    def _look(self) -> None:
        now = self._loop.time()
        self.reason = self._judge(now)
        if self.reason is None:
            self._timer = self._loop.call_later(self._interval, self._look)
        elif self._waiter is not None and not self._waiter.done():
            self._waiter.set_exception(DeliveryAborted(self.reason))
        else:
            # A sender that waits in drain() gets an exception from the transport.
            self._transport.abort()

    def _judge(self, now: float) -> str | None:
        if self._transport.is_closing() and not self._all_is_sent:
            return "client disconnected"
        # A large chunk may take long to leave the transport.
        handed_on = self._progress.bytes_written - self._transport.get_write_buffer_size()
        self._progress.bytes_sent = max(self._progress.bytes_sent, handed_on)
        taken = self._progress.bytes_sent - self._queued_bytes()
        self._count_acknowledged()
        if taken > self._taken:
            self._taken, self._progressed_at = taken, now
        elif now - self._progressed_at >= self._settings.stall_timeout_seconds:
            return "stalled"
        elapsed = now - self._window_began_at
        if elapsed >= self._settings.min_rate_window_seconds:
            rate = (taken - self._taken_before_window) / elapsed
            if rate < self._settings.min_rate_bytes_per_second:
                return "too slow"
            self._window_began_at, self._taken_before_window = now, taken
        return None

    def _queued_bytes(self) -> int:
        return queued_bytes(self._connection)

    async def _stays_empty(self) -> bool:
        for _ in range(3):
            if self._queued_bytes():
                return False
            await asyncio.sleep(_FIRST_PAUSE_SECONDS)
        return not self._queued_bytes()

    def _count_acknowledged(self) -> None:
        # The body's bytes are the last in the queue, because only the handler writes until it ends.
        acknowledged = max(self._progress.bytes_sent - self._queued_bytes(), 0)
        self._progress.bytes_acknowledged = max(acknowledged, self._progress.bytes_acknowledged)

    def _has_connection_ended(self) -> bool:
        """Whether the connection was reset or timed out, so that no further byte will be acknowledged."""
        if not hasattr(socket, "TCP_INFO"):
            return self._transport.is_closing()
        with socket.socket(fileno=os.dup(self._connection)) as connection:
            state: int = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]
        return state == _TCP_CLOSE


def interval_seconds(stall_timeout_seconds: float) -> float:
    """The interval between checks for a stall."""
    return min(max(stall_timeout_seconds / 4, 0.02), 1.0)


def queued_bytes(descriptor: int) -> int:
    """Returns the bytes in a socket's send queue that the client has not acknowledged."""
    answer = fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0\0\0\0")
    queued: int = struct.unpack("i", answer)[0]
    return queued


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)

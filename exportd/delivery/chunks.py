"""Sending a package in chunks, for connections that sendfile cannot serve (TLS)."""

import asyncio
import time

from exportd.delivery import cold
from exportd.delivery.channel import Channel
from exportd.delivery.pacing import Pacer
from exportd.delivery.progress import DeliveryAborted, Observer, PackageUnreadable
from exportd.domain.delivery import Method
from exportd.http.ranges import ByteRange
from exportd.storage.files import OpenPackage, PackageChanged

_PAUSE_SECONDS = 0.001


class Chunks:
    """Reads a package and writes it to the connection in chunks, at the rate of ``pacer`` if there is one."""

    method = Method.CHUNKS

    def __init__(self, chunk_size: int, observer: Observer) -> None:
        self.pacer: Pacer | None = None
        self._chunk_size = chunk_size
        self._observer = observer

    async def send(self, channel: Channel, package: OpenPackage, part: ByteRange) -> None:
        """Sends one part. At most a few chunks wait in memory for a slow client. Returns when the kernel
        has every byte.

        Raises DeliveryAborted when the client is gone, PackageChanged before a chunk of a package that was
        written to, PackageUnreadable when it cannot be read.
        """
        transport, progress = channel.transport, channel.progress
        offset, stop = part.start, part.stop
        progress.bytes_written = observed = progress.bytes_sent
        try:
            while offset < stop:
                chunk = await self._read(package, offset, min(self._chunk_size, stop - offset))
                if not chunk:
                    raise PackageChanged(f"the file ends at byte {offset}")
                progress.bytes_written += len(chunk)
                await channel.response.write(chunk)
                await channel.writer.drain()
                offset += len(chunk)
                progress.bytes_sent = progress.bytes_written - transport.get_write_buffer_size()
                if progress.bytes_sent > observed:
                    self._observer.bytes_sent(Method.CHUNKS, progress.bytes_sent - observed)
                    observed = progress.bytes_sent
                if self.pacer is not None:
                    await self.pacer.pace(len(chunk))
            # With this limit drain() waits until the transport holds next to nothing back. With a limit of
            # zero uvloop's TLS would wait for ever.
            transport.set_write_buffer_limits(high=1)
            await channel.writer.drain()
            while transport.get_write_buffer_size() and not transport.is_closing():  # noqa: ASYNC110
                await asyncio.sleep(_PAUSE_SECONDS)
            if transport.is_closing():
                raise DeliveryAborted("client disconnected")
            progress.bytes_sent = progress.bytes_written
            self._observer.bytes_sent(Method.CHUNKS, progress.bytes_sent - observed)
        except ConnectionError as error:
            raise DeliveryAborted(str(error) or "client disconnected") from error
        finally:
            if not transport.is_closing():
                transport.set_write_buffer_limits()

    async def _read(self, package: OpenPackage, offset: int, size_bytes: int) -> bytes:
        began = time.perf_counter()
        try:
            data, is_cold = await cold.read(package.descriptor, offset, size_bytes)
            # Check after the read: a chunk that was read before the change is sound.
            package.check_unchanged()
        except OSError as error:
            raise PackageUnreadable(error.strerror or str(error)) from error
        self._observer.slice_sent(time.perf_counter() - began, is_cold)
        return data

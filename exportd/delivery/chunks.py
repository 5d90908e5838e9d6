"""The package is read and written in chunks, for connections that sendfile cannot serve (TLS)."""

import asyncio
import time

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import StreamResponse

from exportd.delivery import cold
from exportd.delivery.pacing import Pacer
from exportd.delivery.progress import DeliveryAborted, Observer, PackageUnreadable, Progress
from exportd.storage.files import OpenPackage, PackageChanged

_PAUSE_SECONDS = 0.001


async def send_by_chunks(
    response: StreamResponse,
    writer: AbstractStreamWriter,
    transport: asyncio.Transport,
    package: OpenPackage,
    start: int,
    length: int,
    *,
    chunk_size: int,
    progress: Progress,
    pacer: Pacer | None,
    observer: Observer,
) -> None:
    """Sends ``length`` bytes of an open package from ``start`` on, a few chunks ahead of the client at most.

    When it returns, every byte has been handed to the kernel. Raises DeliveryAborted when the client is
    gone, PackageChanged before a chunk of a package that was written to, PackageUnreadable when it cannot be
    read.
    """
    offset, stop = start, start + length
    progress.bytes_written = observed = progress.bytes_sent
    try:
        while offset < stop:
            chunk = await _read(package, offset, min(chunk_size, stop - offset), observer)
            if not chunk:
                raise PackageChanged(f"the file ends at byte {offset}")
            progress.bytes_written += len(chunk)
            await response.write(chunk)
            await writer.drain()
            offset += len(chunk)
            progress.bytes_sent = progress.bytes_written - transport.get_write_buffer_size()
            if progress.bytes_sent > observed:
                observer.bytes_sent("chunks", progress.bytes_sent - observed)
                observed = progress.bytes_sent
            if pacer is not None:
                await pacer.pace(len(chunk))
        # With this limit drain() waits until the transport holds next to nothing back; with a limit of zero
        # uvloop's TLS would wait for ever.
        transport.set_write_buffer_limits(high=1)
        await writer.drain()
        while transport.get_write_buffer_size() and not transport.is_closing():  # noqa: ASYNC110
            await asyncio.sleep(_PAUSE_SECONDS)
        if transport.is_closing():
            raise DeliveryAborted("client disconnected")
        progress.bytes_sent = progress.bytes_written
        observer.bytes_sent("chunks", progress.bytes_sent - observed)
    except ConnectionError as error:
        raise DeliveryAborted(str(error) or "client disconnected") from error
    finally:
        if not transport.is_closing():
            transport.set_write_buffer_limits()


async def _read(package: OpenPackage, offset: int, size: int, observer: Observer) -> bytes:
    began = time.perf_counter()
    try:
        data, is_cold = await cold.read(package.descriptor, offset, size)
        # After the read: what was read before the file was written to is what was promised.
        package.check_unchanged()
    except OSError as error:
        raise PackageUnreadable(error.strerror or str(error)) from error
    observer.slice_sent(time.perf_counter() - began, is_cold)
    return data

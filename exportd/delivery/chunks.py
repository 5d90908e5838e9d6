"""The package is read and written in chunks, for connections that sendfile cannot serve (TLS)."""

import asyncio

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import StreamResponse

from exportd.delivery import cold
from exportd.delivery.outcome import DeliveryAborted, PackageUnreadable, Progress
from exportd.delivery.pacing import Pacer
from exportd.packages.store import OpenPackage, PackageChanged


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
) -> None:
    """Sends ``length`` bytes of an open package from ``start`` on, a few chunks ahead of the client at most.

    When it returns, every byte has been handed to the kernel. Raises DeliveryAborted when the client is
    gone, PackageChanged before a chunk of a package that was written to, PackageUnreadable when it cannot be
    read.
    """
    offset, stop = start, start + length
    written = progress.bytes_sent
    try:
        while offset < stop:
            chunk = await _read(package, offset, min(chunk_size, stop - offset))
            if not chunk:
                raise PackageChanged(f"the file ends at byte {offset}")
            await response.write(chunk)
            await writer.drain()
            offset += len(chunk)
            written += len(chunk)
            progress.bytes_sent = written - transport.get_write_buffer_size()
            if pacer is not None:
                await pacer.pace(len(chunk))
        # A limit of zero makes drain() wait until the transport holds nothing back.
        transport.set_write_buffer_limits(high=0)
        await writer.drain()
        if transport.is_closing():
            raise DeliveryAborted("client disconnected")
        progress.bytes_sent = written
    except ConnectionError as error:
        raise DeliveryAborted(str(error) or "client disconnected") from error
    finally:
        transport.set_write_buffer_limits()


async def _read(package: OpenPackage, offset: int, size: int) -> bytes:
    try:
        data = await cold.read(package.descriptor, offset, size)
        # After the read: what was read before the file was written to is what was promised.
        package.check_unchanged()
    except OSError as error:
        raise PackageUnreadable(error.strerror or str(error)) from error
    return data

"""The package is read and written in chunks, for connections that sendfile cannot serve (TLS)."""

import asyncio
import errno
import os

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import StreamResponse

from exportd.delivery.outcome import DeliveryAborted, PackageDamaged, Progress

_NO_WAIT = getattr(os, "RWF_NOWAIT", 0)


async def send_by_chunks(
    response: StreamResponse,
    writer: AbstractStreamWriter,
    transport: asyncio.Transport,
    descriptor: int,
    start: int,
    length: int,
    *,
    chunk_size: int,
    progress: Progress,
) -> None:
    """Sends ``length`` bytes of an open file from ``start`` on, a few chunks ahead of the client at most.

    When it returns, every byte has been handed to the kernel. Raises DeliveryAborted when the client is
    gone, PackageDamaged when the file is shorter than that or cannot be read.
    """
    offset, stop = start, start + length
    written = progress.bytes_sent
    try:
        while offset < stop:
            chunk = await _read(descriptor, offset, min(chunk_size, stop - offset))
            if not chunk:
                raise PackageDamaged(f"the file ends at byte {offset}")
            await response.write(chunk)
            await writer.drain()
            offset += len(chunk)
            written += len(chunk)
            progress.bytes_sent = written - transport.get_write_buffer_size()
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


async def _read(descriptor: int, offset: int, size: int) -> bytes:
    """Reads without ever blocking the loop: from memory if the pages are there, else in a thread."""
    try:
        if _NO_WAIT:
            buffer = bytearray(size)
            try:
                count = os.preadv(descriptor, [buffer], offset, _NO_WAIT)
            except BlockingIOError:
                pass
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
            else:
                return bytes(memoryview(buffer)[:count])
        return await asyncio.get_running_loop().run_in_executor(None, os.pread, descriptor, size, offset)
    except OSError as error:
        raise PackageDamaged(error.strerror or str(error)) from error

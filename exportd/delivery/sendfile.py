"""The kernel sends the package: ``os.sendfile`` on a duplicate of the connection's descriptor.

The duplicate lets the loop watch for writability beside the transport, and cannot be taken by another
connection when the transport closes first. Header bytes must have left the transport before the first call.
"""

import asyncio
import errno
import os

from exportd.delivery.outcome import DeliveryAborted, PackageUnreadable, Progress
from exportd.packages.store import OpenPackage, PackageChanged

# What a socket says when the other side has gone; ConnectionError covers the rest.
_PEER_GONE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN}
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class SendfileUnsupported(Exception):
    """Sendfile cannot go on here; nothing of the refused slice was sent."""


async def send_by_sendfile(
    transport: asyncio.Transport,
    package: OpenPackage,
    start: int,
    length: int,
    *,
    slice_bytes: int,
    progress: Progress,
) -> None:
    """Sends ``length`` bytes of an open package from ``start`` on, in slices with a turn of the loop between.

    ``progress`` moves with every byte the kernel took, so after SendfileUnsupported the caller can go on
    from there. Raises DeliveryAborted when the client is gone, PackageChanged before a slice of a package
    that was written to, PackageUnreadable when it cannot be read.
    """
    loop = asyncio.get_running_loop()
    offset, stop = start, start + length
    try:
        connection = os.dup(transport.get_extra_info("socket").fileno())
    except OSError as error:
        # No descriptor left, perhaps; chunks need none.
        raise SendfileUnsupported(error.strerror) from error
    try:
        while True:
            if transport.is_closing():
                raise DeliveryAborted("client disconnected")
            try:
                package.check_unchanged()
                sent = os.sendfile(connection, package.descriptor, offset, min(slice_bytes, stop - offset))
            except BlockingIOError:
                await _wait_until_writable(loop, connection)
                continue
            except OSError as error:
                raise _translate(error) from error
            if sent == 0:
                raise PackageChanged(f"the file ends at byte {offset}")
            offset += sent
            progress.bytes_sent += sent
            if offset == stop:
                return
            await asyncio.sleep(0)
    finally:
        os.close(connection)


async def _wait_until_writable(loop: asyncio.AbstractEventLoop, connection: int) -> None:
    writable = loop.create_future()
    loop.add_writer(connection, _set, writable)
    try:
        await writable
    finally:
        loop.remove_writer(connection)


def _set(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _translate(error: OSError) -> Exception:
    if isinstance(error, ConnectionError) or error.errno in _PEER_GONE:
        return DeliveryAborted(error.strerror or "client disconnected")
    if error.errno in _UNSUPPORTED:
        return SendfileUnsupported(error.strerror)
    return PackageUnreadable(error.strerror or str(error))

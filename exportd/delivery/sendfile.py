"""The kernel sends the package: ``os.sendfile`` on a duplicate of the connection's descriptor.

The duplicate lets the loop watch for writability beside the transport, and cannot be taken by another
connection when the transport closes first. Header bytes must have left the transport before the first call.
"""

import asyncio
import errno
import os
import time

from exportd.delivery.cold import is_resident, make_resident
from exportd.delivery.progress import DeliveryAborted, Observer, PackageUnreadable, Progress
from exportd.delivery.watch import Watch
from exportd.storage.files import OpenPackage, PackageChanged

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
    watch: Watch,
    observer: Observer,
) -> None:
    """Sends ``length`` bytes of an open package from ``start`` on, in slices with a turn of the loop between.

    ``progress`` moves with every byte the kernel took, so after SendfileUnsupported the caller can go on
    from there. Raises DeliveryAborted when the client is gone or stalls, PackageChanged before a slice of a
    package that was written to, PackageUnreadable when it cannot be read.
    """
    offset, stop = start, start + length
    resident_until = start
    disk_seconds = 0.0
    while True:
        if transport.is_closing():
            raise DeliveryAborted("client disconnected")
        count = min(slice_bytes, stop - offset)
        try:
            if offset + count > resident_until:
                if not is_resident(package.descriptor, offset, count):
                    began = time.perf_counter()
                    await make_resident(package.descriptor, offset, count)
                    disk_seconds = time.perf_counter() - began
                resident_until = offset + count
            package.check_unchanged()
            began = time.perf_counter()
            sent = os.sendfile(watch.connection, package.descriptor, offset, count)
        except BlockingIOError:
            await watch.wait_until_writable()
            continue
        except OSError as error:
            raise _translate(error) from error
        if sent == 0:
            raise PackageChanged(f"the file ends at byte {offset}")
        offset += sent
        progress.bytes_sent += sent
        observer.slice_sent(disk_seconds + time.perf_counter() - began, disk_seconds > 0)
        observer.bytes_sent("sendfile", sent)
        disk_seconds = 0.0
        if offset == stop:
            return
        await asyncio.sleep(0)


def _translate(error: OSError) -> Exception:
    if isinstance(error, ConnectionError) or error.errno in _PEER_GONE:
        return DeliveryAborted(error.strerror or "client disconnected")
    if error.errno in _UNSUPPORTED:
        return SendfileUnsupported(error.strerror)
    return PackageUnreadable(error.strerror or str(error))

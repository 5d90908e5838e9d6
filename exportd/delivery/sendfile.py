"""Sending a package by ``os.sendfile``, on a duplicate of the connection's descriptor.

The event loop can watch the duplicate for writability beside the transport. Its number cannot go to another
connection when the transport closes first. The headers must have left the transport before the first call.
"""

import asyncio
import errno
import os
import time

from exportd.delivery.channel import Channel
from exportd.delivery.cold import is_resident, make_resident
from exportd.delivery.progress import DeliveryAborted, Observer, PackageUnreadable
from exportd.domain.delivery import Method
from exportd.http.ranges import ByteRange
from exportd.storage.files import OpenPackage, PackageChanged

# Errors of a socket whose peer is gone, besides ConnectionError.
_PEER_GONE = {errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN, errno.ENOTCONN}
_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}


class SendfileUnsupported(Exception):
    """Sendfile does not work here. Nothing of the rejected slice was sent."""


class Sendfile:
    """Sends parts of a package by ``os.sendfile``, in slices with a turn of the event loop between them."""

    method = Method.SENDFILE

    def __init__(self, slice_bytes: int, observer: Observer) -> None:
        self._slice_bytes = slice_bytes
        self._observer = observer

    async def send(self, channel: Channel, package: OpenPackage, part: ByteRange) -> None:
        """Sends one part. ``channel.progress`` moves with every byte that the kernel took, so the caller can
        continue from there after SendfileUnsupported.

        Raises DeliveryAborted when the client is gone or stalls, PackageChanged before a slice of a package
        that was written to, PackageUnreadable when it cannot be read.
        """
        offset, stop = part.start, part.stop
        resident_until = offset
        disk_seconds = 0.0
        while True:
            if channel.transport.is_closing():
                raise DeliveryAborted("client disconnected")
            count = min(self._slice_bytes, stop - offset)
            try:
                if offset + count > resident_until:
                    if not is_resident(package.descriptor, offset, count):
                        began = time.perf_counter()
                        await make_resident(package.descriptor, offset, count)
                        disk_seconds = time.perf_counter() - began
                    resident_until = offset + count
                package.check_unchanged()
                began = time.perf_counter()
                sent = os.sendfile(channel.watch.connection, package.descriptor, offset, count)
            except BlockingIOError:
                await channel.watch.wait_until_writable()
                continue
            except OSError as error:
                raise _translate(error) from error
            if sent == 0:
                raise PackageChanged(f"the file ends at byte {offset}")
            offset += sent
            channel.progress.bytes_sent += sent
            self._observer.slice_sent(disk_seconds + time.perf_counter() - began, disk_seconds > 0)
            self._observer.bytes_sent(Method.SENDFILE, sent)
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

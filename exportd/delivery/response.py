"""Delivery: headers, then bytes, by the kernel where the connection allows and in chunks where it does not.

Knows nothing of jobs. Once the headers are out there is no error page any more: what goes wrong closes the
connection short of the promised length, which every client notices, and nothing else follows on it.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import Request, StreamResponse

from exportd.delivery.chunks import send_by_chunks
from exportd.delivery.fair_share import FairShare
from exportd.delivery.pacing import Pacer, limit_unsent, pace_by_kernel
from exportd.delivery.progress import DeliveryAborted, Observer, PackageUnreadable, Progress
from exportd.delivery.sendfile import SendfileUnsupported, send_by_sendfile
from exportd.delivery.watch import Patience, Watch
from exportd.domain.delivery import Delivery, Method, Outcome
from exportd.http.body import Segment
from exportd.http.ranges import ByteRange
from exportd.limits.board import Entry
from exportd.storage.files import OpenPackage, PackageChanged

# Below this a socket's buffer takes all of a package anyway.
_LARGE_BYTES = 1024 * 1024
# Until a share is known.
_UNPACED = 2**40


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """``sendfile``: use it where it is possible; sizes are in bytes; a rate of 0 is no limit, and so is no
    ``fair_share``."""

    sendfile: bool
    slice_bytes: int
    chunk_size: int
    max_rate_bytes_per_second: int
    fair_share: FairShare | None
    patience: Patience
    observer: Observer


async def deliver(
    request: Request,
    response: StreamResponse,
    package: OpenPackage,
    segments: Sequence[Segment],
    options: DeliveryOptions,
    progress: Progress,
    entry: Entry,
) -> Delivery:
    """Sends ``response``'s headers and, as its body, ``segments``: ranges of the package, and literal bytes.

    Ends when the other side has acknowledged everything. ``progress`` is kept up to date meanwhile. ``entry``
    tells whose share of a total rate is used.

    Never raises for what a client or a disk does; the connection is aborted unless every byte went out.
    Cancellation (at shutdown) is an outcome too, and the caller's to raise again once it is recorded.
    """
    started = time.monotonic()
    sending = _Sending(request, response, package, options, progress, entry)
    outcome, reason = Outcome.COMPLETED, None
    try:
        await sending.send(segments)
    except DeliveryAborted as error:
        outcome, reason = Outcome.ABORTED, str(error)
    except PackageUnreadable as error:
        outcome, reason = Outcome.FAILED, str(error)
    except PackageChanged as error:
        outcome, reason = Outcome.CHANGED, str(error)
    except asyncio.CancelledError:
        outcome, reason = Outcome.ABORTED, "shutdown"
    except BaseException:
        # A defect, or no descriptor left: an error page may follow only if no headers are out.
        if response.prepared:
            sending.abort()
        raise
    if outcome is not Outcome.COMPLETED:
        sending.abort()
    return Delivery(
        outcome,
        reason,
        Method.SENDFILE if sending.by_kernel else Method.CHUNKS,
        progress.bytes_sent,
        progress.bytes_acknowledged,
        sending.first_byte_at,
        time.monotonic() - started,
    )


class _Sending:
    """One response body on its way."""

    def __init__(
        self,
        request: Request,
        response: StreamResponse,
        package: OpenPackage,
        options: DeliveryOptions,
        progress: Progress,
        entry: Entry,
    ) -> None:
        self.first_byte_at: float | None = None
        self.progress = progress
        self._request = request
        self._response = response
        self._package = package
        self._options = options
        self._entry = entry
        self._transport = request.transport
        self.by_kernel = (
            options.sendfile
            and self._transport is not None
            and self._transport.get_extra_info("sslcontext") is None
        )

    async def send(self, segments: Sequence[Segment]) -> None:
        """Raises DeliveryAborted, PackageUnreadable and PackageChanged."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise DeliveryAborted("client disconnected")
        with Watch(transport, self.progress, self._options.patience) as watch, self._paced(watch) as pacer:
            if self._package.size_bytes > _LARGE_BYTES:
                limit_unsent(watch.connection)
            try:
                writer = await self._send_headers(transport)
                for segment in segments:
                    if isinstance(segment, ByteRange):
                        await self._send_range(transport, writer, segment, watch, pacer)
                    else:
                        await self._response.write(segment)
                        await self._flush(transport, writer)
                await watch.wait_until_acknowledged()
            except ConnectionError as error:
                raise DeliveryAborted(watch.reason or str(error) or "client disconnected") from error
            except DeliveryAborted as error:
                raise DeliveryAborted(watch.reason or str(error)) from error
        try:
            # Until the last byte was acknowledged, the socket held the file's own pages.
            self._package.check_unchanged()
        except OSError as error:
            raise PackageUnreadable(error.strerror or str(error)) from error

    def abort(self) -> None:
        """Closes the connection at once, short of what the headers promised."""
        self._response.force_close()
        if self._transport is not None:
            self._transport.abort()

    @contextlib.contextmanager
    def _paced(self, watch: Watch) -> Iterator[Pacer | None]:
        """Keeps the limits by the kernel while the block lasts; where it cannot, by chunks and a pacer."""
        most, fair_share = self._options.max_rate_bytes_per_second, self._options.fair_share
        if not most and fair_share is None:
            yield None
            return
        pacer = None
        if not pace_by_kernel(watch.connection, most):
            self.by_kernel = False
            pacer = Pacer(most or _UNPACED)

        def set_rate(rate: int) -> None:
            rate = min(rate, most) if most else rate
            if pacer is None:
                pace_by_kernel(watch.connection, rate)
            else:
                pacer.rate = rate

        with contextlib.ExitStack() as stack:
            if fair_share is not None:
                stack.enter_context(fair_share.member(self._entry, watch.acknowledged, set_rate))
            yield pacer
        if pacer is None:
            pace_by_kernel(watch.connection, 0)

    async def _send_headers(self, transport: asyncio.Transport) -> AbstractStreamWriter:
        if self.by_kernel:
            # With a limit of zero the bytes go to the socket at once; uvloop would queue them.
            transport.set_write_buffer_limits(high=0)
        writer = await self._response.prepare(self._request)
        assert writer is not None
        await self._flush(transport, writer)
        self.first_byte_at = time.perf_counter()
        return writer

    async def _send_range(
        self,
        transport: asyncio.Transport,
        writer: AbstractStreamWriter,
        part: ByteRange,
        watch: Watch,
        pacer: Pacer | None,
    ) -> None:
        if not part.length:
            return
        sent_before = self.progress.bytes_sent
        if self.by_kernel:
            try:
                await send_by_sendfile(
                    transport,
                    self._package,
                    part.start,
                    part.length,
                    slice_bytes=self._options.slice_bytes,
                    progress=self.progress,
                    watch=watch,
                    observer=self._options.observer,
                )
            except SendfileUnsupported:
                self.by_kernel = False
            else:
                return
        sent = self.progress.bytes_sent - sent_before
        await send_by_chunks(
            self._response,
            writer,
            transport,
            self._package,
            part.start + sent,
            part.length - sent,
            chunk_size=self._options.chunk_size,
            progress=self.progress,
            pacer=pacer,
            observer=self._options.observer,
        )

    async def _flush(self, transport: asyncio.Transport, writer: AbstractStreamWriter) -> None:
        """Before the kernel sends, nothing may be left that the transport would send later."""
        if self.by_kernel:
            await writer.drain()
            if transport.is_closing() or transport.get_write_buffer_size():
                raise DeliveryAborted("client disconnected")

"""Delivery: sends headers, then bytes, by sendfile if the connection allows it and in chunks if not.

Knows nothing of jobs. Once the headers are out there can be no error page: a failure closes the connection
short of the promised length, which every client notices, and nothing follows on it.
"""

import asyncio
import contextlib
import time
from collections.abc import Iterator, Sequence

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import Request, StreamResponse

from exportd.delivery.channel import Channel
from exportd.delivery.chunks import Chunks
from exportd.delivery.fair_share import FairShare
from exportd.delivery.pacing import Pacer, limit_unsent, pace_by_kernel
from exportd.delivery.progress import DeliveryAborted, Observer, PackageUnreadable, Progress
from exportd.delivery.sendfile import Sendfile, SendfileUnsupported
from exportd.delivery.watch import Watch
from exportd.domain.delivery import Delivery, Method, Outcome
from exportd.http.body import Segment
from exportd.http.ranges import ByteRange
from exportd.limits.board import Entry
from exportd.settings import DownloadSettings
from exportd.storage.files import OpenPackage, PackageChanged

# A socket's buffer takes a smaller package as a whole.
_LARGE_BYTES = 1024 * 1024
# The rate until the first share is known.
_UNPACED = 2**40


class Sender:
    """Sends packages as ``[download]`` says. ``fair_share`` divides a total rate, if there is one."""

    def __init__(self, settings: DownloadSettings, fair_share: FairShare | None, observer: Observer) -> None:
        self.settings = settings
        self.fair_share = fair_share
        self.observer = observer

    async def deliver(
        self,
        request: Request,
        response: StreamResponse,
        package: OpenPackage,
        segments: Sequence[Segment],
        progress: Progress,
        entry: Entry,
    ) -> Delivery:
        """Sends the headers of ``response`` and, as its body, ``segments``: ranges of the package, and
        literal bytes.

        Returns when the client's kernel has acknowledged everything. Keeps ``progress`` up to date meanwhile.
        ``entry`` says whose share of a total rate is used.

        Errors of the client or of the disk are outcomes and are not raised. The connection is aborted unless
        every byte was sent. Cancellation (at shutdown) is an outcome too; the caller raises it again after
        recording it.
        """
        started = time.monotonic()
        sending = _Sending(self, request, response, package, progress, entry)
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
            # A defect, or no descriptor left. An error response may follow only if no headers are out.
            if response.prepared:
                sending.abort()
            raise
        if outcome is not Outcome.COMPLETED:
            sending.abort()
        return Delivery(
            outcome,
            reason,
            sending.method,
            progress.bytes_sent,
            progress.bytes_acknowledged,
            sending.first_byte_at,
            time.monotonic() - started,
        )


class _Sending:
    """The sending of one response body."""

    def __init__(
        self,
        sender: Sender,
        request: Request,
        response: StreamResponse,
        package: OpenPackage,
        progress: Progress,
        entry: Entry,
    ) -> None:
        self.first_byte_at: float | None = None
        self._sender = sender
        self._request = request
        self._response = response
        self._package = package
        self._progress = progress
        self._entry = entry
        self._transport = request.transport
        settings = sender.settings
        self._chunks = Chunks(settings.chunk_size, sender.observer)
        is_plain = self._transport is not None and self._transport.get_extra_info("sslcontext") is None
        self._way: Sendfile | Chunks = self._chunks
        if settings.sendfile and is_plain:
            self._way = Sendfile(settings.slice_bytes, sender.observer)

    @property
    def method(self) -> Method:
        return self._way.method

    async def send(self, segments: Sequence[Segment]) -> None:
        """Raises DeliveryAborted, PackageUnreadable and PackageChanged."""
        transport = self._transport
        if transport is None or transport.is_closing():
            raise DeliveryAborted("client disconnected")
        with Watch(transport, self._progress, self._sender.settings) as watch, self._paced(watch):
            if self._package.size_bytes > _LARGE_BYTES:
                limit_unsent(watch.connection)
            try:
                channel = await self._open_channel(transport, watch)
                for segment in segments:
                    if isinstance(segment, ByteRange):
                        await self._send_part(channel, segment)
                    else:
                        await self._response.write(segment)
                        await self._flush(transport, channel.writer)
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
        """Closes the connection immediately, short of what the headers promised."""
        self._response.force_close()
        if self._transport is not None:
            self._transport.abort()

    @contextlib.contextmanager
    def _paced(self, watch: Watch) -> Iterator[None]:
        """Keeps the rates while the block runs: by the kernel, or else by chunks and a pacer."""
        max_rate, fair_share = self._sender.settings.max_rate_bytes_per_second, self._sender.fair_share
        if not max_rate and fair_share is None:
            yield
            return
        pacer = None
        if not pace_by_kernel(watch.connection, max_rate):
            self._way = self._chunks
            pacer = self._chunks.pacer = Pacer(max_rate or _UNPACED)

        def set_rate(rate: int) -> None:
            rate = min(rate, max_rate) if max_rate else rate
            if pacer is None:
                pace_by_kernel(watch.connection, rate)
            else:
                pacer.rate = rate

        with contextlib.ExitStack() as stack:
            if fair_share is not None:
                stack.enter_context(fair_share.member(self._entry, watch.acknowledged, set_rate))
            yield
        if pacer is None:
            pace_by_kernel(watch.connection, 0)

    async def _open_channel(self, transport: asyncio.Transport, watch: Watch) -> Channel:
        """Sends the headers."""
        if self.method is Method.SENDFILE:
            # With a limit of zero the bytes go to the socket immediately. uvloop would queue them.
            transport.set_write_buffer_limits(high=0)
        writer = await self._response.prepare(self._request)
        assert writer is not None
        await self._flush(transport, writer)
        self.first_byte_at = time.perf_counter()
        return Channel(transport, writer, self._response, watch, self._progress)

    async def _send_part(self, channel: Channel, part: ByteRange) -> None:
        if not part.length:
            return
        sent_before = self._progress.bytes_sent
        try:
            await self._way.send(channel, self._package, part)
        except SendfileUnsupported:
            self._way = self._chunks
            sent = self._progress.bytes_sent - sent_before
            await self._way.send(channel, self._package, ByteRange(part.start + sent, part.length - sent))

    async def _flush(self, transport: asyncio.Transport, writer: AbstractStreamWriter) -> None:
        """Before the kernel sends, the transport must hold nothing that it would send later."""
        if self.method is Method.SENDFILE:
            await writer.drain()
            if transport.is_closing() or transport.get_write_buffer_size():
                raise DeliveryAborted("client disconnected")

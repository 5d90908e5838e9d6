"""Delivery: headers, then bytes, by the kernel where the connection allows and in chunks where it does not.

Knows nothing of jobs. Once the headers are out there is no error page any more: what goes wrong closes the
connection short of the promised length, which every client notices, and nothing else follows on it.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import Request, StreamResponse

from exportd.delivery.chunks import send_by_chunks
from exportd.delivery.outcome import Delivery, DeliveryAborted, PackageDamaged, Progress
from exportd.delivery.sendfile import SendfileUnsupported, send_by_sendfile


@dataclass(frozen=True, slots=True)
class DeliveryOptions:
    """``sendfile``: use it where it is possible; sizes are in bytes."""

    sendfile: bool
    slice_bytes: int
    chunk_size: int


async def deliver(
    request: Request,
    response: StreamResponse,
    descriptor: int,
    parts: Sequence[tuple[int, int]],
    options: DeliveryOptions,
) -> Delivery:
    """Sends ``response``'s headers and, as its body, the ``parts`` (start, length) of an open file.

    Never raises for what a client or a disk does; the connection is aborted unless every byte went out.
    Cancellation (at shutdown) is an outcome too, and the caller's to raise again once it is recorded.
    """
    started = time.monotonic()
    progress = Progress()
    transport = request.transport
    is_kernel = options.sendfile and transport is not None and transport.get_extra_info("sslcontext") is None
    outcome, reason = "completed", None
    try:
        if transport is None:
            raise DeliveryAborted("client disconnected")
        is_kernel = await _send(request, response, transport, descriptor, parts, options, progress, is_kernel)
    except DeliveryAborted as error:
        outcome, reason = "aborted", str(error)
    except PackageDamaged as error:
        outcome, reason = "failed", str(error)
    except asyncio.CancelledError:
        outcome, reason = "aborted", "shutdown"
    if outcome != "completed":
        response.force_close()
        if transport is not None:
            transport.abort()
    return Delivery(
        outcome,
        reason,
        "sendfile" if is_kernel else "chunks",
        progress.bytes_sent,
        time.monotonic() - started,
    )


async def _send(
    request: Request,
    response: StreamResponse,
    transport: asyncio.Transport,
    descriptor: int,
    parts: Sequence[tuple[int, int]],
    options: DeliveryOptions,
    progress: Progress,
    is_kernel: bool,
) -> bool:
    """Returns whether the kernel sent it all. Raises DeliveryAborted and PackageDamaged."""
    try:
        if is_kernel:
            # Header bytes go straight to the socket, not into the transport's buffer (uvloop queues them).
            transport.set_write_buffer_limits(high=0)
        writer = await response.prepare(request)
        assert writer is not None
        if is_kernel:
            await _flush(writer, transport)
    except ConnectionError as error:
        raise DeliveryAborted(str(error) or "client disconnected") from error
    for start, length in parts:
        sent_before = progress.bytes_sent
        if is_kernel and length:
            try:
                await send_by_sendfile(
                    transport, descriptor, start, length, slice_bytes=options.slice_bytes, progress=progress
                )
                continue
            except SendfileUnsupported:
                is_kernel = False
        sent = progress.bytes_sent - sent_before
        await send_by_chunks(
            response,
            writer,
            transport,
            descriptor,
            start + sent,
            length - sent,
            chunk_size=options.chunk_size,
            progress=progress,
        )
    return is_kernel


async def _flush(writer: AbstractStreamWriter, transport: asyncio.Transport) -> None:
    await writer.drain()
    if transport.is_closing() or transport.get_write_buffer_size():
        raise DeliveryAborted("client disconnected")

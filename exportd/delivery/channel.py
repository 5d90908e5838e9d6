"""The connection that one response body is sent on."""

import asyncio
from dataclasses import dataclass

from aiohttp.abc import AbstractStreamWriter
from aiohttp.web import StreamResponse

from exportd.delivery.progress import Progress
from exportd.delivery.watch import Watch


@dataclass(frozen=True, slots=True)
class Channel:
    """``response`` writes through ``writer`` to ``transport``; ``watch`` follows the socket below it."""

    transport: asyncio.Transport
    writer: AbstractStreamWriter
    response: StreamResponse
    watch: Watch
    progress: Progress

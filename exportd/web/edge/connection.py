"""Connections: their number, the time and size of a request's head, and responses to malformed requests."""

import asyncio
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from enum import StrEnum
from typing import Any, cast

import structlog
from aiohttp import HttpVersion10, HttpVersion11, web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from exportd.http.forwarded import parse_address, subscriber
from exportd.limits.limiter import LimitExceeded
from exportd.web.edge.boundary import common_headers, limit_error
from exportd.web.edge.errors import (
    ApiError,
    BadRequest,
    HeadersTooLarge,
    HttpVersionNotSupported,
    InternalError,
    RateLimited,
    error_response,
)
from exportd.web.edge.stall import StallGuard, wait_until_handed_over
from exportd.web.services import SERVICES

log = structlog.get_logger()

_MAX_LINE_BYTES = 8190
_MAX_FIELDS = 100
_MAX_HEAD_BYTES = 65536
_VERSIONS = (HttpVersion11, HttpVersion10)
# An unwanted body is read and discarded for this long, so that its sender sees the response.
_LINGERING_SECONDS = 2.0
_BETWEEN_WARNINGS_SECONDS = 60.0


class Refusal(StrEnum):
    """Why a connection is closed; a label of ``exportd_connections_refused_total``."""

    TOO_MANY = "too_many"
    TOO_MANY_OF_ADDRESS = "too_many_of_address"
    SLOW_HEAD = "slow_head"
    LARGE_HEAD = "large_head"
    MALFORMED = "malformed"


class ConnectionServer(web.Server):
    """Makes the connections of an application that has started, at most ``max_connections`` in this process.

    ``made`` is aiohttp's own server for the application.
    """

    def __init__(self, app: web.Application, made: web.Server, max_connections: int) -> None:
        self.services = app[SERVICES]
        self.settings = self.services.settings
        super().__init__(
            made.request_handler,
            request_factory=made.request_factory,
            access_log=None,
            keepalive_timeout=self.settings.server.keepalive_timeout_seconds,
            lingering_time=_LINGERING_SECONDS,
            max_line_size=_MAX_LINE_BYTES,
            max_field_size=_MAX_LINE_BYTES,
            max_headers=_MAX_FIELDS,
            # Bodies are discarded, so they need no decompression.
            auto_decompress=False,
        )
        self._max_connections = max_connections
        self._by_address: Counter[str] = Counter()
        self._warned_at = float("-inf")

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    def admit(self, address: str) -> Refusal | None:
        """Counts a connection of the address. Returns why it must be closed, or None if there is room."""
        if len(self._connections) >= self._max_connections:
            return Refusal.TOO_MANY
        allowed, who = self.settings.limits.connections_per_address, subscriber(address)
        if allowed and self._by_address[who] >= allowed and not self.is_proxy(address):
            return Refusal.TOO_MANY_OF_ADDRESS
        self._by_address[who] += 1
        return None

    def left(self, address: str) -> None:
        """Ends what ``admit`` counted."""
        who = subscriber(address)
        self._by_address[who] -= 1
        if not self._by_address[who]:
            del self._by_address[who]

    def is_proxy(self, address: str) -> bool:
        """Whether the address is a trusted proxy's."""
        parsed = parse_address(address)
        return parsed is not None and any(parsed in network for network in self.services.trusted_proxies)

    def refused(self, reason: Refusal) -> None:
        """Counts a connection that the server closed."""
        self.services.metrics.connection_refused(reason)
        if reason is Refusal.TOO_MANY and time.monotonic() - self._warned_at > _BETWEEN_WARNINGS_SECONDS:
            self._warned_at = time.monotonic()
            log.warning("connections_exhausted", limit=self._max_connections)


class Connection(RequestHandler):
    """aiohttp's connection, with limits on the time and size of a request's head. It sends one response to
    each request, and ends when its client acknowledges nothing."""

    __slots__ = ("_address", "_head_bytes", "_head_timer", "_server", "_stall_guard")

    def __init__(self, server: ConnectionServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._address: str | None = None
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._stall_guard: StallGuard | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        address = str((transport.get_extra_info("peername") or [""])[0])
        if reason := self._server.admit(address):
            cast(asyncio.Transport, transport).abort()
            self._server.refused(reason)
            return
        self._address = address
        super().connection_made(transport)
        seconds = self._server.settings.download.stall_timeout_seconds
        self._stall_guard = StallGuard(cast(asyncio.Transport, transport), seconds)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._head_came()
        if self._stall_guard is not None:
            self._stall_guard.close()
        if self._address is not None:
            self._server.left(self._address)
            self._address = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._request_in_progress:
            self._head_came()
        elif self._waiter is not None and not self._waiter.done():
            self._expect_head()
            self._head_bytes += len(data)
            if self._head_bytes > _MAX_HEAD_BYTES:
                self._refuse(Refusal.LARGE_HEAD)

    def _expect_head(self) -> None:
        if self._head_timer is None:
            seconds = self._server.settings.server.head_timeout_seconds
            self._head_timer = self._loop.call_later(seconds, self._refuse, Refusal.SLOW_HEAD)

    def _head_came(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, reason: Refusal) -> None:
        self._head_came()
        if not self._force_close:
            self._server.refused(reason)
            self.force_close()

    async def _handle_request(
        self,
        request: web.BaseRequest,
        start_time: float | None,
        request_handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
    ) -> tuple[web.StreamResponse, bool]:
        transport, guard = self.transport, self._stall_guard
        if transport is None or guard is None:
            raise ConnectionResetError("the client has left")
        if request._version not in _VERSIONS:
            # aiohttp 3.14 caches the version on first use, and writes it into the response.
            request._version = HttpVersion11
            request_handler = self._refuse_version
        with guard:
            answered = await super()._handle_request(request, start_time, request_handler)
            # Otherwise a client that sends many requests and reads no response fills the memory.
            await wait_until_handed_over(transport)
            return answered

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        # The handler, a middleware or a signal failed after the headers were sent. A client would read a
        # second response as the rest of the first, and a proxy as the response to the next request, maybe of
        # another user.
        if request.writer.output_size > 0 and not (isinstance(resp, web.StreamResponse) and resp.prepared):
            self._abort()
            return resp, True
        return await super().finish_response(request, resp, start_time)

    def _abort(self) -> None:
        """Closes the connection immediately and drops unsent bytes."""
        self._force_close = True
        if self.transport is not None:
            self.transport.abort()
        log.error("response_aborted")

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The response to a malformed request, in the usual form. The request is not logged, because it may
        hold a token."""
        if request.writer.output_size > 0:
            self._abort()
            raise ConnectionError("an answer is under way already")
        error: ApiError
        if status == 500:
            log.error("request_failed", exc_info=exc)
            error = InternalError()
        else:
            error = self._malformed(request.remote or "", exc)
        return _last_answer(error)

    async def _refuse_version(self, request: web.BaseRequest) -> web.StreamResponse:
        error = self._malformed(request.remote or "", None)
        return _last_answer(error if isinstance(error, RateLimited) else HttpVersionNotSupported())

    def _malformed(self, address: str, exc: BaseException | None) -> ApiError:
        """Counts a malformed request, also against the limit of its address."""
        self._server.refused(Refusal.MALFORMED)
        limiter = self._server.services.limiter
        if limiter.may_log("malformed", address):
            log.info("request_malformed", reason=type(exc).__name__, client=address)
        try:
            # A proxy is not responsible for its clients.
            if not self._server.is_proxy(address):
                limiter.check_address(address)
        except LimitExceeded as error:
            return limit_error(self._server.services, error)
        if _is_too_large(exc):
            return HeadersTooLarge()
        return HttpVersionNotSupported() if "Invalid HTTP version" in str(exc) else BadRequest()


def _last_answer(error: ApiError) -> web.Response:
    """The response to a request that does not reach the middleware. The connection ends with it."""
    request_id = secrets.token_hex(16)
    response = error_response(error, request_id)
    response.headers.update(common_headers(request_id))
    response.force_close()
    return response


def _is_too_large(exc: BaseException | None) -> bool:
    return isinstance(exc, LineTooLong) or "too many headers" in str(exc).lower()

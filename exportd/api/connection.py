"""Connections before they are requests: what may come in, how soon, and the answer to what is no HTTP."""

import asyncio
import secrets
import time
from dataclasses import dataclass
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import LineTooLong
from aiohttp.web_protocol import RequestHandler

from exportd.api.errors import ApiError, BadRequest, HeadersTooLarge, InternalError, error_response
from exportd.api.middleware import METRICS, common_headers

log = structlog.get_logger()

_LONGEST_LINE = 8190
_MOST_FIELDS = 100
_LARGEST_HEAD = 65536
# A body that nobody asked for is read and thrown away for this long, so that its sender sees the answer.
_LINGERING_SECONDS = 2.0
_BETWEEN_WARNINGS_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """``connections`` is for one process."""

    connections: int
    head_timeout_seconds: float
    keepalive_timeout_seconds: float


class ConnectionServer(web.Server):
    """Makes an application's connections. ``made`` is aiohttp's own server for it, after its start-up."""

    def __init__(self, app: web.Application, made: web.Server, limits: ConnectionLimits) -> None:
        super().__init__(
            made.request_handler,
            request_factory=made.request_factory,
            access_log=None,
            keepalive_timeout=limits.keepalive_timeout_seconds,
            lingering_time=_LINGERING_SECONDS,
            max_line_size=_LONGEST_LINE,
            max_field_size=_LONGEST_LINE,
            max_headers=_MOST_FIELDS,
        )
        self.limits = limits
        self._metrics = app[METRICS]
        self._warned_at = float("-inf")

    def __call__(self) -> RequestHandler:
        return Connection(self, loop=self._loop, **self._kwargs)

    @property
    def is_full(self) -> bool:
        return len(self._connections) >= self.limits.connections

    def refused(self, reason: str) -> None:
        """Notes a connection that was closed for what it did, or did not do."""
        self._metrics.connection_refused(reason)
        if reason == "too_many" and time.monotonic() - self._warned_at > _BETWEEN_WARNINGS_SECONDS:
            self._warned_at = time.monotonic()
            log.warning("connections_exhausted", limit=self.limits.connections)


class Connection(RequestHandler):
    """aiohttp's connection, with a limit on the time and the size of a request's head."""

    __slots__ = ("_head_bytes", "_head_timer", "_server")

    def __init__(self, server: ConnectionServer, **options: Any) -> None:
        super().__init__(server, **options)
        self._server = server
        self._head_timer: asyncio.TimerHandle | None = None
        self._head_bytes = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        if self._server.is_full:
            cast(asyncio.Transport, transport).abort()
            self._server.refused("too_many")
            return
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: BaseException | None) -> None:
        self._head_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._messages or self._request_in_progress:
            self._head_came()
        elif self._waiter is not None and not self._waiter.done():
            self._expect_head()
            self._head_bytes += len(data)
            if self._head_bytes > _LARGEST_HEAD:
                self._refuse("large_head")

    def _expect_head(self) -> None:
        if self._head_timer is None:
            seconds = self._server.limits.head_timeout_seconds
            self._head_timer = self._loop.call_later(seconds, self._refuse, "slow_head")

    def _head_came(self) -> None:
        self._head_bytes = 0
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _refuse(self, reason: str) -> None:
        self._head_came()
        if not self._force_close:
            self._server.refused(reason)
            self.force_close()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what is no request, in our envelope. What came is not logged: it may hold a token."""
        error: ApiError
        if status == 500:
            log.error("request_failed", exc_info=exc)
            error = InternalError()
        else:
            self._server.refused("malformed")
            log.info("request_malformed", reason=type(exc).__name__, client=request.remote)
            error = HeadersTooLarge() if _is_too_large(exc) else BadRequest()
        if request.writer.output_size > 0:
            raise ConnectionError("an answer is under way already")
        request_id = secrets.token_hex(16)
        response = error_response(error, request_id)
        response.headers.update(common_headers(request_id))
        response.force_close()
        return response


def _is_too_large(exc: BaseException | None) -> bool:
    return isinstance(exc, LineTooLong) or "too many headers" in str(exc).lower()

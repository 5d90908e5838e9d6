"""Limits against abuse, as answers: 429 with when to try again."""

import contextlib
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import StrEnum
from uuid import UUID

import structlog
from aiohttp import web

from exportd.db.pool import Database
from exportd.domain.delivery import DownloadEvent
from exportd.domain.principal import Principal
from exportd.http.forwarded import (
    Network,
    client_address,
    forwarded_addresses,
    parse_address,
    subscriber,
)
from exportd.limits.board import Board, Entry
from exportd.limits.quota import reserve_within_quota, seconds_until_within_quota
from exportd.limits.rates import Rates
from exportd.telemetry.metrics import Metrics
from exportd.web.edge.errors import ApiError, QuotaExceeded, RateLimited

log = structlog.get_logger()

# Nobody knows when a download ends, or an export.
_DOWNLOAD_RETRY_SECONDS = 10
_RE_EXPORT_RETRY_SECONDS = 60
# Each delivery is a row, however small; no client downloads a package in pieces of this size.
_SMALL_RANGE_BYTES = 1024
_SMALL_RANGES_PER_MINUTE = 60

CLIENT = web.RequestKey("client", str)


class Limit(StrEnum):
    """What a request may meet; a label of ``exportd_limits_hit_total``. All but the last two are keys of
    ``[limits]``."""

    REQUESTS_PER_MINUTE_PER_ADDRESS = "requests_per_minute_per_address"
    REQUESTS_PER_MINUTE_PER_USER = "requests_per_minute_per_user"
    DOWNLOADS_PER_USER = "downloads_per_user"
    DOWNLOADS_TOTAL = "downloads_total"
    CONNECTIONS_PER_DOWNLOAD = "connections_per_download"
    EVENT_STREAMS_PER_USER = "event_streams_per_user"
    BYTES_PER_USER_PER_DAY = "bytes_per_user_per_day"
    RE_EXPORTS_PER_USER = "re_exports_per_user"
    RE_EXPORT_AFTER_FAILURE = "re_export_after_failure"
    SMALL_RANGES_PER_MINUTE = "small_ranges_per_minute"


@dataclass(frozen=True, slots=True)
class Limits:
    """What is allowed; 0: anything."""

    requests_per_minute_per_address: int
    requests_per_minute_per_user: int
    downloads_per_user: int
    downloads_total: int
    connections_per_download: int
    event_streams_per_user: int
    bytes_per_user_per_day: int
    re_exports_per_user: int
    admins_exempt: bool


class Limiter:
    """Holds the limits against what the processes of this daemon, and the database, have counted."""

    def __init__(self, limits: Limits, rates: Rates, board: Board, metrics: Metrics) -> None:
        self._limits = limits
        self._rates = rates
        self._board = board
        self._metrics = metrics

    def check_address(self, client: str) -> None:
        """Counts a request from the client's address. Raises RateLimited."""
        limit = self._limits.requests_per_minute_per_address
        who = f"address {subscriber(client)}"
        if limit and (wait := self._rates.take(who, limit)):
            raise self._refuse(RateLimited, Limit.REQUESTS_PER_MINUTE_PER_ADDRESS, who, wait)

    def check_user(self, principal: Principal) -> None:
        """Counts a request of the principal. Raises RateLimited."""
        limit = 0 if self._is_exempt(principal) else self._limits.requests_per_minute_per_user
        who = f"user {principal.user_id}"
        if limit and (wait := self._rates.take(who, limit)):
            raise self._refuse(RateLimited, Limit.REQUESTS_PER_MINUTE_PER_USER, who, wait)

    async def check_quota(self, database: Database, principal: Principal) -> None:
        """Raises QuotaExceeded where the principal's last day has no byte left."""
        if limit := self._quota_of(principal):
            wait = await seconds_until_within_quota(database, principal.user_id, limit)
            self._refuse_over_quota(principal, wait)

    async def reserve(self, database: Database, principal: Principal, event: DownloadEvent) -> None:
        """As ``check_quota``; what the delivery asks for counts until it ends. One that has begun goes on to
        its end."""
        if limit := self._quota_of(principal):
            self._refuse_over_quota(principal, await reserve_within_quota(database, event, limit))

    def _quota_of(self, principal: Principal) -> int:
        return 0 if self._is_exempt(principal) else self._limits.bytes_per_user_per_day

    def _refuse_over_quota(self, principal: Principal, wait: int | None) -> None:
        if wait is not None:
            raise self._refuse(QuotaExceeded, Limit.BYTES_PER_USER_PER_DAY, f"user {principal.user_id}", wait)

    @contextlib.contextmanager
    def delivery(self, principal: Principal, job_id: UUID) -> Iterator[Entry]:
        """Counts a delivery while it runs; several of one job to one principal are one download.

        It is seen before it is judged, so of two that take the last place at the same moment none or one gets
        it, and never both. Raises RateLimited.
        """
        with self._board.entry(principal.user_id, str(job_id)) as entry:
            limits = self._limits
            if not self._is_exempt(principal) and (
                limits.downloads_per_user or limits.downloads_total or limits.connections_per_download
            ):
                found = self._board.count_downloads(entry)
                self._check_number(principal, Limit.DOWNLOADS_PER_USER, found.of_user)
                self._check_number(principal, Limit.DOWNLOADS_TOTAL, found.in_all)
                self._check_number(principal, Limit.CONNECTIONS_PER_DOWNLOAD, found.connections)
            yield entry

    def check_range(self, principal: Principal, job_id: UUID, size_bytes: int) -> None:
        """Counts a request for part of a package, where the part is small. Raises RateLimited."""
        if size_bytes >= _SMALL_RANGE_BYTES or self._is_exempt(principal):
            return
        if wait := self._rates.take(f"small ranges {job_id} {principal.user_id}", _SMALL_RANGES_PER_MINUTE):
            who = f"user {principal.user_id}"
            raise self._refuse(RateLimited, Limit.SMALL_RANGES_PER_MINUTE, who, wait)

    def check_streams(self, principal: Principal, number: int) -> None:
        """Raises RateLimited where so many event streams are more than a user may have open."""
        if not self._is_exempt(principal):
            self._check_number(principal, Limit.EVENT_STREAMS_PER_USER, number)

    def check_re_export(self, principal: Principal, *, wait_seconds: float, waiting: int) -> None:
        """Raises RateLimited where an export is to be made again too soon after failures, or is one too many
        of the user's that wait or are under way."""
        if self._is_exempt(principal):
            return
        if wait_seconds > 0:
            who = f"user {principal.user_id}"
            raise self._refuse(RateLimited, Limit.RE_EXPORT_AFTER_FAILURE, who, wait_seconds)
        self._check_number(principal, Limit.RE_EXPORTS_PER_USER, waiting + 1, _RE_EXPORT_RETRY_SECONDS)

    def _check_number(
        self, principal: Principal, limit: Limit, number: int, retry_seconds: float = _DOWNLOAD_RETRY_SECONDS
    ) -> None:
        most: int = getattr(self._limits, limit)
        if most and number > most:
            raise self._refuse(RateLimited, limit, f"user {principal.user_id}", retry_seconds)

    def may_log(self, what: str, who: str) -> bool:
        """Whether to write one more line about it: one a minute for each who, so that whoever hammers at
        something does not fill the log with it."""
        return not self._rates.take(f"log {what} {who}", 1)

    def _is_exempt(self, principal: Principal) -> bool:
        # An admin's link may be in anybody's hands.
        return principal.is_admin and not principal.by_link and self._limits.admins_exempt

    def _refuse(self, kind: type[ApiError], limit: Limit, who: str, seconds: float) -> ApiError:
        self._metrics.limit_hit(limit)
        if self.may_log(limit, who):
            log.warning("limit_hit", limit=limit, who=who)
        wait = max(1, math.ceil(seconds))
        return kind(extra={"limit": limit, "retryAfterSeconds": wait}, headers={"Retry-After": str(wait)})


LIMITER = web.AppKey("limiter", Limiter)


@dataclass(frozen=True, slots=True)
class Proxies:
    """Who may say for whom it asks, and in which field."""

    trusted: Collection[Network]
    field: str


PROXIES = web.AppKey("proxies", Proxies)


def find_client(request: web.Request) -> str:
    """The client's address, as far as trusted proxies tell it."""
    peer, proxies = request.remote or "", request.app[PROXIES]
    if not proxies.trusted:
        _warn_of_proxy(request, peer, proxies.field)
        return peer
    fields = request.headers.getall(proxies.field, [])
    return client_address(peer, forwarded_addresses(proxies.field, fields), proxies.trusted)


def _warn_of_proxy(request: web.Request, peer: str, field: str) -> None:
    """All who come through a proxy that is not trusted meet the limits of one address together."""
    address = parse_address(peer)
    if (
        field in request.headers
        and address is not None
        and address.is_private
        and request.app[LIMITER].may_log("proxy", peer)
    ):
        log.warning("proxy_not_trusted", peer=peer, advice="add it to [server] trusted_proxies")

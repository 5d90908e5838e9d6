"""Limits against abuse: counts requests and downloads, and raises LimitExceeded."""

import contextlib
from collections.abc import Iterator
from enum import StrEnum
from uuid import UUID

from exportd.db.pool import Database
from exportd.domain.delivery import DownloadEvent
from exportd.domain.principal import Principal
from exportd.http.forwarded import subscriber
from exportd.limits.board import Board, Entry
from exportd.limits.quota import reserve_within_quota, seconds_until_within_quota
from exportd.limits.rates import Rates
from exportd.settings import LimitSettings

# A constant, because the end of a download or of an export cannot be foreseen.
_DOWNLOAD_RETRY_SECONDS = 10.0
_RE_EXPORT_RETRY_SECONDS = 60.0
# Each delivery is a row, however small. No client downloads a package in pieces of this size.
_SMALL_RANGE_BYTES = 1024
_SMALL_RANGES_PER_MINUTE = 60


class Limit(StrEnum):
    """The limits on requests; a label of ``exportd_limits_hit_total``. All but the last two are keys of
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


class LimitExceeded(Exception):
    """A request over a limit. ``subject`` is the user or address that the limit is for."""

    def __init__(self, limit: Limit, subject: str, retry_after_seconds: float) -> None:
        super().__init__(f"{limit} of {subject}")
        self.limit = limit
        self.subject = subject
        self.retry_after_seconds = retry_after_seconds


class Limiter:
    """Compares ``[limits]`` with what the processes of this daemon, and the database, have counted."""

    def __init__(self, settings: LimitSettings, rates: Rates, board: Board) -> None:
        self._settings = settings
        self._rates = rates
        self._board = board

    def check_address(self, client: str) -> None:
        """Counts a request from the client's address. Raises LimitExceeded."""
        limit = self._settings.requests_per_minute_per_address
        self._take(Limit.REQUESTS_PER_MINUTE_PER_ADDRESS, f"address {subscriber(client)}", limit)

    def check_user(self, principal: Principal) -> None:
        """Counts a request of the principal. Raises LimitExceeded."""
        limit = 0 if self._is_exempt(principal) else self._settings.requests_per_minute_per_user
        self._take(Limit.REQUESTS_PER_MINUTE_PER_USER, _user(principal), limit)

    def check_range(self, principal: Principal, job_id: UUID, size_bytes: int) -> None:
        """Counts a request for a range of a package, if the range is small. Raises LimitExceeded."""
        if size_bytes < _SMALL_RANGE_BYTES and not self._is_exempt(principal):
            name = f"small ranges {job_id} {principal.user_id}"
            if wait_seconds := self._rates.take(name, _SMALL_RANGES_PER_MINUTE):
                raise LimitExceeded(Limit.SMALL_RANGES_PER_MINUTE, _user(principal), wait_seconds)

    async def check_quota(self, database: Database, principal: Principal) -> None:
        """Raises LimitExceeded if the principal has no bytes left for today."""
        if limit := self._quota_of(principal):
            wait_seconds = await seconds_until_within_quota(database, principal.user_id, limit)
            self._check_quota(principal, wait_seconds)

    async def reserve(self, database: Database, principal: Principal, event: DownloadEvent) -> None:
        """Like ``check_quota``. The bytes that the delivery requests count until it ends. A delivery that has
        begun runs to its end."""
        if limit := self._quota_of(principal):
            self._check_quota(principal, await reserve_within_quota(database, event, limit))

    @contextlib.contextmanager
    def delivery(self, principal: Principal, job_id: UUID) -> Iterator[Entry]:
        """Counts a delivery while the block runs. Deliveries of one job to one principal are one download.

        The delivery is entered before it is counted: of two that take the last place at the same moment, one
        or none gets it, never both. Raises LimitExceeded.
        """
        with self._board.entry(principal.user_id, str(job_id)) as entry:
            settings = self._settings
            if not self._is_exempt(principal) and (
                settings.downloads_per_user or settings.downloads_total or settings.connections_per_download
            ):
                found = self._board.count_downloads(entry)
                self._check_number(principal, Limit.DOWNLOADS_PER_USER, found.of_user)
                self._check_number(principal, Limit.DOWNLOADS_TOTAL, found.in_all)
                self._check_number(principal, Limit.CONNECTIONS_PER_DOWNLOAD, found.connections)
            yield entry

    def check_streams(self, principal: Principal, number: int) -> None:
        """Raises LimitExceeded if the user may not have that number of event streams."""
        if not self._is_exempt(principal):
            self._check_number(principal, Limit.EVENT_STREAMS_PER_USER, number)

    def check_re_export(self, principal: Principal, *, wait_seconds: float, waiting: int) -> None:
        """Raises LimitExceeded if the principal must still wait after failures, or if so many re-exports of
        the
        user already wait or run."""
        if self._is_exempt(principal):
            return
        if wait_seconds > 0:
            raise LimitExceeded(Limit.RE_EXPORT_AFTER_FAILURE, _user(principal), wait_seconds)
        self._check_number(principal, Limit.RE_EXPORTS_PER_USER, waiting + 1, _RE_EXPORT_RETRY_SECONDS)

    def may_log(self, topic: str, subject: str) -> bool:
        """Whether to log another line about a subject: one a minute, so that repeated requests do not fill
        the
        log."""
        return not self._rates.take(f"log {topic} {subject}", 1)

    def _take(self, limit: Limit, subject: str, per_minute: int) -> None:
        if per_minute and (wait_seconds := self._rates.take(subject, per_minute)):
            raise LimitExceeded(limit, subject, wait_seconds)

    def _quota_of(self, principal: Principal) -> int:
        return 0 if self._is_exempt(principal) else self._settings.bytes_per_user_per_day

    def _check_quota(self, principal: Principal, wait_seconds: int | None) -> None:
        if wait_seconds is not None:
            raise LimitExceeded(Limit.BYTES_PER_USER_PER_DAY, _user(principal), wait_seconds)

    def _check_number(
        self, principal: Principal, limit: Limit, number: int, retry_seconds: float = _DOWNLOAD_RETRY_SECONDS
    ) -> None:
        allowed: int = getattr(self._settings, limit)
        if allowed and number > allowed:
            raise LimitExceeded(limit, _user(principal), retry_seconds)

    def _is_exempt(self, principal: Principal) -> bool:
        # Anybody may have got an admin's link.
        return principal.is_admin and not principal.by_link and self._settings.admins_exempt


def _user(principal: Principal) -> str:
    return f"user {principal.user_id}"

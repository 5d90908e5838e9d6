"""One delivery, from its first byte to its record in the database, its metrics and its log line."""

import asyncio
import time
from collections.abc import Sequence

import structlog
from aiohttp import web

from exportd.delivery.progress import Progress
from exportd.domain.delivery import Delivery, DownloadEvent, Failure, Outcome, first_bytes, new_event_id
from exportd.domain.job import Job
from exportd.domain.principal import Principal
from exportd.domain.sizes import size_range
from exportd.http.body import Segment
from exportd.http.plan import Plan
from exportd.limits.board import Entry
from exportd.storage.files import OpenPackage
from exportd.web.edge.context import CLIENT, RECEIVED_AT, REQUEST_ID
from exportd.web.services import SERVICES

log = structlog.get_logger()

# Why downloads fail, as metrics report it: before their delivery, during it, and by a defect of exportd.
FAILURE_REASONS = ("missing", "unusable", "suspect", *Failure, "defect")

_MAX_USER_AGENT_LENGTH = 256


class RecordedDelivery:
    """Delivers a response and records the delivery as an event."""

    def __init__(
        self, request: web.Request, principal: Principal, job: Job, package: OpenPackage, plan: Plan
    ) -> None:
        self._services = request.app[SERVICES]
        self._request = request
        self._principal = principal
        self._job = job
        self._package = package
        self._plan = plan
        self._progress = Progress()
        self._event_id = new_event_id(job.read_at)
        self._started = time.monotonic()

    async def send(self, response: web.StreamResponse, segments: Sequence[Segment]) -> web.StreamResponse:
        """Sends the response and waits for its record. Raises LimitExceeded before the first byte."""
        limiter, plan = self._services.limiter, self._plan
        if plan.status == 206:
            limiter.check_range(self._principal, self._job.job_id, plan.body_length)
        with limiter.delivery(self._principal, self._job.job_id) as entry:
            await limiter.reserve(self._services.database, self._principal, self._describe(None))
            log.debug("download_started", package_size_bytes=self._package.size_bytes, status=plan.status)
            ledger, progress = self._services.ledger, self._progress
            with ledger.checkpoints(lambda: self._describe(None), lambda: progress.bytes_sent):
                delivery = await self._deliver(response, segments, entry)
                event = self._describe(delivery)
                recording = ledger.record(event)
            try:
                await _wait_for_record(recording, event)
                if event.outcome is Outcome.CHANGED:
                    self._services.suspects.add(event.job_id)
            finally:
                self._log_end(delivery, event)
            if delivery.reason == "shutdown":
                raise asyncio.CancelledError
            return response

    async def _deliver(
        self, response: web.StreamResponse, segments: Sequence[Segment], entry: Entry
    ) -> Delivery:
        metrics = self._services.metrics
        metrics.download_started()
        try:
            delivery = await self._services.sender.deliver(
                self._request, response, self._package, segments, self._progress, entry
            )
        except BaseException:
            metrics.download_failed("defect")
            raise
        if delivery.failure is None:
            metrics.download_completed(
                size_range(delivery.bytes_sent), delivery.bytes_sent, delivery.duration_seconds
            )
        else:
            metrics.download_failed(delivery.failure)
        return delivery

    def _describe(self, delivery: Delivery | None) -> DownloadEvent:
        """The event of the delivery as it is now; None: it is still running."""
        outcome = delivery.outcome if delivery else Outcome.RUNNING
        progress = self._progress
        requested = tuple((part.start, part.stop) for part in self._plan.parts)
        # If the package changed, no byte of it can be trusted.
        trusted = 0 if outcome is Outcome.CHANGED else progress.bytes_acknowledged
        return DownloadEvent(
            event_id=self._event_id,
            job_id=self._job.job_id,
            user_id=self._principal.user_id,
            # The database's clock, which all nodes share.
            started_at=self._job.read_at,
            duration_seconds=time.monotonic() - self._started,
            outcome=outcome,
            http_status=self._plan.status,
            requested=requested,
            received=first_bytes(requested, trusted),
            bytes_sent=progress.bytes_sent,
            package_size_bytes=self._package.size_bytes,
            request_id=self._request[REQUEST_ID],
            bytes_acknowledged=progress.bytes_acknowledged,
            reason=delivery.reason if delivery else None,
            method=delivery.method if delivery else None,
            daemon_id=self._services.ledger.daemon_id,
            package_sha256=self._job.package_sha256 or "",
        )

    def _log_end(self, delivery: Delivery, event: DownloadEvent) -> None:
        request, plan = self._request, self._plan
        first_byte = delivery.first_byte_at and round(delivery.first_byte_at - request[RECEIVED_AT], 6)
        ranges = ",".join(f"{part.start}-{part.stop - 1}" for part in plan.parts)
        fields = {
            "outcome": event.outcome,
            "status": event.http_status,
            "package_size_bytes": event.package_size_bytes,
            "range": ranges if plan.status == 206 else None,
            "bytes_requested": plan.body_length,
            "bytes_sent": event.bytes_sent,
            "bytes_acknowledged": event.bytes_acknowledged,
            "duration_seconds": round(delivery.duration_seconds, 6),
            "first_byte_seconds": first_byte,
            "bytes_per_second": round(event.bytes_acknowledged / max(delivery.duration_seconds, 1e-6)),
            "method": delivery.method,
            "client": request[CLIENT],
            "user_agent": request.headers.get("User-Agent", "")[:_MAX_USER_AGENT_LENGTH],
        }
        match event.outcome:
            case Outcome.COMPLETED:
                log.info("download_completed", **fields)
            case Outcome.ABORTED:
                log.info("download_aborted", reason=event.reason, **fields)
            case _:
                log.error("download_failed", reason=event.reason, **fields)


async def _wait_for_record(recording: asyncio.Future[None], event: DownloadEvent) -> None:
    """Waits for the record before the handler ends: the connection carries no other response, and is not
    closed, until the count is durable. A shutdown may cancel the handler, but not the record.

    Raises only cancellation: the response is out, and an error page would be a second one.
    """
    cancelled = False
    while not recording.done():
        try:
            await asyncio.wait([recording])
        except asyncio.CancelledError:
            cancelled = True
    if error := recording.exception():
        log.error("download_not_recorded", exc_info=error, event_id=str(event.event_id))
    elif event.outcome is Outcome.CHANGED:
        log.error("package_suspect")
    if cancelled:
        raise asyncio.CancelledError

"""The list of jobs, in pages."""

import base64
import binascii
from datetime import UTC, datetime
from uuid import UUID

from aiohttp import web

from exportd.db.job_details import JobDetails, list_jobs
from exportd.domain.job import JobStatus
from exportd.web.edge.access import authenticate
from exportd.web.edge.errors import InvalidParameter
from exportd.web.jobs.document import describe_job, job_response
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES

_DEFAULT_PAGE_SIZE = 20
_MAX_PAGE_SIZE = 100


@documented(operations.LIST_JOBS)
async def list_export_jobs(request: web.Request) -> web.Response:
    """Returns the caller's jobs, newest first; for an admin, those of every user."""
    principal = await authenticate(request)
    limit = _limit(request.query.get("limit"))
    found = await list_jobs(
        request.app[SERVICES].database,
        user_id=None if principal.is_admin else principal.user_id,
        status=_status(request.query.get("status")),
        before=_parse_cursor(request.query.get("cursor")),
        # One job more shows whether there is another page.
        limit=limit + 1,
    )
    page = found[:limit]
    cursor = _cursor(page[-1]) if len(found) > limit else None
    return job_response({"jobs": [describe_job(details) for details in page], "nextCursor": cursor})


def _limit(text: str | None) -> int:
    if text is None:
        return _DEFAULT_PAGE_SIZE
    if not (text.isascii() and text.isdigit() and len(text) < 4 and 1 <= int(text) <= _MAX_PAGE_SIZE):
        raise InvalidParameter(extra={"parameter": "limit"})
    return int(text)


def _status(text: str | None) -> str | None:
    if text is not None and text not in list(JobStatus):
        raise InvalidParameter(extra={"parameter": "status"})
    return text


def _cursor(details: JobDetails) -> str:
    assert details.created_at is not None
    text = f"{details.created_at.isoformat()} {details.job.job_id}"
    return base64.urlsafe_b64encode(text.encode()).rstrip(b"=").decode()


def _parse_cursor(text: str | None) -> tuple[datetime, UUID] | None:
    if text is None:
        return None
    try:
        decoded = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True).decode()
        created_at, _, job_id = decoded.partition(" ")
        before = datetime.fromisoformat(created_at)
        if before.tzinfo is None:
            raise ValueError("no zone")
        # PostgreSQL accepts fewer offsets than Python: none from +16:00 on.
        return before.astimezone(UTC), UUID(job_id)
    except (ValueError, OverflowError, binascii.Error) as error:
        raise InvalidParameter(extra={"parameter": "cursor"}) from error

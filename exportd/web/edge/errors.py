"""Every error a client can meet: one class a row, with its stable code and status.

The docstring is the public sentence. An error never shows a path, a query or a traceback.
"""

import html
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import ClassVar

import orjson
from aiohttp import web

# Without styles and scripts: nothing may be loaded, and the browser's own look is good.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
</head>
<body>
<main>
<h1>{title}</h1>
<p>{message}.</p>
<p><small>Request {request_id}</small></p>
</main>
</body>
</html>
"""


class ApiError(Exception):
    """Base of the table. ``extra`` joins the body, ``headers`` the response.

    ``example_extra`` and ``example_headers`` show what a row is always raised with, for the documentation.
    """

    status: HTTPStatus
    code: str
    example_extra: ClassVar[Mapping[str, object]] = {}
    example_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, *, extra: dict[str, object] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        message = " ".join((type(self).__doc__ or "").split())
        super().__init__(message)
        self.message = message
        self.extra = extra or {}
        self.headers = headers or {}


class InvalidJobId(ApiError):
    """The job id is not a UUID"""

    status, code = HTTPStatus.BAD_REQUEST, "INVALID_JOB_ID"


class InvalidParameter(ApiError):
    """A parameter of the query is not valid"""

    status, code = HTTPStatus.BAD_REQUEST, "INVALID_PARAMETER"
    example_extra: ClassVar = {"parameter": "limit"}


class Unauthenticated(ApiError):
    """A valid bearer token is needed"""

    status, code = HTTPStatus.UNAUTHORIZED, "UNAUTHENTICATED"
    example_headers: ClassVar = {"WWW-Authenticate": 'Bearer realm="exportd"'}


class LinkExpired(ApiError):
    """The download link has expired, was revoked, or never was one; ask for a new one"""

    status, code = HTTPStatus.GONE, "LINK_EXPIRED"


class JobNotFound(ApiError):
    """There is no such export job"""

    status, code = HTTPStatus.NOT_FOUND, "JOB_NOT_FOUND"


class DownloadUnauthorized(ApiError):
    """Only job creator or admin can download this package"""

    status, code = HTTPStatus.FORBIDDEN, "DOWNLOAD_UNAUTHORIZED"


class PackageNotReady(ApiError):
    """The export is not completed yet"""

    status, code = HTTPStatus.NOT_FOUND, "PACKAGE_NOT_READY"
    example_extra: ClassVar = {"jobStatus": "processing"}


class PackageExpired(ApiError):
    """The package has expired or was deleted"""

    status, code = HTTPStatus.GONE, "PACKAGE_EXPIRED"
    example_extra: ClassVar = {"expiresAt": "2026-12-23T23:30:31+00:00"}


class FileNotFound(ApiError):
    """The package's file is not there"""

    status, code = HTTPStatus.NOT_FOUND, "FILE_NOT_FOUND"


class PackageAvailable(ApiError):
    """The package is still there"""

    status, code = HTTPStatus.CONFLICT, "PACKAGE_AVAILABLE"
    example_extra: ClassVar = {"jobId": "25395ef1-daf8-4ea1-a532-c61e57b1134f"}


class ExportInProgress(ApiError):
    """The export is under way"""

    status, code = HTTPStatus.CONFLICT, "EXPORT_IN_PROGRESS"
    example_extra: ClassVar = {"jobId": "25395ef1-daf8-4ea1-a532-c61e57b1134f"}


class ReExportUnsupported(ApiError):
    """Exports cannot be asked for again here"""

    status, code = HTTPStatus.NOT_IMPLEMENTED, "RE_EXPORT_UNSUPPORTED"


class PreconditionFailed(ApiError):
    """A precondition of the request does not hold"""

    status, code = HTTPStatus.PRECONDITION_FAILED, "PRECONDITION_FAILED"


class RangeNotSatisfiable(ApiError):
    """No byte of the range lies within the package"""

    status, code = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "RANGE_NOT_SATISFIABLE"
    example_headers: ClassVar = {"Content-Range": "bytes */300025450"}


class RateLimited(ApiError):
    """Too many requests or downloads; try again later"""

    status, code = HTTPStatus.TOO_MANY_REQUESTS, "RATE_LIMITED"
    example_extra: ClassVar = {"limit": "requests_per_minute_per_user", "retryAfterSeconds": 7}
    example_headers: ClassVar = {"Retry-After": "7"}


class QuotaExceeded(ApiError):
    """No more can be downloaded today; try again later"""

    status, code = HTTPStatus.TOO_MANY_REQUESTS, "QUOTA_EXCEEDED"
    example_extra: ClassVar = {"limit": "bytes_per_user_per_day", "retryAfterSeconds": 5400}
    example_headers: ClassVar = {"Retry-After": "5400"}


class StorageError(ApiError):
    """The package cannot be read"""

    status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "STORAGE_ERROR"


class InternalError(ApiError):
    """Something went wrong on the server"""

    status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL_ERROR"


class DatabaseIsUnavailable(ApiError):
    """The database is not available; try again soon"""

    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "DATABASE_UNAVAILABLE"


class IdentityProviderUnavailable(ApiError):
    """The identity provider does not answer, so the token cannot be checked; try again soon"""

    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "IDENTITY_PROVIDER_UNAVAILABLE"


class ShuttingDown(ApiError):
    """The server is shutting down; try again soon"""

    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "SHUTTING_DOWN"


class BadRequest(ApiError):
    """The request is malformed"""

    status, code = HTTPStatus.BAD_REQUEST, "BAD_REQUEST"


class HttpVersionNotSupported(ApiError):
    """This server speaks HTTP/1.1 and HTTP/1.0 only"""

    status, code = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP_VERSION_NOT_SUPPORTED"


class HeadersTooLarge(ApiError):
    """The request's line or header fields are too large, or too many"""

    status, code = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "HEADERS_TOO_LARGE"


class MisdirectedRequest(ApiError):
    """This server does not answer for that host"""

    status, code = HTTPStatus.MISDIRECTED_REQUEST, "MISDIRECTED_REQUEST"


class ExpectationFailed(ApiError):
    """The expectation cannot be met"""

    status, code = HTTPStatus.EXPECTATION_FAILED, "EXPECTATION_FAILED"


class RouteNotFound(ApiError):
    """There is nothing at this address"""

    status, code = HTTPStatus.NOT_FOUND, "NOT_FOUND"


class MethodNotAllowed(ApiError):
    """This address does not answer to that method"""

    status, code = HTTPStatus.METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED"
    example_headers: ClassVar = {"Allow": "GET, HEAD"}


def error_page(error: ApiError, request_id: str) -> web.Response:
    """The same for a person, whose browser was sent here: a small page in words."""
    message = html.escape(error.message)
    page = _PAGE.format(title=html.escape(error.status.phrase), message=message, request_id=request_id)
    return web.Response(
        status=error.status, text=page, content_type="text/html", headers=_headers(error) | {"Vary": "Accept"}
    )


def error_response(error: ApiError, request_id: str) -> web.Response:
    """The envelope every error is sent in."""
    body = {
        "status": "error",
        "code": error.code,
        "message": error.message,
        "timestamp": datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        "requestId": request_id,
        **error.extra,
    }
    return web.Response(
        status=error.status,
        body=orjson.dumps(body),
        content_type="application/json",
        headers=_headers(error),
    )


def _headers(error: ApiError) -> dict[str, str]:
    headers = {"Cache-Control": "no-store", **error.headers}
    if error.status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers.setdefault("Retry-After", "5")
    return headers

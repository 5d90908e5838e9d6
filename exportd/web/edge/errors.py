"""The table of errors that clients can get: a class for each, with its public message, its stable code and
its status.

An error never contains a path, a query or a traceback.
"""

import html
from collections.abc import Mapping
from datetime import UTC, datetime
from http import HTTPStatus
from typing import ClassVar

import orjson
from aiohttp import web

# Without styles and scripts: the page may load nothing.
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
    """Base class of the table. ``extra`` is added to the body, ``headers`` to the response.

    ``example_extra`` and ``example_headers`` are for the documentation: what the error always comes with.
    """

    message: ClassVar[str]
    status: HTTPStatus
    code: str
    example_extra: ClassVar[Mapping[str, object]] = {}
    example_headers: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self, *, extra: dict[str, object] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(self.message)
        self.extra = extra or {}
        self.headers = headers or {}


class InvalidJobId(ApiError):
    message = "The job id is not a UUID"
    status, code = HTTPStatus.BAD_REQUEST, "INVALID_JOB_ID"


class InvalidParameter(ApiError):
    message = "A query parameter is invalid"
    status, code = HTTPStatus.BAD_REQUEST, "INVALID_PARAMETER"
    example_extra: ClassVar = {"parameter": "limit"}


class Unauthenticated(ApiError):
    message = "A valid bearer token is required"
    status, code = HTTPStatus.UNAUTHORIZED, "UNAUTHENTICATED"
    example_headers: ClassVar = {"WWW-Authenticate": 'Bearer realm="exportd"'}


class LinkExpired(ApiError):
    message = "This download link is invalid, expired or revoked. Request a new one"
    status, code = HTTPStatus.GONE, "LINK_EXPIRED"


class JobNotFound(ApiError):
    message = "The export job does not exist"
    status, code = HTTPStatus.NOT_FOUND, "JOB_NOT_FOUND"


class DownloadUnauthorized(ApiError):
    message = "Only job creator or admin can download this package"
    status, code = HTTPStatus.FORBIDDEN, "DOWNLOAD_UNAUTHORIZED"


class PackageNotReady(ApiError):
    message = "The export is not completed yet"
    status, code = HTTPStatus.NOT_FOUND, "PACKAGE_NOT_READY"
    example_extra: ClassVar = {"jobStatus": "processing"}


class PackageExpired(ApiError):
    message = "The package has expired or was deleted"
    status, code = HTTPStatus.GONE, "PACKAGE_EXPIRED"
    example_extra: ClassVar = {"expiresAt": "2026-12-23T23:30:31+00:00"}


class FileNotFound(ApiError):
    message = "The package's file is missing"
    status, code = HTTPStatus.NOT_FOUND, "FILE_NOT_FOUND"


class PackageAvailable(ApiError):
    message = "The package is still available"
    status, code = HTTPStatus.CONFLICT, "PACKAGE_AVAILABLE"
    example_extra: ClassVar = {"jobId": "25395ef1-daf8-4ea1-a532-c61e57b1134f"}


class ExportInProgress(ApiError):
    message = "The export is in progress"
    status, code = HTTPStatus.CONFLICT, "EXPORT_IN_PROGRESS"
    example_extra: ClassVar = {"jobId": "25395ef1-daf8-4ea1-a532-c61e57b1134f"}


class ReExportUnsupported(ApiError):
    message = "This server cannot repeat exports"
    status, code = HTTPStatus.NOT_IMPLEMENTED, "RE_EXPORT_UNSUPPORTED"


class PreconditionFailed(ApiError):
    message = "A precondition of the request is false"
    status, code = HTTPStatus.PRECONDITION_FAILED, "PRECONDITION_FAILED"


class RangeNotSatisfiable(ApiError):
    message = "The range lies outside the package"
    status, code = HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "RANGE_NOT_SATISFIABLE"
    example_headers: ClassVar = {"Content-Range": "bytes */300025450"}


class RateLimited(ApiError):
    message = "Too many requests or downloads. Try again later"
    status, code = HTTPStatus.TOO_MANY_REQUESTS, "RATE_LIMITED"
    example_extra: ClassVar = {"limit": "requests_per_minute_per_user", "retryAfterSeconds": 7}
    example_headers: ClassVar = {"Retry-After": "7"}


class QuotaExceeded(ApiError):
    message = "The daily download quota is used up. Try again later"
    status, code = HTTPStatus.TOO_MANY_REQUESTS, "QUOTA_EXCEEDED"
    example_extra: ClassVar = {"limit": "bytes_per_user_per_day", "retryAfterSeconds": 5400}
    example_headers: ClassVar = {"Retry-After": "5400"}


class StorageError(ApiError):
    message = "The package cannot be read"
    status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "STORAGE_ERROR"


class InternalError(ApiError):
    message = "Internal server error"
    status, code = HTTPStatus.INTERNAL_SERVER_ERROR, "INTERNAL_ERROR"


class DatabaseIsUnavailable(ApiError):
    message = "The database is unavailable. Try again soon"
    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "DATABASE_UNAVAILABLE"


class IdentityProviderUnavailable(ApiError):
    message = "The identity provider does not respond, so the token cannot be verified. Try again soon"
    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "IDENTITY_PROVIDER_UNAVAILABLE"


class ShuttingDown(ApiError):
    message = "The server is shutting down. Try again soon"
    status, code = HTTPStatus.SERVICE_UNAVAILABLE, "SHUTTING_DOWN"


class BadRequest(ApiError):
    message = "The request is malformed"
    status, code = HTTPStatus.BAD_REQUEST, "BAD_REQUEST"


class HttpVersionNotSupported(ApiError):
    message = "This server supports only HTTP/1.1 and HTTP/1.0"
    status, code = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP_VERSION_NOT_SUPPORTED"


class HeadersTooLarge(ApiError):
    message = "The request line or the header fields are too large, or too many"
    status, code = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "HEADERS_TOO_LARGE"


class MisdirectedRequest(ApiError):
    message = "This server does not serve that host"
    status, code = HTTPStatus.MISDIRECTED_REQUEST, "MISDIRECTED_REQUEST"


class ExpectationFailed(ApiError):
    message = "The server cannot meet the expectation"
    status, code = HTTPStatus.EXPECTATION_FAILED, "EXPECTATION_FAILED"


class RouteNotFound(ApiError):
    message = "No resource has this address"
    status, code = HTTPStatus.NOT_FOUND, "NOT_FOUND"


class MethodNotAllowed(ApiError):
    message = "This resource does not support that method"
    status, code = HTTPStatus.METHOD_NOT_ALLOWED, "METHOD_NOT_ALLOWED"
    example_headers: ClassVar = {"Allow": "GET, HEAD"}


def error_page(error: ApiError, request_id: str) -> web.Response:
    """The error as a small page, for a browser that opened the address."""
    message = html.escape(error.message)
    page = _PAGE.format(title=html.escape(error.status.phrase), message=message, request_id=request_id)
    return web.Response(
        status=error.status, text=page, content_type="text/html", headers=_headers(error) | {"Vary": "Accept"}
    )


def error_response(error: ApiError, request_id: str) -> web.Response:
    """The error as JSON."""
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

"""The middleware around every handler: the request's context, checks that need no handler, errors, and
draining."""

import math
import re
from urllib.parse import urlsplit

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from exportd.db.pool import DatabaseUnavailable
from exportd.limits.limiter import Limit, LimitExceeded
from exportd.web.edge.context import CLIENT, REQUEST_ID, begin_request, request_id_of
from exportd.web.edge.cors import answer_preflight
from exportd.web.edge.errors import (
    ApiError,
    BadRequest,
    DatabaseIsUnavailable,
    ExpectationFailed,
    InternalError,
    MethodNotAllowed,
    MisdirectedRequest,
    QuotaExceeded,
    RateLimited,
    RouteNotFound,
    ShuttingDown,
    error_page,
    error_response,
)
from exportd.web.services import SERVICES, Services

log = structlog.get_logger()

# RFC 9110, section 7.2: a host and an optional port, without user or path.
_HOST = re.compile(r"(\[[^][/?#@\s]*\]|[^][/?#@:\s]*)(?::[0-9]{0,5})?", re.ASCII)
_NO_WEIGHT = re.compile(r"q=0(?:\.0*)?", re.ASCII)
# A client over a limit must not hold a connection. After a request that two parsers may read differently,
# nothing else may follow on the connection.
_END_THE_CONNECTION = (BadRequest, RateLimited, QuotaExceeded)
_SERVER = "exportd"
_NOTHING_TO_LOAD = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# Probes and scrapes are answered during a drain, which may take an hour.
_HEALTH = ("/healthz", "/readyz")
_PROBES = (*_HEALTH, "/metrics")


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Sets the request's context and translates every exception into an error response."""
    begin_request(request)
    lifecycle = request.app[SERVICES].lifecycle
    with lifecycle.request_under_way():
        try:
            _check_admission(request)
            preflight = answer_preflight(request)
            response = await handler(request) if preflight is None else preflight
        except Exception as error:  # noqa: BLE001  # translated, and logged if it is unforeseen
            response = _respond_to(request, error)
    if lifecycle.is_draining:
        # A client that reads to the end of the connection must not wait for the others.
        response.force_close()
    return response


def _respond_to(request: web.Request, error: Exception) -> web.Response:
    found = _translate(request, error)
    respond = (
        error_page
        if isinstance(error, ApiError | LimitExceeded) and _is_for_a_person(request)
        else error_response
    )
    response = respond(found, request[REQUEST_ID])
    if isinstance(found, _END_THE_CONNECTION):
        response.force_close()
    return response


def _translate(request: web.Request, error: Exception) -> ApiError:
    match error:
        case ApiError():
            return error
        case LimitExceeded():
            return limit_error(request.app[SERVICES], error)
        case web.HTTPMethodNotAllowed():
            return MethodNotAllowed(headers={"Allow": ", ".join(sorted(error.allowed_methods))})
        case web.HTTPNotFound():
            return RouteNotFound()
        case DatabaseUnavailable():
            log.error("database_unavailable", error=str(error))
            return DatabaseIsUnavailable()
    log.error("request_failed", exc_info=error, method=request.method, path=request.path)
    return InternalError()


def limit_error(services: Services, error: LimitExceeded) -> ApiError:
    """Counts and logs a request over a limit, and returns its error."""
    services.metrics.limit_hit(error.limit)
    if services.limiter.may_log(error.limit, error.subject):
        log.warning("limit_hit", limit=error.limit, subject=error.subject)
    seconds = max(1, math.ceil(error.retry_after_seconds))
    kind = QuotaExceeded if error.limit is Limit.BYTES_PER_USER_PER_DAY else RateLimited
    return kind(
        extra={"limit": error.limit, "retryAfterSeconds": seconds}, headers={"Retry-After": str(seconds)}
    )


def _check_admission(request: web.Request) -> None:
    """Raises the ApiError of a request that must not reach a handler."""
    if request.app[SERVICES].lifecycle.is_draining and request.path not in _PROBES:
        raise ShuttingDown
    _check_framing(request)
    if request.path not in _HEALTH:
        _check_host(request)
    if request.path not in _PROBES:
        request.app[SERVICES].limiter.check_address(request[CLIENT])


async def set_common_headers(request: web.Request, response: web.StreamResponse) -> None:
    """A response signal: sets the headers that every response has."""
    request_id = request_id_of(request)
    # The handler of a page says what the page may load.
    policy = response.headers.get("Content-Security-Policy", _NOTHING_TO_LOAD)
    response.headers.update({**common_headers(request_id), "Content-Security-Policy": policy})


def common_headers(request_id: str) -> dict[str, str]:
    """The headers that every response has."""
    return {
        "X-Request-ID": request_id,
        "X-Content-Type-Options": "nosniff",
        # A URL may contain a ticket.
        "Referrer-Policy": "no-referrer",
        "Content-Security-Policy": _NOTHING_TO_LOAD,
        "Server": _SERVER,
    }


async def expect(request: web.Request) -> web.Response | None:
    """Answers an Expect field, for routes that read no body."""
    if request.headers["Expect"].lower() != "100-continue":
        return error_response(ExpectationFailed(), request_id_of(request))
    return None


def _check_host(request: web.Request) -> None:
    """Raises BadRequest and MisdirectedRequest."""
    fields = request.headers.getall("Host", [])
    if len(fields) > 1 or (not fields and request.version >= HttpVersion11):
        raise BadRequest
    # A target in absolute form overrides the Host field (RFC 9112, section 3.2.2).
    is_absolute = not request.raw_path.startswith(("/", "*"))
    try:
        authority = urlsplit(request.raw_path).netloc if is_absolute else "".join(fields)
    except ValueError as error:
        raise BadRequest from error
    found = _HOST.fullmatch(authority)
    if found is None:
        raise BadRequest
    allowed = request.app[SERVICES].settings.server.allowed_hosts
    if allowed and found[1].strip("[]").lower() not in allowed:
        raise MisdirectedRequest


def _check_framing(request: web.Request) -> None:
    """Raises BadRequest if a proxy could see another end of the body (RFC 9112, section 6.1)."""
    codings = request.headers.getall("Transfer-Encoding", [])
    if codings and (request.version < HttpVersion11 or [coding.lower() for coding in codings] != ["chunked"]):
        raise BadRequest


def _is_for_a_person(request: web.Request) -> bool:
    """Whether a browser opens this address. Requests of scripts accept any type."""
    if request.method != "GET":
        return False
    for item in request.headers.get("Accept", "").lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        if media_type == "text/html" and not any(map(_NO_WEIGHT.fullmatch, parameters)):
            return True
    return False

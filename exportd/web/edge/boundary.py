"""What every request meets first and last: an id, one shape for all errors, and a place in the drain."""

import re
import secrets
import time
from collections.abc import Collection
from urllib.parse import urlsplit

import structlog
from aiohttp import HttpVersion11, web
from aiohttp.typedefs import Handler

from exportd.db.pool import DatabaseUnavailable
from exportd.telemetry.metrics import Metrics
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
from exportd.web.edge.lifecycle import Lifecycle
from exportd.web.edge.limits import CLIENT, LIMITER, find_client

log = structlog.get_logger()

# In lower case, without ports; none: any.
ALLOWED_HOSTS = web.AppKey("allowed_hosts", Collection[str])
LIFECYCLE = web.AppKey("lifecycle", Lifecycle)
METRICS = web.AppKey("metrics", Metrics)
REQUEST_ID = web.RequestKey("request_id", str)
# By time.perf_counter().
RECEIVED_AT = web.RequestKey("received_at", float)

_SANE_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)
# RFC 9110, section 7.2: a host and, maybe, a port; neither a user nor a path.
_HOST = re.compile(r"(\[[^][/?#@\s]*\]|[^][/?#@:\s]*)(?::[0-9]{0,5})?", re.ASCII)
_NO_WEIGHT = re.compile(r"q=0(?:\.0*)?", re.ASCII)
# Whoever asks too much holds no place; and after what two readers could understand differently comes nothing.
_END_THE_CONNECTION = (BadRequest, RateLimited, QuotaExceeded)
_SERVER = "exportd"
_NOTHING_TO_LOAD = "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
# A probe must be able to tell "draining" from "gone"; a drain may take an hour, and is worth watching.
_HEALTH = ("/healthz", "/readyz")
_PROBES = (*_HEALTH, "/metrics")


@web.middleware
async def edge(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Gives the request its id and turns whatever is raised into an error response."""
    request[RECEIVED_AT] = time.perf_counter()
    request[CLIENT] = find_client(request)
    request_id = _request_id(request)
    request[REQUEST_ID] = request_id
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id, **_trace_id(request))
    lifecycle = request.app[LIFECYCLE]
    response: web.StreamResponse
    with lifecycle.request_under_way():
        try:
            _check_admission(request)
            preflight = answer_preflight(request)
            response = await handler(request) if preflight is None else preflight
        except ApiError as error:
            respond = error_page if _is_for_a_person(request) else error_response
            response = respond(error, request_id)
            if isinstance(error, _END_THE_CONNECTION):
                response.force_close()
        except web.HTTPNotFound:
            response = error_response(RouteNotFound(), request_id)
        except web.HTTPMethodNotAllowed as error:
            allow = ", ".join(sorted(error.allowed_methods))
            response = error_response(MethodNotAllowed(headers={"Allow": allow}), request_id)
        except DatabaseUnavailable as error:
            log.error("database_unavailable", error=str(error))
            response = error_response(DatabaseIsUnavailable(), request_id)
        except Exception:  # the edge: logged whole, answered with nothing of it
            log.exception("request_failed", method=request.method, path=request.path)
            response = error_response(InternalError(), request_id)
    if lifecycle.is_draining:
        # A client that reads to the connection's end must not wait for everybody else's.
        response.force_close()
    return response


def _check_admission(request: web.Request) -> None:
    """Raises the ApiError of a request that no handler is to see."""
    if request.app[LIFECYCLE].is_draining and request.path not in _PROBES:
        raise ShuttingDown
    _check_framing(request)
    if request.path not in _HEALTH:
        _check_host(request)
    if request.path not in _PROBES:
        request.app[LIMITER].check_address(request[CLIENT])


async def set_common_headers(request: web.Request, response: web.StreamResponse) -> None:
    """A response signal: what every answer carries."""
    request_id = request[REQUEST_ID] if REQUEST_ID in request else _request_id(request)
    # What a page may load is for its handler to say.
    policy = response.headers.get("Content-Security-Policy", _NOTHING_TO_LOAD)
    response.headers.update({**common_headers(request_id), "Content-Security-Policy": policy})


def common_headers(request_id: str) -> dict[str, str]:
    """What every answer carries."""
    return {
        "X-Request-ID": request_id,
        "X-Content-Type-Options": "nosniff",
        # An address may hold a ticket.
        "Referrer-Policy": "no-referrer",
        "Content-Security-Policy": _NOTHING_TO_LOAD,
        "Server": _SERVER,
    }


async def expect(request: web.Request) -> web.Response | None:
    """Answers an Expect field, for routes that read no body."""
    if request.headers["Expect"].lower() != "100-continue":
        return error_response(ExpectationFailed(), _request_id(request))
    return None


def _check_host(request: web.Request) -> None:
    """Raises BadRequest and MisdirectedRequest."""
    fields = request.headers.getall("Host", [])
    if len(fields) > 1 or (not fields and request.version >= HttpVersion11):
        raise BadRequest
    # A target in absolute form goes before the field (RFC 9112, section 3.2.2).
    is_absolute = not request.raw_path.startswith(("/", "*"))
    try:
        authority = urlsplit(request.raw_path).netloc if is_absolute else "".join(fields)
    except ValueError as error:
        raise BadRequest from error
    found = _HOST.fullmatch(authority)
    if found is None:
        raise BadRequest
    allowed = request.app[ALLOWED_HOSTS]
    if allowed and found[1].strip("[]").lower() not in allowed:
        raise MisdirectedRequest


def _check_framing(request: web.Request) -> None:
    """Raises BadRequest where a proxy in front could see another end of the body (RFC 9112, section 6.1)."""
    codings = request.headers.getall("Transfer-Encoding", [])
    if codings and (request.version < HttpVersion11 or [coding.lower() for coding in codings] != ["chunked"]):
        raise BadRequest


def _is_for_a_person(request: web.Request) -> bool:
    """Whether a browser goes to this address, as to a link; a page's own requests ask for anything."""
    if request.method != "GET":
        return False
    for item in request.headers.get("Accept", "").lower().split(","):
        media_type, *parameters = (part.strip() for part in item.split(";"))
        if media_type == "text/html" and not any(map(_NO_WEIGHT.fullmatch, parameters)):
            return True
    return False


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-ID", "")
    return given if _SANE_REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _trace_id(request: web.Request) -> dict[str, str]:
    """The caller's trace (W3C Trace Context), where one came."""
    match = _TRACE_PARENT.fullmatch(request.headers.get("traceparent", ""))
    return {"trace_id": match[1]} if match else {}

"""The context of a request: its id, when it was received, and its client's address."""

import re
import secrets
import time

import structlog
from aiohttp import web

from exportd.http.forwarded import client_address, forwarded_addresses, parse_address
from exportd.web.services import SERVICES

log = structlog.get_logger()

REQUEST_ID = web.RequestKey("request_id", str)
# By time.perf_counter().
RECEIVED_AT = web.RequestKey("received_at", float)
CLIENT = web.RequestKey("client", str)

_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}", re.ASCII)
_TRACE_PARENT = re.compile(r"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}(-.*)?", re.ASCII)


def begin_request(request: web.Request) -> None:
    """Sets the request's context, and binds its ids to every log line of it."""
    request[RECEIVED_AT] = time.perf_counter()
    request[CLIENT] = _find_client(request)
    request[REQUEST_ID] = request_id_of(request)
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request[REQUEST_ID], **_trace_id(request))


def request_id_of(request: web.Request) -> str:
    """The request's id: the given one if it is plain text, or else a new one."""
    if REQUEST_ID in request:
        return request[REQUEST_ID]
    given = request.headers.get("X-Request-ID", "")
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)


def _trace_id(request: web.Request) -> dict[str, str]:
    """The caller's trace (W3C Trace Context), if there is one."""
    match = _TRACE_PARENT.fullmatch(request.headers.get("traceparent", ""))
    return {"trace_id": match[1]} if match else {}


def _find_client(request: web.Request) -> str:
    """The client's address, as far as trusted proxies report it."""
    services = request.app[SERVICES]
    peer, field = request.remote or "", services.settings.server.forwarded_field
    if not services.trusted_proxies:
        _warn_of_untrusted_proxy(request, peer, field)
        return peer
    addresses = forwarded_addresses(field, request.headers.getall(field, []))
    return client_address(peer, addresses, services.trusted_proxies)


def _warn_of_untrusted_proxy(request: web.Request, peer: str, field: str) -> None:
    """All users of a proxy that is not trusted share the limits of one address."""
    address = parse_address(peer)
    if (
        field in request.headers
        and address is not None
        and address.is_private
        and request.app[SERVICES].limiter.may_log("proxy", peer)
    ):
        log.warning("proxy_not_trusted", peer=peer, advice="add it to [server] trusted_proxies")

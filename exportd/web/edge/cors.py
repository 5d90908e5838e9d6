"""CORS (Fetch standard): which origins may send requests, and which fields they may send and read."""

from aiohttp import web

from exportd.web.services import SERVICES

# Pages send the token themselves. There are no cookies, so no credentials mode.
_METHODS = "GET, HEAD, POST, DELETE"
_REQUEST_FIELDS = (
    "Authorization, Content-Type, If-Match, If-None-Match, If-Range, Last-Event-ID, Range, Want-Repr-Digest,"
    " X-Request-ID"
)
_EXPOSED_FIELDS = (
    "Accept-Ranges, Content-Disposition, Content-Length, Content-Range, ETag, Location, Repr-Digest,"
    " Retry-After, Sunset, X-Package-Size, X-Request-ID"
)
_PREFLIGHT_SECONDS = 600


def answer_preflight(request: web.Request) -> web.Response | None:
    """Returns the response to a preflight request of a listed origin, or None for other requests."""
    is_preflight = request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers
    if not is_preflight or _listed_origin(request) is None:
        return None
    return web.Response(
        status=204,
        headers={
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": _REQUEST_FIELDS,
            "Access-Control-Max-Age": str(_PREFLIGHT_SECONDS),
        },
    )


async def allow_origin(request: web.Request, response: web.StreamResponse) -> None:
    """A response signal: lets pages of listed origins read every response."""
    if not request.app[SERVICES].settings.server.cors_origins:
        return
    # Set it for other origins too: a cache must not give this response to a page of another origin.
    vary = response.headers.get("Vary")
    response.headers["Vary"] = f"{vary}, Origin" if vary else "Origin"
    if (origin := _listed_origin(request)) is not None:
        response.headers["Access-Control-Allow-Origin"] = origin
        response.headers["Access-Control-Expose-Headers"] = _EXPOSED_FIELDS


def _listed_origin(request: web.Request) -> str | None:
    origin = request.headers.get("Origin")
    return origin if origin in request.app[SERVICES].settings.server.cors_origins else None

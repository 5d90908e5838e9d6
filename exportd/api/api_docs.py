"""``/api-docs``: the OpenAPI document, and Swagger UI to read it with, all of it from here."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import orjson
from aiohttp import web

from exportd.api.documentation import SWAGGER_FOLDER, describe_api
from exportd.api.errors import RouteNotFound
from exportd.http.conditions import check_if_none_match
from exportd.http.validators import entity_tag

_OWN_FOLDER = Path(__file__).parent / "swagger"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".png": "image/png",
    ".json": "application/json",
}
_DOCUMENT = "swagger.json"
_PAGE = "index.html"
_FILES = (
    *(_OWN_FOLDER / name for name in (_PAGE, "page.css", "start.js")),
    *(SWAGGER_FOLDER / name for name in ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")),
)
# Swagger UI draws its icons from data: addresses.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


@dataclass(frozen=True, slots=True)
class Asset:
    """A file in memory. ``etag`` is quoted."""

    body: bytes
    content_type: str
    etag: str


API_DOCS = web.AppKey("api_docs", Mapping[str, Asset])


def load_api_docs(router: web.UrlDispatcher) -> Mapping[str, Asset]:
    """Everything that ``/api-docs`` serves, by name; the document is of the router as it is now.

    Raises OSError.
    """
    assets = {path.name: _asset(path.name, path.read_bytes()) for path in _FILES}
    return assets | {_DOCUMENT: _asset(_DOCUMENT, orjson.dumps(describe_api(router)))}


async def show_api_docs(request: web.Request) -> web.Response:
    """Swagger UI's page."""
    return _send(request, _PAGE)


async def show_api_docs_asset(request: web.Request) -> web.Response:
    """The document, and what the page is made of."""
    return _send(request, request.match_info["name"])


def _asset(name: str, body: bytes) -> Asset:
    return Asset(body, _TYPES[Path(name).suffix], entity_tag(hashlib.sha256(body).hexdigest()))


def _send(request: web.Request, name: str) -> web.Response:
    asset = request.app[API_DOCS].get(name)
    if asset is None:
        raise RouteNotFound
    headers = {"ETag": asset.etag, "Cache-Control": "no-cache", "Content-Security-Policy": _POLICY}
    fields = request.headers.getall("If-None-Match", None)
    if check_if_none_match(None if fields is None else ", ".join(fields), asset.etag) is False:
        return web.Response(status=304, headers=headers)
    return web.Response(body=asset.body, headers={**headers, "Content-Type": asset.content_type})

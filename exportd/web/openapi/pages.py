"""``/api-docs``: the OpenAPI document and Swagger UI, without files of other hosts."""

from pathlib import Path

import orjson
from aiohttp import web

from exportd.web.openapi.document import SWAGGER_FOLDER, describe_api
from exportd.web.pages.assets import Assets, make_asset, send_asset
from exportd.web.services import SERVICES

_OWN_FOLDER = Path(__file__).parent / "swagger"
_DOCUMENT = "swagger.json"
_PAGE = "index.html"
_FILES = (
    *(_OWN_FOLDER / name for name in (_PAGE, "page.css", "start.js")),
    *(SWAGGER_FOLDER / name for name in ("swagger-ui.css", "swagger-ui-bundle.js", "favicon-32x32.png")),
)
# Swagger UI draws its icons from data: addresses.
_HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
        " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
}


def load_api_docs(router: web.UrlDispatcher) -> Assets:
    """Returns the files of ``/api-docs``, by name. The document describes the router's present routes.

    Raises OSError.
    """
    assets = {path.name: make_asset(path.name, path.read_bytes()) for path in _FILES}
    return assets | {_DOCUMENT: make_asset(_DOCUMENT, orjson.dumps(describe_api(router)))}


async def show_api_docs(request: web.Request) -> web.StreamResponse:
    """Sends the page of Swagger UI."""
    return await send_asset(request, request.app[SERVICES].api_docs, _PAGE, _HEADERS)


async def show_api_docs_asset(request: web.Request) -> web.StreamResponse:
    """Sends the document, or a file of the page."""
    return await send_asset(request, request.app[SERVICES].api_docs, request.match_info["name"], _HEADERS)

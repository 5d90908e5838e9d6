"""The page at ``/`` and its files, which pages of other origins may load too."""

import html
from pathlib import Path

from aiohttp import web

from exportd.web.pages.assets import CONTENT_TYPES, Assets, make_asset, send_asset
from exportd.web.services import SERVICES

_FOLDER = Path(__file__).parent / "static"
_PAGE = "index.html"
# The page loads only exportd's own files, and no inline scripts.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
# The files hold no secrets. A page of another origin can load module scripts only by CORS.
_FOR_EVERYBODY = {"Access-Control-Allow-Origin": "*", "Cross-Origin-Resource-Policy": "cross-origin"}


def load_page(base_path: str) -> Assets:
    """Returns the page, for the API at ``base_path``, and its files, by name. Raises OSError."""
    files = {}
    for path in _FOLDER.rglob("*"):
        if path.suffix in CONTENT_TYPES:
            name, body = str(path.relative_to(_FOLDER)), path.read_bytes()
            if name == _PAGE:
                body = body.replace(b"{base_path}", html.escape(base_path).encode())
            files[name] = make_asset(name, body)
    return files


async def show_page(request: web.Request) -> web.StreamResponse:
    """Sends the page."""
    return await send_asset(request, request.app[SERVICES].page, _PAGE, {"Content-Security-Policy": _POLICY})


async def show_page_file(request: web.Request) -> web.StreamResponse:
    """Sends a script or style sheet of the page or of the component."""
    return await send_asset(request, request.app[SERVICES].page, request.match_info["name"], _FOR_EVERYBODY)

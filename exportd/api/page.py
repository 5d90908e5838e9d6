"""The page at ``/`` and the files it is made of, which pages of other origins may load too."""

import html
from pathlib import Path

from aiohttp import web

from exportd.api.errors import RouteNotFound

_FOLDER = Path(__file__).parent.parent / "page"
_TYPES = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
# Everything comes from here, and no text becomes a script.
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none';"
    " require-trusted-types-for 'script'; trusted-types 'none'"
)
_FILES = {str(path.relative_to(_FOLDER)): path for path in _FOLDER.rglob("*") if path.suffix in _TYPES}

BASE_PATH = web.AppKey("base_path", str)


async def page(request: web.Request) -> web.Response:
    """The page. It finds the API by a ``meta`` element."""
    text = _FILES["index.html"].read_text(encoding="utf-8")
    return web.Response(
        text=text.replace("{base_path}", html.escape(request.app[BASE_PATH])),
        content_type="text/html",
        headers={"Cache-Control": "no-cache", "Content-Security-Policy": _POLICY},
    )


async def page_file(request: web.Request) -> web.FileResponse:
    """A script or style sheet of the page, or of the component in a page of any origin."""
    path = _FILES.get(request.match_info["name"])
    if path is None:
        raise RouteNotFound
    return web.FileResponse(
        path,
        headers={
            "Content-Type": f"{_TYPES[path.suffix]}; charset=utf-8",
            # Asked for again each time, and answered 304: after an upgrade, old and new would not fit.
            "Cache-Control": "no-cache",
            # They hold no secret, and module scripts of another origin come by CORS alone.
            "Access-Control-Allow-Origin": "*",
            "Cross-Origin-Resource-Policy": "cross-origin",
        },
    )

"""Files of the pages, in memory. They are small and the same on every node."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from exportd.http.conditions import check_if_none_match
from exportd.http.validators import entity_tag
from exportd.web.edge.errors import RouteNotFound

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".png": "image/png",
    ".svg": "image/svg+xml",
}


_PIECE_BYTES = 65536


@dataclass(frozen=True, slots=True)
class Asset:
    """A file. ``etag`` is quoted, and made of the content."""

    body: bytes
    content_type: str
    etag: str


Assets = Mapping[str, Asset]


def make_asset(name: str, body: bytes) -> Asset:
    """Returns an asset with the content type of its name."""
    return Asset(body, CONTENT_TYPES[Path(name).suffix], entity_tag(hashlib.sha256(body).hexdigest()))


async def send_asset(
    request: web.Request, assets: Assets, name: str, headers: Mapping[str, str]
) -> web.StreamResponse:
    """Sends an asset, or 304 if the client has it. Raises RouteNotFound."""
    asset = assets.get(name)
    if asset is None:
        raise RouteNotFound
    # Browsers must revalidate: after an upgrade, old and new files do not work together.
    headers = {"ETag": asset.etag, "Cache-Control": "no-cache", **headers}
    fields = request.headers.getall("If-None-Match", None)
    if check_if_none_match(None if fields is None else ", ".join(fields), asset.etag) is False:
        return web.Response(status=304, headers=headers)
    response = web.StreamResponse(headers={**headers, "Content-Type": asset.content_type})
    response.content_length = len(asset.body)
    if request.method == "HEAD":
        return response
    # Written as a whole, a file would stay in memory for each client that does not read.
    with contextlib.suppress(ConnectionError):
        await response.prepare(request)
        for start in range(0, len(asset.body), _PIECE_BYTES):
            await response.write(asset.body[start : start + _PIECE_BYTES])
    return response

"""Probes: whether the process runs, and whether it can serve downloads."""

import orjson
from aiohttp import web

from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.ops.probes import OK
from exportd.web.services import SERVICES


@documented(operations.HEALTH)
async def healthz(_: web.Request) -> web.Response:
    """Returns 200."""
    return _answer(200, {"status": "ok"})


@documented(operations.READINESS)
async def readyz(request: web.Request) -> web.Response:
    """Returns 200 if the database and the storage respond, else 503; 503 also while draining."""
    checks = await request.app[SERVICES].readiness.look()
    if request.app[SERVICES].lifecycle.is_draining:
        return _answer(503, {"status": "draining", **checks})
    if set(checks.values()) != {OK}:
        return _answer(503, {"status": "unavailable", **checks})
    return _answer(200, {"status": "ok", **checks})


def _answer(status: int, body: dict[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(body),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )

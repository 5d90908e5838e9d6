"""Probes: does the process live, and would it answer a download now."""

import asyncio

import orjson
from aiohttp import web

from exportd.api import operations
from exportd.api.access import DATABASE
from exportd.api.documentation import documented
from exportd.api.download import STORE
from exportd.api.middleware import LIFECYCLE
from exportd.db.pool import DatabaseUnavailable


@documented(operations.HEALTH)
async def healthz(_: web.Request) -> web.Response:
    """200 as long as the process answers at all."""
    return _answer(200, {"status": "ok"})


@documented(operations.READINESS)
async def readyz(request: web.Request) -> web.Response:
    """200 when database and storage answer; 503, with each one's state, when not or when draining."""
    checks = {"database": "ok", "storage": "ok"}
    try:
        await request.app[DATABASE].fetch_one("SELECT 1")
    except DatabaseUnavailable:
        checks["database"] = "unavailable"
    if not await asyncio.to_thread(request.app[STORE].is_ready):
        checks["storage"] = "unavailable"
    if request.app[LIFECYCLE].is_draining:
        return _answer(503, {"status": "draining", **checks})
    if set(checks.values()) != {"ok"}:
        return _answer(503, {"status": "unavailable", **checks})
    return _answer(200, {"status": "ok", **checks})


def _answer(status: int, body: dict[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(body),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )

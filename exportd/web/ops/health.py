"""Probes: does the process live, and would it answer a download now."""

import asyncio

import orjson
from aiohttp import web

from exportd.db.pool import Database, DatabaseUnavailable
from exportd.storage.files import PackageStore
from exportd.web.edge.boundary import LIFECYCLE
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented

_REMEMBERED_SECONDS = 1.0
_STORAGE_TIMEOUT_SECONDS = 5.0
_OK, _UNAVAILABLE = "ok", "unavailable"


@documented(operations.HEALTH)
async def healthz(_: web.Request) -> web.Response:
    """200 as long as the process answers at all."""
    return _answer(200, {"status": "ok"})


@documented(operations.READINESS)
async def readyz(request: web.Request) -> web.Response:
    """200 when database and storage answer; 503, with each one's state, when not or when draining."""
    checks = await request.app[READINESS].look()
    if request.app[LIFECYCLE].is_draining:
        return _answer(503, {"status": "draining", **checks})
    if set(checks.values()) != {_OK}:
        return _answer(503, {"status": "unavailable", **checks})
    return _answer(200, {"status": "ok", **checks})


class Readiness:
    """Whether database and storage answer: one look at a time, and at most one each second, whoever asks."""

    def __init__(self, database: Database, store: PackageStore) -> None:
        self._database = database
        self._store = store
        self._look: asyncio.Task[dict[str, str]] | None = None
        self._looked_at = float("-inf")
        self._storage_look: asyncio.Future[bool] | None = None

    async def look(self) -> dict[str, str]:
        """The state of each: ``ok`` or ``unavailable``."""
        now = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now - self._looked_at >= _REMEMBERED_SECONDS):
            self._looked_at = now
            self._look = asyncio.create_task(self._look_now())
        # Shielded: others wait for it too.
        return await asyncio.shield(self._look)

    async def _look_now(self) -> dict[str, str]:
        is_database_ready, is_storage_ready = await asyncio.gather(self._ask_database(), self._ask_storage())
        return {
            "database": _OK if is_database_ready else _UNAVAILABLE,
            "storage": _OK if is_storage_ready else _UNAVAILABLE,
        }

    async def _ask_database(self) -> bool:
        try:
            await self._database.fetch_one("SELECT 1")
        except DatabaseUnavailable:
            return False
        return True

    async def _ask_storage(self) -> bool:
        # A file system that hangs (NFS) holds one thread, however often somebody asks.
        if self._storage_look is None:
            self._storage_look = asyncio.ensure_future(asyncio.to_thread(self._store.is_ready))
        done, _ = await asyncio.wait([self._storage_look], timeout=_STORAGE_TIMEOUT_SECONDS)
        if not done:
            return False
        self._storage_look = None
        return done.pop().result()


READINESS = web.AppKey("readiness", Readiness)


def _answer(status: int, body: dict[str, str]) -> web.Response:
    return web.Response(
        status=status,
        body=orjson.dumps(body),
        content_type="application/json",
        headers={"Cache-Control": "no-store"},
    )

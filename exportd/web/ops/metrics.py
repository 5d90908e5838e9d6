"""Metrics: what is noted of every request, and how things stand, for whoever asks for ``/metrics``."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection

from aiohttp import web

from exportd.db.jobs import sum_packages
from exportd.db.pool import Database, DatabaseUnavailable
from exportd.http.forwarded import Network, parse_address
from exportd.telemetry.lag import watch_lag
from exportd.telemetry.metrics import CONTENT_TYPE
from exportd.web.downloads.handler import LEDGER
from exportd.web.edge.access import DATABASE
from exportd.web.edge.boundary import METRICS, RECEIVED_AT
from exportd.web.edge.errors import RouteNotFound
from exportd.web.edge.limits import CLIENT
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented

_FLUSH_SECONDS = 1.0
# The system is asked less often: it lists every descriptor of the process.
_FLUSHES_BETWEEN_MEASUREMENTS = 5
# How long a scrape waits for the database.
_PATIENCE_SECONDS = 2.0
# The sums read the whole table.
_SUMS_KEPT_SECONDS = 60.0


class DatabaseProbe:
    """Whether the database answers, and the sums over its jobs, looked at when somebody asks.

    A statement is never cancelled, which would cost its connection: one that is slow is left to end, and a
    new one begins only then.
    """

    def __init__(self, database: Database) -> None:
        self.is_up = False
        self.packages: dict[str, tuple[int, int]] | None = None
        self._database = database
        self._ping: asyncio.Task[bool] | None = None
        self._sums: asyncio.Task[None] | None = None
        self._sums_begun_at = float("-inf")

    async def look(self) -> None:
        """Brings both up to date, as far as that takes two seconds at most."""
        if self._ping is None:
            self._ping = asyncio.create_task(self._answers())
        now = time.monotonic()
        if self._sums is None and now - self._sums_begun_at >= _SUMS_KEPT_SECONDS:
            self._sums_begun_at = now
            self._sums = asyncio.create_task(self._sum())
        under_way = [task for task in (self._ping, self._sums) if task is not None]
        await asyncio.wait(under_way, timeout=_PATIENCE_SECONDS)
        self.is_up = False
        if self._ping.done():
            self.is_up, self._ping = self._ping.result(), None
        if self._sums is not None and self._sums.done():
            sums, self._sums = self._sums, None
            sums.result()

    def close(self) -> None:
        """Gives up on what is under way."""
        for task in (self._ping, self._sums):
            if task is not None:
                task.cancel()

    async def _answers(self) -> bool:
        try:
            await self._database.fetch_one("SELECT 1")
        except DatabaseUnavailable:
            return False
        return True

    async def _sum(self) -> None:
        try:
            self.packages = await sum_packages(self._database)
        except DatabaseUnavailable:
            self.packages = None


# Who may read them.
METRICS_FROM = web.AppKey("metrics_from", Collection[Network])
PROBE = web.AppKey("database_probe", DatabaseProbe)


@documented(operations.METRICS)
async def metrics(request: web.Request) -> web.Response:
    """All metrics of all processes, as Prometheus reads them, for those who may. Raises RouteNotFound."""
    client = parse_address(request[CLIENT])
    if client is None or not any(client in network for network in request.app[METRICS_FROM]):
        raise RouteNotFound
    probe = request.app[PROBE]
    await probe.look()
    _flush(request.app)
    body = await asyncio.to_thread(
        request.app[METRICS].exposition,
        database_is_up=probe.is_up,
        packages=probe.packages if probe.is_up else None,
    )
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})


async def count_answer(request: web.Request, response: web.StreamResponse) -> None:
    """A response signal: notes the answer as its headers go out. A download's end is noted elsewhere."""
    received_at = request.get(RECEIVED_AT)
    if received_at is None:
        return  # refused before it came to the edge
    route = request.match_info.route.name or "none"
    request.app[METRICS].request_answered(route, response.status, time.perf_counter() - received_at)


async def measure(app: web.Application) -> AsyncIterator[None]:
    """Measures the process and its loop while the application runs. Needs the database and the ledger."""
    app[PROBE] = DatabaseProbe(app[DATABASE])
    tasks = [
        asyncio.create_task(watch_lag(app[METRICS].loop_was_late)),
        asyncio.create_task(_keep_flushed(app)),
    ]
    yield
    app[PROBE].close()
    for task in tasks:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    # A process that ends leaves its counts to those that stay.
    _flush(app)


async def _keep_flushed(app: web.Application) -> None:
    while True:
        await asyncio.to_thread(app[METRICS].measure_process)
        for _ in range(_FLUSHES_BETWEEN_MEASUREMENTS):
            _flush(app)
            await asyncio.sleep(_FLUSH_SECONDS)


def _flush(app: web.Application) -> None:
    pool = app[DATABASE].pool_use
    app[METRICS].flush(
        waiting_events=app[LEDGER].waiting,
        spooled_events=app[LEDGER].spooled,
        pool_in_use=pool.in_use,
        pool_idle=pool.idle,
        pool_limit=pool.limit,
    )

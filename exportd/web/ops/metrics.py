"""``/metrics``, and the measurements of the process and of every request."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator

from aiohttp import web

from exportd.http.forwarded import parse_address
from exportd.telemetry.lag import watch_lag
from exportd.telemetry.metrics import CONTENT_TYPE
from exportd.web.edge.context import CLIENT, RECEIVED_AT
from exportd.web.edge.errors import RouteNotFound
from exportd.web.openapi import operations
from exportd.web.openapi.document import documented
from exportd.web.services import SERVICES, Services

_FLUSH_SECONDS = 1.0
# The process is measured less often: the system lists all its descriptors for it.
_FLUSHES_BETWEEN_MEASUREMENTS = 5


@documented(operations.METRICS)
async def metrics(request: web.Request) -> web.Response:
    """All metrics of all processes, as Prometheus reads them, for clients in ``metrics_from``.

    Raises RouteNotFound for other clients.
    """
    services = request.app[SERVICES]
    client = parse_address(request[CLIENT])
    if client is None or not any(client in network for network in services.metrics_from):
        raise RouteNotFound
    probe = services.database_probe
    await probe.look()
    _flush(services)
    body = await asyncio.to_thread(
        services.metrics.exposition,
        database_is_up=probe.is_up,
        packages=probe.packages if probe.is_up else None,
    )
    return web.Response(body=body, headers={"Content-Type": CONTENT_TYPE, "Cache-Control": "no-store"})


async def count_answer(request: web.Request, response: web.StreamResponse) -> None:
    """A response signal: counts the response when its headers are sent."""
    received_at = request.get(RECEIVED_AT)
    if received_at is None:
        return  # rejected before the middleware
    route = request.match_info.route.name or "none"
    seconds = time.perf_counter() - received_at
    request.app[SERVICES].metrics.request_answered(route, response.status, seconds)


@contextlib.asynccontextmanager
async def measured(services: Services) -> AsyncIterator[None]:
    """Measures the process and its event loop while the block runs."""
    tasks = [
        asyncio.create_task(watch_lag(services.metrics.loop_was_late)),
        asyncio.create_task(_keep_flushed(services)),
    ]
    try:
        yield
    finally:
        services.database_probe.close()
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        # A process that ends leaves its counts to the remaining processes.
        _flush(services)


async def _keep_flushed(services: Services) -> None:
    while True:
        await asyncio.to_thread(services.metrics.measure_process)
        for _ in range(_FLUSHES_BETWEEN_MEASUREMENTS):
            _flush(services)
            await asyncio.sleep(_FLUSH_SECONDS)


def _flush(services: Services) -> None:
    pool = services.database.pool_use
    services.metrics.flush(
        waiting_events=services.ledger.waiting,
        spooled_events=services.ledger.spooled,
        pool_in_use=pool.in_use,
        pool_idle=pool.idle,
        pool_limit=pool.limit,
    )

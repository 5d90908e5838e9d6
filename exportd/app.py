"""Builds the application; the only file that knows every room."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from ipaddress import ip_network
from typing import Any

import structlog
from aiohttp import web

from exportd.archive.pack import remove_abandoned
from exportd.auth.jwks import RemoteKeys
from exportd.auth.tokens import make_tokens
from exportd.counting.ledger import open_ledger
from exportd.db.expiry import last_cleanup
from exportd.db.jobs import JobFinder, has_uuid_users
from exportd.db.pool import Database, open_database
from exportd.delivery.fair_share import FairShare
from exportd.delivery.response import Sender
from exportd.domain.delivery import Method
from exportd.jobs.cleanup import Cleanup, CleanupSummary, claim_storage, on_schedule
from exportd.jobs.hub import JobHub
from exportd.jobs.verify import SuspectPackages
from exportd.limits.board import Board
from exportd.limits.limiter import Limit, Limiter
from exportd.limits.memory import SharedMemory, make_shared_memory
from exportd.limits.rates import Rates
from exportd.settings import Settings
from exportd.storage.files import PackageStore
from exportd.telemetry.metrics import Metrics
from exportd.telemetry.shared_metrics import SharedMetrics
from exportd.web.downloads.recording import FAILURE_REASONS
from exportd.web.edge.boundary import edge, set_common_headers
from exportd.web.edge.connection import Refusal
from exportd.web.edge.cors import allow_origin
from exportd.web.edge.lifecycle import Lifecycle
from exportd.web.openapi.pages import load_api_docs
from exportd.web.ops.metrics import count_answer, measured
from exportd.web.ops.probes import DatabaseProbe, Readiness
from exportd.web.pages.page import load_page
from exportd.web.routes import routes
from exportd.web.services import SERVICES, Services

log = structlog.get_logger()

_LABEL_VALUES: dict[str, Iterable[str]] = {
    "downloads_failed_total": FAILURE_REASONS,
    "sent_bytes_total": Method,
    "connections_refused_total": Refusal,
    "limits_hit_total": Limit,
}


def make_app(
    settings: Settings,
    dsn: str,
    memory: SharedMemory | None = None,
    shared_metrics: SharedMetrics | None = None,
) -> web.Application:
    """Returns the daemon's application. Its services exist from its start-up to its clean-up.

    Several processes pass the memory and the metrics that they share.
    """
    app = web.Application(middlewares=[edge])
    app.router.add_routes(routes(settings.server.base_path))
    app.on_response_prepare.extend([count_answer, set_common_headers, allow_origin])

    async def run_services(app: web.Application) -> AsyncIterator[None]:
        metrics = Metrics(_LABEL_VALUES, shared_metrics)
        async with _services(app, settings, dsn, memory or make_shared_memory(1), metrics) as app[SERVICES]:
            yield

    app.cleanup_ctx.append(run_services)
    return app


@contextlib.asynccontextmanager
async def _services(
    app: web.Application, settings: Settings, dsn: str, memory: SharedMemory, metrics: Metrics
) -> AsyncIterator[Services]:
    board = Board(memory)
    async with contextlib.AsyncExitStack() as stack:
        remote = None
        if settings.auth.jwks_url:
            remote = RemoteKeys(settings.auth.jwks_url, settings.auth.jwks_refresh_seconds)
        database = await connect(settings, dsn)
        stack.push_async_callback(database.close)
        storage = await open_storage(settings, database)
        ledger = await open_ledger(database, settings.data_dir / "ledger", metrics.events_flushed)
        stack.push_async_callback(ledger.close)
        fair_share = None
        if total_rate := settings.download.total_rate_bytes_per_second:
            fair_share = FairShare(total_rate, board)
        services = Services(
            settings=settings,
            lifecycle=Lifecycle(),
            metrics=metrics,
            limiter=Limiter(settings.limits, Rates(memory), board),
            tokens=make_tokens(settings.auth, settings.data_dir, remote),
            trusted_proxies=[ip_network(network) for network in settings.server.trusted_proxies],
            metrics_from=[ip_network(network) for network in settings.server.metrics_from],
            database=database,
            jobs=JobFinder(database),
            has_uuid_users=await has_uuid_users(database),
            suspects=SuspectPackages(database, storage),
            storage=storage,
            ledger=ledger,
            hub=JobHub(database, ledger),
            sender=Sender(settings.download, fair_share, metrics),
            readiness=Readiness(database, storage),
            database_probe=DatabaseProbe(database),
            page=load_page(settings.server.base_path),
            api_docs=load_api_docs(app.router),
        )
        await stack.enter_async_context(_cleanup_on_schedule(services))
        await stack.enter_async_context(measured(services))
        await stack.enter_async_context(_running(services.hub.run()))
        await stack.enter_async_context(_running(services.suspects.run()))
        if fair_share is not None:
            await stack.enter_async_context(_running(fair_share.run()))
        if remote is not None:
            await stack.enter_async_context(remote.kept_fresh())
        yield services


@contextlib.asynccontextmanager
async def _running(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Runs ``work`` in the background while the block runs."""
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@contextlib.asynccontextmanager
async def _cleanup_on_schedule(services: Services) -> AsyncIterator[None]:
    metrics, retention = services.metrics, services.settings.retention

    def count(done: CleanupSummary) -> None:
        metrics.cleanup_finished(
            done.packages_deleted, done.packages_failed, done.packages_waiting, done.bytes_freed
        )

    if (last := await last_cleanup(services.database)) is not None:
        metrics.cleanup_was_finished(last[1])
    cleanup = make_cleanup(services.settings, services.database, count)
    async with on_schedule(retention.cleanup_schedule, retention.timezone, cleanup.run_scheduled):
        yield


def make_cleanup(
    settings: Settings, database: Database, on_finished: Callable[[CleanupSummary], None] = lambda _: None
) -> Cleanup:
    """Returns the cleanup with the configured rules."""
    store = PackageStore(settings.storage_root)
    return Cleanup(
        database, store, settings.retention.resume_grace, settings.retention.event_days, on_finished
    )


async def connect(settings: Settings, dsn: str, *, min_connections: int = 1) -> Database:
    """Opens a pool with the configured sizes and time limits. Raises DatabaseUnavailable."""
    return await open_database(
        dsn,
        pool_min_size=settings.database.pool_min_size,
        pool_max_size=max(settings.database.pool_max_size, min_connections),
        connect_timeout_seconds=settings.database.connect_timeout_seconds,
        statement_timeout_seconds=settings.database.statement_timeout_seconds,
        direct_dsn=settings.database.read_direct_dsn(),
    )


async def open_storage(settings: Settings, database: Database) -> PackageStore:
    """Opens the package storage. Makes its root if it is missing, and removes temporary files of killed
    processes.

    Raises OSError and DatabaseUnavailable.
    """
    root = settings.storage_root
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if removed := remove_abandoned(root):
        log.info("abandoned_files_removed", count=removed)
    store = PackageStore(root)
    await claim_storage(database, store)
    return store

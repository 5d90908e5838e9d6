"""Wires the rooms together; the only file that knows them all."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from ipaddress import ip_network

import structlog
from aiohttp import web

from exportd.archive.pack import remove_abandoned
from exportd.auth.jwks import RemoteKeys
from exportd.auth.tokens import make_tokens
from exportd.counting.ledger import open_ledger
from exportd.db.expiry import last_cleanup
from exportd.db.jobs import JobFinder
from exportd.db.pool import Database, open_database
from exportd.delivery.fair_share import FairShare
from exportd.delivery.response import DeliveryOptions
from exportd.delivery.watch import Patience
from exportd.domain.delivery import Method
from exportd.jobs.cleanup import Cleanup, CleanupSummary, claim_storage, on_schedule
from exportd.limits.board import Board
from exportd.limits.memory import SharedMemory, make_shared_memory
from exportd.limits.rates import Rates
from exportd.settings import Settings
from exportd.storage.files import PackageStore
from exportd.telemetry.metrics import Metrics
from exportd.web.downloads.handler import (
    DELIVERY_OPTIONS,
    FAILURE_REASONS,
    JOBS,
    LEDGER,
    MAX_RANGES,
    RESUME_GRACE,
    STORE,
    download_package,
)
from exportd.web.downloads.links import LINK_OPTIONS, LinkOptions, make_download_link, revoke_download_links
from exportd.web.edge.access import DATABASE, TOKENS
from exportd.web.edge.boundary import ALLOWED_HOSTS, LIFECYCLE, METRICS, edge, expect, set_common_headers
from exportd.web.edge.connection import Refusal
from exportd.web.edge.cors import CORS_ORIGINS, allow_origin
from exportd.web.edge.lifecycle import Lifecycle
from exportd.web.edge.limits import LIMITER, PROXIES, Limit, Limiter, Limits, Proxies
from exportd.web.jobs.events import job_events, watch_jobs
from exportd.web.jobs.list import export_job_again, list_export_jobs, show_export_job
from exportd.web.jobs.statistics import download_statistics
from exportd.web.openapi.pages import API_DOCS, load_api_docs, show_api_docs, show_api_docs_asset
from exportd.web.ops.health import READINESS, Readiness, healthz, readyz
from exportd.web.ops.metrics import METRICS_FROM, count_answer, measure, metrics
from exportd.web.pages.page import PAGE_FILES, load_page, show_page, show_page_file

log = structlog.get_logger()


def make_app(settings: Settings, dsn: str, shared: SharedMemory | None = None) -> web.Application:
    """The daemon's application. Its database pool lives from the application's start-up to its clean-up.

    ``shared``: where several processes count together.
    """
    app = web.Application(middlewares=[edge])
    app[LIFECYCLE] = Lifecycle()
    app[ALLOWED_HOSTS] = frozenset(settings.server.allowed_hosts)
    app[PAGE_FILES] = load_page(settings.server.base_path)
    app[CORS_ORIGINS] = frozenset(settings.server.cors_origins)
    noted = app[METRICS] = Metrics(FAILURE_REASONS, Method, Refusal, Limit)
    auth = settings.auth
    remote = RemoteKeys(auth.jwks_url, auth.jwks_refresh_seconds) if auth.jwks_url else None
    app[TOKENS] = make_tokens(settings.auth, settings.data_dir, remote)
    shared = shared or make_shared_memory(1)
    board = Board(shared)
    total_rate = settings.download.total_rate_bytes_per_second
    fair_share = FairShare(total_rate, board) if total_rate else None
    limits = Limits(**settings.limits.model_dump(exclude={"connections_per_address"}))
    app[LIMITER] = Limiter(limits, Rates(shared), board, noted)
    app[METRICS_FROM] = [ip_network(network) for network in settings.server.metrics_from]
    trusted = [ip_network(network) for network in settings.server.trusted_proxies]
    app[PROXIES] = Proxies(trusted, settings.server.forwarded_field)
    app[LINK_OPTIONS] = LinkOptions(settings.links.start_seconds, settings.links.resume_seconds)
    app[RESUME_GRACE] = timedelta(hours=settings.retention.resume_grace_hours)
    app[MAX_RANGES] = settings.download.max_ranges
    app[DELIVERY_OPTIONS] = DeliveryOptions(
        sendfile=settings.download.sendfile,
        slice_bytes=settings.download.slice_bytes,
        chunk_size=settings.download.chunk_size,
        max_rate_bytes_per_second=settings.download.max_rate_bytes_per_second,
        fair_share=fair_share,
        patience=Patience(
            settings.download.stall_timeout_seconds,
            settings.download.least_rate_bytes_per_second,
            settings.download.least_rate_window_seconds,
        ),
        observer=noted,
    )

    async def provider_keys(_: web.Application) -> AsyncIterator[None]:
        assert remote is not None
        async with remote.kept_fresh():
            yield

    async def resources(app: web.Application) -> AsyncIterator[None]:
        async with contextlib.AsyncExitStack() as stack:
            database = app[DATABASE] = await connect(settings, dsn)
            stack.push_async_callback(database.close)
            store = app[STORE] = await open_storage(settings, database)
            app[READINESS] = Readiness(database, store)
            app[JOBS] = JobFinder(database)
            ledger = await open_ledger(database, settings.data_dir / "ledger", noted.events_flushed)
            stack.push_async_callback(ledger.close)
            app[LEDGER] = ledger
            if (last := await last_cleanup(database)) is not None:
                noted.cleanup_was_finished(last[1])
            cleanup = make_cleanup(settings, database, note_cleanup)
            retention = settings.retention
            await stack.enter_async_context(
                on_schedule(retention.cleanup_schedule, retention.timezone, cleanup.run_scheduled)
            )
            yield

    async def dividing(_: web.Application) -> AsyncIterator[None]:
        assert fair_share is not None
        task = asyncio.create_task(fair_share.run())
        yield
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    def note_cleanup(done: CleanupSummary) -> None:
        noted.cleanup_finished(
            done.packages_deleted, done.packages_failed, done.packages_waiting, done.bytes_freed
        )

    app.cleanup_ctx.extend([resources, measure, watch_jobs])
    if fair_share is not None:
        app.cleanup_ctx.append(dividing)
    if remote is not None:
        app.cleanup_ctx.append(provider_keys)
    app.on_response_prepare.append(count_answer)
    app.on_response_prepare.append(set_common_headers)
    app.on_response_prepare.append(allow_origin)
    # Metrics tell routes apart by their names. Any id at all, so that one that is no UUID is told so.
    get, post, delete = (
        functools.partial(verb, expect_handler=expect) for verb in (web.get, web.post, web.delete)
    )
    jobs = f"{settings.server.base_path}/export-jobs"
    job = f"{jobs}/{{job_id:[^/]+}}"
    app.router.add_routes(
        [
            get(jobs, list_export_jobs, name="jobs"),
            get(job, show_export_job, name="job"),
            get(f"{job}/events", job_events, name="events", allow_head=False),
            post(f"{job}/re-export", export_job_again, name="re_export"),
            get(f"{job}/download", download_package, name="download"),
            post(f"{job}/download-link", make_download_link, name="make_link"),
            delete(f"{job}/download-link", revoke_download_links, name="revoke_links", expect_handler=expect),
            get(f"{job}/download-stats", download_statistics, name="statistics"),
            get("/", show_page, name="page"),
            get("/page/{name:.+}", show_page_file, name="page_file"),
            get("/healthz", healthz, name="healthz"),
            get("/readyz", readyz, name="readyz"),
            get("/metrics", metrics, name="metrics"),
            get("/api-docs", show_api_docs, name="api_docs"),
            get("/api-docs/{name}", show_api_docs_asset, name="api_docs_asset"),
        ]
    )
    app[API_DOCS] = load_api_docs(app.router)
    return app


def make_cleanup(
    settings: Settings, database: Database, on_finished: Callable[[CleanupSummary], None] = lambda _: None
) -> Cleanup:
    """The cleanup by the configured rules."""
    grace = timedelta(hours=settings.retention.resume_grace_hours)
    store = PackageStore(settings.storage_root)
    return Cleanup(database, store, grace, settings.retention.event_days, on_finished)


async def connect(settings: Settings, dsn: str, *, least_connections: int = 1) -> Database:
    """A pool with the configured sizes and time limits. Raises DatabaseUnavailable."""
    return await open_database(
        dsn,
        pool_min_size=settings.database.pool_min_size,
        pool_max_size=max(settings.database.pool_max_size, least_connections),
        connect_timeout_seconds=settings.database.connect_timeout_seconds,
        statement_timeout_seconds=settings.database.statement_timeout_seconds,
    )


async def open_storage(settings: Settings, database: Database) -> PackageStore:
    """The package storage, made where it is not there yet, without what killed processes left in it.

    Raises OSError and DatabaseUnavailable.
    """
    root = settings.storage_root
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    if removed := remove_abandoned(root):
        log.info("abandoned_files_removed", count=removed)
    store = PackageStore(root)
    await claim_storage(database, store)
    return store

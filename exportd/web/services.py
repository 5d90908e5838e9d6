"""Everything that handlers use, in one object under one key of the application."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aiohttp import web

if TYPE_CHECKING:
    from exportd.auth.tokens import Tokens
    from exportd.counting.ledger import DownloadLedger
    from exportd.db.jobs import JobFinder
    from exportd.db.pool import Database
    from exportd.delivery.response import Sender
    from exportd.http.forwarded import Network
    from exportd.jobs.hub import JobHub
    from exportd.jobs.verify import SuspectPackages
    from exportd.limits.limiter import Limiter
    from exportd.settings import Settings
    from exportd.storage.files import PackageStore
    from exportd.telemetry.metrics import Metrics
    from exportd.web.edge.lifecycle import Lifecycle
    from exportd.web.ops.probes import DatabaseProbe, Readiness
    from exportd.web.pages.assets import Assets


@dataclass(frozen=True, slots=True)
class Services:
    """Built at the application's start-up; see ``app.py``."""

    settings: Settings
    lifecycle: Lifecycle
    metrics: Metrics
    limiter: Limiter
    tokens: Tokens
    trusted_proxies: Collection[Network]
    metrics_from: Collection[Network]
    database: Database
    jobs: JobFinder
    has_uuid_users: bool
    suspects: SuspectPackages
    storage: PackageStore
    ledger: DownloadLedger
    hub: JobHub
    sender: Sender
    readiness: Readiness
    database_probe: DatabaseProbe
    page: Assets
    api_docs: Assets


SERVICES = web.AppKey("services", Services)

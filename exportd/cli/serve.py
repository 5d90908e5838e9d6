"""`exportd serve` and `exportd packer`: the long-running commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exportd.cli.common import config_option, connected, log_to_stdout, migrated_database

if TYPE_CHECKING:
    import uuid

    from aiohttp import web

    from exportd.process.companion import Companion
    from exportd.process.runner import MakeApp
    from exportd.settings import Key, Settings
    from exportd.telemetry.shared_metrics import SharedMetrics


@click.command()
@config_option
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on; 0 uses any free one.")
@click.option("--workers", type=int, help="Number of processes that serve.")
def serve(config_file: Path | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Runs the daemon. Logs go to stdout, one JSON object per line.

    SIGTERM drains, a second one aborts. SIGHUP reopens the download log. With several workers it replaces
    them, and the new ones read the configuration again, except for the listening address and the database.
    """
    import structlog

    from exportd.app import make_app
    from exportd.auth.tokens import make_tokens
    from exportd.limits.memory import make_shared_memory
    from exportd.settings import SettingsError, load_settings

    log = structlog.get_logger()
    given: dict[Key, object] = {
        ("server", "host"): host,
        ("server", "port"): port,
        ("server", "workers"): workers,
    }
    options = {key: value for key, value in given.items() if value is not None}
    settings = load_settings(config_file, os.environ, options)
    make_tokens(settings.auth, settings.data_dir)  # unusable keys are reported before the daemon starts
    log_to_stdout(settings)

    def present_settings() -> Settings:
        try:
            return load_settings(config_file, os.environ, options)
        except SettingsError as error:
            log.error("settings_not_reloaded", problems=error.problems)
            return settings

    # Made before processes are forked, because they share it.
    memory = make_shared_memory(settings.server.workers)
    with migrated_database(settings) as dsn:
        if not settings.database.is_embedded:
            _check_table(dsn)

        def make(shared_metrics: SharedMetrics | None) -> web.Application:
            return make_app(present_settings(), dsn, memory, shared_metrics)

        companion = packer_beside(config_file, os.environ) if settings.packer.enabled else None
        status = run_server(settings, make, companion=companion)
    sys.exit(status)


def _check_table(dsn: str) -> None:
    """Raises MigrationError if exportd cannot use an application's table. Does not check it while no server
    accepts writes."""
    import structlog

    from exportd.db.blocking import DatabaseNotReachable
    from exportd.db.migrate import check_table

    log = structlog.get_logger()
    try:
        check_table(dsn, is_migrating=False)
    except DatabaseNotReachable as error:
        log.warning("table_not_checked", error=str(error))


@click.command()
@config_option
@click.option("--attended", is_flag=True, hidden=True)
def packer(config_file: Path | None, attended: bool) -> None:
    """Packs waiting jobs until SIGTERM, and then gives back the current one.

    `exportd serve` runs a packer if [packer] enabled is true. This command is for other machines. Logs go to
    stdout.
    """
    from exportd.jobs.packer import packer_identity
    from exportd.process.runner import run_until_stopped
    from exportd.settings import load_settings

    settings = load_settings(config_file, os.environ)
    log_to_stdout(settings)
    with migrated_database(settings) as dsn, packer_identity(settings.data_dir) as packer_id:
        run_until_stopped(_pack(settings, dsn, packer_id), ends_with_stdin=attended)


async def _pack(settings: Settings, dsn: str, packer_id: uuid.UUID) -> None:
    from exportd.app import open_storage
    from exportd.jobs.packer import Packer

    # One connection listens, one records progress, one completes the job.
    async with connected(settings, dsn, min_connections=3) as database:
        await open_storage(settings, database)
        await Packer(
            database,
            packer_id,
            settings.storage_root,
            settings.packer.source_roots,
            max_attempts=settings.packer.max_attempts,
            poll_seconds=settings.packer.poll_seconds,
        ).run()


def packer_beside(config_file: Path | None, environ: Mapping[str, str]) -> Companion:
    """Returns a packer that runs beside the daemon, with its settings except ``[auth]``."""
    from exportd.process.companion import Companion
    from exportd.settings import child_environment

    config = ("--config", str(config_file)) if config_file else ()
    return Companion(
        (sys.executable, "-m", "exportd", "packer", "--attended", *config),
        child_environment(environ, keep_settings=True),
    )


def run_server(
    settings: Settings,
    make_app: MakeApp,
    on_started: Callable[[str], None] = lambda _: None,
    companion: Companion | None = None,
) -> int:
    """Serves as configured until a signal. Returns the exit status. See ``process.runner.serve``."""
    import structlog

    from exportd.process import runner as server
    from exportd.telemetry.logging import reopen_logs

    log = structlog.get_logger()
    section = settings.server
    if not (_is_loopback(section.host) or section.tls_cert or section.trusted_proxies):
        log.warning(
            "tokens_travel_unencrypted",
            host=section.host,
            advice="set [server] tls_cert and tls_key, or trusted_proxies to the proxy that does TLS",
        )
    return server.serve(make_app, section, on_hangup=reopen_logs, on_started=on_started, companion=companion)


def _is_loopback(host: str) -> bool:
    from ipaddress import ip_address

    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"

"""Shared by the commands: options, settings, logging, and the database."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

if TYPE_CHECKING:
    from exportd.db.pool import Database
    from exportd.settings import Settings

T = TypeVar("T")

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Configuration file. Default: $EXPORTD_CONFIG, then ./config.toml if it exists.",
)


def fail(*problems: str, status: int = 1) -> NoReturn:
    """Ends the process with one line on stderr for each problem, after the pending log lines."""
    from exportd.telemetry.logging import stop_logging

    stop_logging()
    for problem in problems:
        click.echo(f"exportd: {problem}", err=True)
    raise SystemExit(status)


@contextlib.asynccontextmanager
async def connected(settings: Settings, dsn: str, *, min_connections: int = 1) -> AsyncIterator[Database]:
    """Opens a pool while the block runs. Raises DatabaseUnavailable."""
    from exportd.app import connect

    database = await connect(settings, dsn, min_connections=min_connections)
    try:
        yield database
    finally:
        await database.close()


def run(work: Coroutine[Any, Any, T]) -> T:
    """Runs ``work`` in a new event loop and returns its result."""
    import asyncio

    return asyncio.run(work)


def log_to_stdout(settings: Settings) -> None:
    """Configures logging. Raises SettingsError."""
    from exportd.settings import SettingsError
    from exportd.telemetry.logging import configure_logging

    try:
        configure_logging(
            settings.logging.level, settings.logging.format, sys.stdout, settings.logging.download_log
        )
    except OSError as error:
        raise SettingsError([f"logging.download_log: cannot be opened: {error.strerror}"]) from error


def quiet_settings(config_file: Path | None) -> Settings:
    """Returns settings for commands that print a result. They log only warnings, to stderr."""
    from exportd.settings import load_settings
    from exportd.telemetry.logging import configure_logging

    settings = load_settings(config_file, os.environ)
    configure_logging("warning", "console", sys.stderr)
    return settings


@contextlib.contextmanager
def migrated_database(settings: Settings) -> Iterator[str]:
    """Yields the libpq connection string of the database when it is available and migrated.

    Migrates the embedded database. Only `exportd migrate up` migrates an external one, which belongs to an
    application. Raises OperatorError.
    """
    from exportd.db.migrate import MigrationError, check_not_replaced, migrate_up, migration_status

    with running_database(settings) as dsn:
        if settings.database.is_embedded:
            migrate_up(dsn)
        elif not all(migration.is_applied for migration in migration_status(dsn)):
            raise MigrationError("the database's schema is not up to date: run `exportd migrate up`")
        else:
            check_not_replaced(dsn)
        yield dsn


@contextlib.contextmanager
def running_database(settings: Settings, *, is_direct: bool = False) -> Iterator[str]:
    """Yields the libpq connection string of the database when it is available. ``is_direct``: that past a
    pooler. Raises OperatorError."""
    dsn = settings.database.read_dsn()
    if dsn is None:
        from exportd.db.embedded import embedded_server

        with embedded_server(settings.data_dir) as embedded_dsn:
            yield embedded_dsn
    else:
        import structlog

        from exportd.db.blocking import wait_for_database
        from exportd.db.dsn import check_dsn

        if (direct_dsn := settings.database.read_direct_dsn()) is not None:
            check_dsn(direct_dsn, "database.direct_dsn")
            dsn = direct_dsn if is_direct else dsn
        log = structlog.get_logger()
        wait_for_database(
            dsn,
            settings.database.startup_timeout_seconds,
            lambda reason: log.warning("database_waiting", error=reason),
        )
        yield dsn

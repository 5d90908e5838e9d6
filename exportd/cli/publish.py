"""`exportd publish`: packs a folder, or takes a ready package, and records a completed job."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exportd.cli.common import config_option, connected, migrated_database, quiet_settings, run

if TYPE_CHECKING:
    import uuid
    from datetime import datetime

    from exportd.archive.pack import DraftPackage, Progress
    from exportd.archive.source import Source
    from exportd.jobs.publish import Publication
    from exportd.settings import Settings


@click.command()
@config_option
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--user", "user_id", required=True, help="The creator of the package.")
@click.option("--tool", "tool_name", required=True, help="The exported tool; part of the file name.")
@click.option("--retention-days", type=click.IntRange(1, 36500), help="Days until the package expires.")
def publish(
    config_file: Path | None, path: Path, user_id: str, tool_name: str, retention_days: int | None
) -> None:
    """Packs the folder PATH, or takes the ready .tar.gz PATH, and records a completed job.

    The last line of stdout is one JSON object: jobId, packagePath, packageSizeBytes, sha256, expiresAt.
    """
    import orjson

    from exportd.archive.source import open_source
    from exportd.jobs.publish import Publication

    settings = quiet_settings(config_file)
    if not user_id.strip() or "\0" in user_id + tool_name:
        raise click.UsageError("--user must not be empty, and NUL is allowed nowhere.")
    with open_source(path) as source:
        total = source.measure()
        with migrated_database(settings) as dsn, _progress_bar(total) as progress:
            publication = Publication(user_id, tool_name, retention_days or settings.retention.days)
            result = publish_package(settings, dsn, source, publication, progress)
    click.echo(orjson.dumps(result).decode())


def publish_package(
    settings: Settings, dsn: str, source: Source, publication: Publication, progress: Progress
) -> dict[str, Any]:
    """Packs ``source``, places the package and records its job. Returns what the command prints.

    Raises OperatorError.
    """
    import uuid

    from exportd.archive.pack import draft_package

    job_id = uuid.uuid4()
    run(_open_storage(settings, dsn))
    with _signals_deferred() as handle_signals:

        def report(count: int) -> None:
            handle_signals()
            progress(count)

        with draft_package(source, settings.storage_root, job_id, report) as draft:
            expires_at = run(_place(settings, dsn, draft, job_id, publication))
            return {
                "jobId": job_id,
                "packagePath": draft.path,
                "packageSizeBytes": draft.size_bytes,
                "sha256": draft.sha256,
                "expiresAt": expires_at,
            }


async def _open_storage(settings: Settings, dsn: str) -> None:
    from exportd.app import open_storage

    async with connected(settings, dsn) as database:
        await open_storage(settings, database)


async def _place(
    settings: Settings, dsn: str, draft: DraftPackage, job_id: uuid.UUID, publication: Publication
) -> datetime:
    from exportd.jobs.publish import place_and_record

    async with connected(settings, dsn) as database:
        return await place_and_record(database, draft, job_id, publication)


@contextlib.contextmanager
def _signals_deferred() -> Iterator[Callable[[], None]]:
    """Defers SIGINT and SIGTERM while the block runs. They would raise anywhere: between a package and its
    row, or in a compressor's threads, which then wait for each other for ever.

    Yields a function that handles a pending signal. Otherwise it is handled when the block ends.
    """
    came: list[int] = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # Ignored signals stay ignored.
        if callable(handler := signal.getsignal(number)):
            handlers[number] = handler
            signal.signal(number, lambda number, _: came.append(number))

    def handle() -> None:
        if came:
            number = signal.Signals(came.pop())
            handlers[number](number, None)

    try:
        yield handle
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        handle()


@contextlib.contextmanager
def _progress_bar(total: int) -> Iterator[Progress]:
    """Shows a bar on stderr if that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=total, label="Packing", file=sys.stderr) as bar:
        yield bar.update

"""`exportd demo`: a daemon with a sample package to try."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exportd.cli.common import config_option, connected, log_to_stdout, migrated_database, run
from exportd.cli.publish import publish_package
from exportd.cli.serve import packer_beside, run_server

if TYPE_CHECKING:
    from exportd.settings import Settings

_SAMPLE_FILES = 24
_SAMPLE_FILE_BYTES = 512 * 1024
# Short, because the browser's history keeps the address with the token.
_TOKEN_SECONDS = 3600


@click.command()
@config_option
def demo(config_file: Path | None) -> None:
    """Packs a sample, starts the daemon and a packer with a job, and prints what to try."""
    import orjson

    from exportd.app import make_app
    from exportd.archive.source import open_source
    from exportd.jobs.publish import Publication
    from exportd.settings import load_settings

    exports = load_settings(config_file, os.environ).data_dir / "demo-exports"
    # In the environment, because the packer's process reads it too.
    environ = {
        **os.environ,
        "EXPORTD_PACKER__ENABLED": "true",
        "EXPORTD_PACKER__SOURCE_ROOTS": orjson.dumps([str(exports)]).decode(),
    }
    settings = load_settings(config_file, environ)
    log_to_stdout(settings)
    publication = Publication("alice", "Sample Export", settings.retention.days)
    with migrated_database(settings) as dsn:
        sample = _write_sample(exports / "sample-export")
        with open_source(sample) as source:
            published = publish_package(settings, dsn, source, publication, lambda _: None)
        run(_request_sample(settings, dsn, sample))
        run_server(
            settings,
            lambda _: make_app(settings, dsn),
            lambda url: _print_demo(settings, published, url),
            packer_beside(config_file, environ),
        )


async def _request_sample(settings: Settings, dsn: str, sample: Path) -> None:
    import uuid

    from exportd.db.packing import request_package

    async with connected(settings, dsn) as database:
        await request_package(
            database,
            job_id=uuid.uuid4(),
            user_id="alice",
            tool_name="Packed By The Daemon",
            source=str(sample),
            retention_days=settings.retention.days,
        )


def _print_demo(settings: Settings, published: dict[str, Any], url: str) -> None:
    from exportd.auth.tokens import make_tokens

    bearer = make_tokens(settings.auth, settings.data_dir).sign("alice", None, _TOKEN_SECONDS)
    address = f"{url}{settings.server.base_path}/export-jobs/{published['jobId']}"
    click.echo(
        "\n"
        f"exportd serves a sample package ({published['packageSizeBytes']} bytes, "
        f"sha256 {published['sha256']}).\n\n"
        "See it in a browser, as alice (the token is good for an hour):\n\n"
        f"  {url}/#token={bearer}\n\n"
        "Download it, from another terminal:\n\n"
        f"  curl -OJ -H 'Authorization: Bearer {bearer}' {address}/download\n\n"
        "How often it was downloaded:\n\n"
        f"  curl -H 'Authorization: Bearer {bearer}' {address}/download-stats\n\n"
        "Ctrl-C stops the daemon.\n"
    )


def _write_sample(folder: Path) -> Path:
    import secrets

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.txt").write_text("A sample export, made by `exportd demo`.\n", encoding="utf-8")
    for number in range(_SAMPLE_FILES):
        (folder / f"part-{number:02}.bin").write_bytes(secrets.token_bytes(_SAMPLE_FILE_BYTES))
    return folder

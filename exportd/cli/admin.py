"""Commands for the operator: tokens, statistics, cleanup, verification, migrations."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from exportd.cli.common import (
    config_option,
    connected,
    migrated_database,
    quiet_settings,
    run,
    running_database,
)

if TYPE_CHECKING:
    import uuid

    from exportd.domain.statistics import DownloadStatistics
    from exportd.jobs.cleanup import CleanupSummary, Orphans
    from exportd.jobs.verify import Verification
    from exportd.settings import Settings


@click.command()
@config_option
@click.option("--user", "user_id", required=True, help="The user id in the token.")
@click.option("--role", help='The role in the token, such as "admin".')
@click.option(
    "--ttl", type=click.IntRange(1, 10 * 365 * 86400), default=3600, help="Its lifetime in seconds."
)
def token(config_file: Path | None, user_id: str, role: str | None, ttl: int) -> None:
    """Signs a token with the configured secret, for tests."""
    from exportd.auth.tokens import make_tokens
    from exportd.settings import load_settings

    settings = load_settings(config_file, os.environ)
    click.echo(make_tokens(settings.auth, settings.data_dir).sign(user_id, role, ttl))


@click.command()
@config_option
@click.argument("job_id", type=click.UUID, required=False)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object in place of a table.")
def stats(config_file: Path | None, job_id: uuid.UUID | None, as_json: bool) -> None:
    """Prints download statistics of the job JOB_ID, or of all jobs."""
    import orjson

    from exportd.web.jobs.statistics import describe_statistics

    settings = quiet_settings(config_file)
    with migrated_database(settings) as dsn:
        statistics = run(_find_statistics(settings, dsn, job_id))
    if statistics is None:
        raise click.UsageError(f"there is no job {job_id}")
    if as_json:
        click.echo(orjson.dumps(describe_statistics(statistics)).decode())
    else:
        click.echo(_statistics_table(statistics))


async def _find_statistics(
    settings: Settings, dsn: str, job_id: uuid.UUID | None
) -> DownloadStatistics | None:
    from exportd.db.statistics import find_statistics
    from exportd.domain.sizes import LOWER_BOUNDS

    async with connected(settings, dsn) as database:
        return await find_statistics(database, job_id, LOWER_BOUNDS)


def _statistics_table(statistics: DownloadStatistics) -> str:
    from exportd.domain.sizes import SIZE_RANGES, format_size

    last = statistics.last_downloaded_at
    lines = [
        f"downloads      {statistics.download_count}",
        f"last           {last.isoformat(timespec='seconds') if last else 'never'}",
        f"bytes served   {statistics.bytes_served} ({format_size(statistics.bytes_served)})",
        f"unique users   {statistics.unique_users}",
    ]
    if statistics.sizes:
        lines += ["", f"{'package size':<16}{'downloads':>10}{'average s':>12}{'average/s':>12}"]
    lines += [
        f"{SIZE_RANGES[item.range_number]:<16}{item.downloads:>10}{item.average_duration_seconds:>12.3f}"
        f"{format_size(round(item.average_bytes_per_second)):>12}"
        for item in statistics.sizes
    ]
    if statistics.failures:
        lines += ["", f"{'not completed':<44}{'deliveries':>12}"]
    lines += [
        f"{': '.join(filter(None, (item.outcome, item.reason))):<44}{item.count:>12}"
        for item in statistics.failures
    ]
    if statistics.recent:
        lines += ["", f"{'started':<27}{'user':<20}{'status':>6}  {'outcome':<12}{'received':>12}"]
    lines += [
        f"{item.started_at.isoformat(timespec='seconds'):<27}{item.user_id[:19]:<20}{item.http_status:>6}"
        f"  {item.outcome:<12}{format_size(item.bytes_acknowledged):>12}"
        for item in statistics.recent
    ]
    return "\n".join(lines)


@click.command()
@config_option
@click.option("--dry-run", is_flag=True, help="Report what would be deleted, without deleting it.")
@click.option("--orphans", is_flag=True, help="Delete files that no job points to; requires --older-than.")
@click.option(
    "--older-than", "days", type=click.FloatRange(min=1), help="Days since their last modification."
)
def cleanup(config_file: Path | None, dry_run: bool, orphans: bool, days: float | None) -> None:
    """Deletes expired packages and old download events now, or finds files that no job points to.

    Prints one JSON object. The exit status is 1 if a package could not be deleted.
    """
    import orjson

    if orphans and days is None:
        raise click.UsageError("--orphans needs --older-than DAYS.")
    settings = quiet_settings(config_file)
    with migrated_database(settings) as dsn:
        summary, found = run(_clean_up(settings, dsn, dry_run, orphans, days or 1))
    printed = {_camel_case(name): value for name, value in asdict(summary).items()}
    click.echo(orjson.dumps({"dryRun": dry_run, **printed, "orphans": asdict(found)}).decode())
    sys.exit(1 if summary.packages_failed or (orphans and not dry_run and found.removed < found.count) else 0)


async def _clean_up(
    settings: Settings, dsn: str, dry_run: bool, remove_orphans: bool, days: float
) -> tuple[CleanupSummary, Orphans]:
    from exportd.app import make_cleanup
    from exportd.jobs.cleanup import find_orphans

    async with connected(settings, dsn) as database:
        cleaner = make_cleanup(settings, database)
        summary = await (cleaner.look() if dry_run else cleaner.run())
        assert summary is not None
        remove = remove_orphans and not dry_run
        return summary, await find_orphans(database, cleaner.store, days, remove=remove)


def _camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


@click.command()
@config_option
@click.argument("job_id", type=click.UUID, required=False)
@click.option("--all", "every", is_flag=True, help="Verify every package.")
def verify(config_file: Path | None, job_id: uuid.UUID | None, every: bool) -> None:
    """Reads the package of JOB_ID, or all packages, and compares their SHA-256 with the recorded one.

    A damaged package is no longer served. A sound one is served again. Runs at idle priority. Prints one JSON
    object. The exit status is 1 if a package is damaged, missing or unreadable.
    """
    import orjson

    from exportd.jobs.verify import become_idle

    if (job_id is None) == (not every):
        raise click.UsageError("name a JOB_ID, or --all.")
    settings = quiet_settings(config_file)
    with migrated_database(settings) as dsn:
        become_idle()  # not earlier: the embedded database would inherit it
        found = run(_verify(settings, dsn, job_id))
    if job_id is not None and not sum(asdict(found).values()):
        raise click.UsageError(f"there is no job {job_id} with a package")
    click.echo(orjson.dumps({_camel_case(name): value for name, value in asdict(found).items()}).decode())
    sys.exit(1 if found.damaged or found.missing or found.unreadable else 0)


async def _verify(settings: Settings, dsn: str, job_id: uuid.UUID | None) -> Verification:
    from exportd.jobs.verify import verify_packages
    from exportd.storage.files import PackageStore

    async with connected(settings, dsn) as database:
        return await verify_packages(database, PackageStore(settings.storage_root), job_id)


@click.group()
def migrate() -> None:
    """Migrates the database's schema."""


@migrate.command("up")
@config_option
def migrate_up_command(config_file: Path | None) -> None:
    """Applies every pending migration. Keeps existing tables and columns."""
    from exportd.db.migrate import migrate_up

    with running_database(quiet_settings(config_file), is_direct=True) as dsn:
        applied = migrate_up(dsn)
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("nothing to apply")


@migrate.command("check")
@config_option
def migrate_check_command(config_file: Path | None) -> None:
    """Checks whether exportd can use your table export_jobs. Changes nothing."""
    from exportd.db.migrate import check_table, migration_status

    with running_database(quiet_settings(config_file), is_direct=True) as dsn:
        is_migrating = not all(migration.is_applied for migration in migration_status(dsn))
        check_table(dsn, is_migrating=is_migrating)
    click.echo("exportd can use the table export_jobs")


@migrate.command("down")
@config_option
def migrate_down_command(config_file: Path | None) -> None:
    """Takes back the newest migration. Never removes a job, but may remove counts and history."""
    from exportd.db.migrate import migrate_down

    with running_database(quiet_settings(config_file), is_direct=True) as dsn:
        name = migrate_down(dsn)
    click.echo(f"took back {name}" if name else "nothing to take back")


@migrate.command("status")
@config_option
def migrate_status_command(config_file: Path | None) -> None:
    """Lists the migrations, applied and pending."""
    from exportd.db.migrate import migration_status

    with running_database(quiet_settings(config_file), is_direct=True) as dsn:
        for migration in migration_status(dsn):
            click.echo(f"{'applied' if migration.is_applied else 'pending'}  {migration.name}")

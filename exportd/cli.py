"""The commands: thin, each a few lines over the rooms below.

Every failure is one clear line on stderr and a non-zero exit status, never a traceback.
"""

import asyncio
import contextlib
import os
import secrets
import signal
import sys
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import click
import orjson
import structlog

from exportd import __version__
from exportd.api.connection import ConnectionLimits
from exportd.api.statistics import describe_statistics
from exportd.app import connect, make_app, make_cleanup, make_tokens, open_storage
from exportd.auth.keys import UnusableKey
from exportd.auth.tokens import CannotSign
from exportd.db.embedded import EmbeddedServerError, embedded_server
from exportd.db.jobs import record_completed_job
from exportd.db.migrate import (
    MigrationError,
    migrate_down,
    migrate_up,
    migration_status,
    wait_for_database,
)
from exportd.db.packing import request_package
from exportd.db.pool import DatabaseRefused, DatabaseUnavailable
from exportd.db.rows import DownloadStatistics
from exportd.db.statistics import find_statistics
from exportd.http.sizes import LOWER_BOUNDS, SIZE_RANGES, format_size
from exportd.limits.memory import make_shared_memory
from exportd.packages.cleanup import (
    CleanupRefused,
    CleanupSummary,
    Orphans,
    find_orphans,
)
from exportd.packages.pack import DraftPackage, PackError, Progress, draft_package, measure_source
from exportd.packages.packer import Packer, packer_identity
from exportd.packages.store import PackageStore
from exportd.packages.verify import Verification, become_idle, verify_packages
from exportd.server import Listener, MakeApp, ServerError, run_until_stopped, serve
from exportd.settings import Key, Settings, SettingsError, load_settings
from exportd.telemetry.logging import configure_logging, reopen_logs, stop_logging

log = structlog.get_logger()

_FAILURES = (
    SettingsError,
    EmbeddedServerError,
    MigrationError,
    DatabaseUnavailable,
    DatabaseRefused,
    PackError,
    ServerError,
    UnusableKey,
    CannotSign,
    CleanupRefused,
    OSError,
)
_SAMPLE_FILES = 24
_SAMPLE_FILE_BYTES = 512 * 1024

config_option = click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Configuration file. Default: $EXPORTD_CONFIG, then ./config.toml where there is one.",
)


def main() -> None:
    """The console script."""
    signal.signal(signal.SIGTERM, _exit_on_signal)
    try:
        cli.main(prog_name="exportd", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except click.Abort:
        _fail("interrupted", status=130)
    except _FAILURES as error:
        _fail(*(error.problems if isinstance(error, SettingsError) else [str(error)]))


def _exit_on_signal(number: int, _frame: object) -> NoReturn:
    raise SystemExit(128 + number)


def _fail(*problems: str, status: int = 1) -> NoReturn:
    stop_logging()
    for problem in problems:
        click.echo(f"exportd: {problem}", err=True)
    sys.exit(status)


@click.group()
@click.version_option(__version__, prog_name="exportd")
def cli() -> None:
    """Hands finished export packages to the people allowed to have them."""


@cli.command("serve")
@config_option
@click.option("--host", help="Address to listen on.")
@click.option("--port", type=int, help="Port to listen on; 0 takes any free one.")
@click.option("--workers", type=int, help="Processes that serve; more than one run under gunicorn.")
def serve_command(config_file: Path | None, host: str | None, port: int | None, workers: int | None) -> None:
    """Runs the daemon. Logs go to stdout, one JSON object a line.

    SIGTERM drains, a second one aborts. SIGHUP opens the download log anew; with several workers it replaces
    them, and the new ones read the configuration anew, except where to listen and which database.
    """
    given: dict[Key, object] = {
        ("server", "host"): host,
        ("server", "port"): port,
        ("server", "workers"): workers,
    }
    options = {key: value for key, value in given.items() if value is not None}
    settings = load_settings(config_file, os.environ, options)
    make_tokens(settings)  # keys that cannot be used are told before anything starts
    _log_to_stdout(settings)

    def present_settings() -> Settings:
        try:
            return load_settings(config_file, os.environ, options)
        except SettingsError as error:
            log.error("settings_not_reloaded", problems=error.problems)
            return settings

    # Before processes are forked: they count together.
    shared = make_shared_memory(settings.server.workers)
    with _database(settings) as dsn:
        companion = _packer_command(config_file) if settings.packer.enabled else ()
        status = _serve(settings, lambda: make_app(present_settings(), dsn, shared), companion=companion)
    sys.exit(status)


@cli.command()
@config_option
@click.option("--attended", is_flag=True, hidden=True)
def packer(config_file: Path | None, attended: bool) -> None:
    """Makes packages of jobs that wait, until SIGTERM, which gives back the one it is at.

    `exportd serve` runs one by itself where [packer] enabled is true; this is for other machines. Logs go to
    stdout.
    """
    settings = load_settings(config_file, os.environ)
    _log_to_stdout(settings)
    with _database(settings) as dsn, packer_identity(settings.data_dir) as packer_id:
        run_until_stopped(_pack(settings, dsn, packer_id), ends_with_stdin=attended)


async def _pack(settings: Settings, dsn: str, packer_id: uuid.UUID) -> None:
    # One listens, one writes how far it is, one completes.
    database = await connect(settings, dsn, least_connections=3)
    try:
        await open_storage(settings, database)
        await Packer(
            database,
            packer_id,
            settings.storage_root,
            settings.packer.source_roots,
            max_attempts=settings.packer.max_attempts,
            poll_seconds=settings.packer.poll_seconds,
        ).run()
    finally:
        await database.close()


@cli.command()
@config_option
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--user", "user_id", required=True, help="The user the package belongs to.")
@click.option("--tool", "tool_name", required=True, help="What was exported; goes into the file's name.")
@click.option("--retention-days", type=click.IntRange(1, 36500), help="How long the package is kept.")
def publish(
    config_file: Path | None, path: Path, user_id: str, tool_name: str, retention_days: int | None
) -> None:
    """Packs the folder PATH, or takes the ready .tar.gz PATH, and records a completed job.

    The last line of stdout is one JSON object: jobId, packagePath, packageSizeBytes, sha256, expiresAt.
    """
    settings = _quiet_settings(config_file)
    if not user_id.strip() or "\0" in user_id + tool_name:
        raise click.UsageError("--user must not be empty, and NUL is allowed nowhere.")
    total = measure_source(path)
    with _database(settings) as dsn, _progress_bar(total) as progress:
        result = _publish(settings, dsn, path, user_id, tool_name, retention_days, progress)
    click.echo(orjson.dumps(result).decode())


@cli.command()
@config_option
@click.option("--user", "user_id", required=True, help="The user the token stands for.")
@click.option("--role", help='The role it carries, such as "admin".')
@click.option("--ttl", type=click.IntRange(1, 10 * 365 * 86400), default=3600, help="Seconds it is valid.")
def token(config_file: Path | None, user_id: str, role: str | None, ttl: int) -> None:
    """Signs a token with the configured secret, for trying things out."""
    click.echo(make_tokens(_quiet_settings(config_file)).sign(user_id, role, ttl))


@cli.command()
@config_option
@click.argument("job_id", type=click.UUID, required=False)
@click.option("--json", "as_json", is_flag=True, help="One JSON object in place of a table.")
def stats(config_file: Path | None, job_id: uuid.UUID | None, as_json: bool) -> None:
    """Download statistics of the job JOB_ID, or of all."""
    settings = _quiet_settings(config_file)
    with _database(settings) as dsn:
        statistics = asyncio.run(_find_statistics(settings, dsn, job_id))
    if statistics is None:
        raise click.UsageError(f"there is no job {job_id}")
    if as_json:
        click.echo(orjson.dumps(describe_statistics(statistics)).decode())
    else:
        click.echo(_statistics_table(statistics))


async def _find_statistics(
    settings: Settings, dsn: str, job_id: uuid.UUID | None
) -> DownloadStatistics | None:
    database = await connect(settings, dsn)
    try:
        return await find_statistics(database, job_id, LOWER_BOUNDS)
    finally:
        await database.close()


def _statistics_table(statistics: DownloadStatistics) -> str:
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


@cli.command()
@config_option
@click.option("--dry-run", is_flag=True, help="Tells what would be deleted, and deletes nothing.")
@click.option("--orphans", is_flag=True, help="Removes files that no job points to; needs --older-than.")
@click.option("--older-than", "days", type=click.FloatRange(min=1), help="Days nobody has touched them.")
def cleanup(config_file: Path | None, dry_run: bool, orphans: bool, days: float | None) -> None:
    """Deletes expired packages and old download events now, and looks for files that no job points to.

    Prints one JSON object. The exit status is 1 where a package could not be deleted.
    """
    if orphans and days is None:
        raise click.UsageError("--orphans needs --older-than DAYS.")
    settings = _quiet_settings(config_file)
    with _database(settings) as dsn:
        summary, found = asyncio.run(_clean_up(settings, dsn, dry_run, orphans, days or 1))
    printed = {_camel_case(name): value for name, value in asdict(summary).items()}
    click.echo(orjson.dumps({"dryRun": dry_run, **printed, "orphans": asdict(found)}).decode())
    sys.exit(1 if summary.packages_failed or (orphans and not dry_run and found.removed < found.count) else 0)


async def _clean_up(
    settings: Settings, dsn: str, dry_run: bool, remove_orphans: bool, days: float
) -> tuple[CleanupSummary, Orphans]:
    database = await connect(settings, dsn)
    try:
        cleaner = make_cleanup(settings, database)
        summary = await (cleaner.look() if dry_run else cleaner.run())
        assert summary is not None
        remove = remove_orphans and not dry_run
        return summary, await find_orphans(database, cleaner.store, days, remove=remove)
    finally:
        await database.close()


def _camel_case(name: str) -> str:
    first, *others = name.split("_")
    return first + "".join(map(str.capitalize, others))


@cli.command()
@config_option
@click.argument("job_id", type=click.UUID, required=False)
@click.option("--all", "every", is_flag=True, help="Every package there is.")
def verify(config_file: Path | None, job_id: uuid.UUID | None, every: bool) -> None:
    """Reads the package of JOB_ID, or all, and compares their SHA-256 with what was recorded.

    A damaged one is not served from then on; one that proves sound is served again. Runs at idle priority.
    Prints one JSON object; the exit status is 1 where a package is damaged, missing or unreadable.
    """
    if (job_id is None) == (not every):
        raise click.UsageError("name a JOB_ID, or --all.")
    settings = _quiet_settings(config_file)
    with _database(settings) as dsn:
        become_idle()  # and not before: the embedded database would be, too
        found = asyncio.run(_verify(settings, dsn, job_id))
    if job_id is not None and not sum(asdict(found).values()):
        raise click.UsageError(f"there is no job {job_id} with a package")
    click.echo(orjson.dumps({_camel_case(name): value for name, value in asdict(found).items()}).decode())
    sys.exit(1 if found.damaged or found.missing or found.unreadable else 0)


async def _verify(settings: Settings, dsn: str, job_id: uuid.UUID | None) -> Verification:
    database = await connect(settings, dsn)
    try:
        return await verify_packages(database, PackageStore(settings.storage_root), job_id)
    finally:
        await database.close()


@cli.group()
def migrate() -> None:
    """Brings the database's schema up to date, or back."""


@migrate.command("up")
@config_option
def migrate_up_command(config_file: Path | None) -> None:
    """Applies every migration that is missing. Keeps what is there."""
    with _database(_quiet_settings(config_file), migrated=False) as dsn:
        applied = migrate_up(dsn)
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("nothing to apply")


@migrate.command("down")
@config_option
def migrate_down_command(config_file: Path | None) -> None:
    """Takes back the newest migration. Never removes a job, but may remove counts and history."""
    with _database(_quiet_settings(config_file), migrated=False) as dsn:
        name = migrate_down(dsn)
    click.echo(f"took back {name}" if name else "nothing to take back")


@migrate.command("status")
@config_option
def migrate_status_command(config_file: Path | None) -> None:
    """Lists the migrations and whether each is applied."""
    with _database(_quiet_settings(config_file), migrated=False) as dsn:
        for migration in migration_status(dsn):
            click.echo(f"{'applied' if migration.is_applied else 'pending'}  {migration.name}")


@cli.command()
@config_option
def demo(config_file: Path | None) -> None:
    """Packs a sample, starts the daemon and a packer with a job to do, and prints what to try."""
    # In the environment, where the packer's process finds it too.
    exports = load_settings(config_file, os.environ).data_dir / "demo-exports"
    os.environ["EXPORTD_PACKER__ENABLED"] = "true"
    os.environ["EXPORTD_PACKER__SOURCE_ROOTS"] = orjson.dumps([str(exports)]).decode()
    settings = load_settings(config_file, os.environ)
    _log_to_stdout(settings)
    with _database(settings) as dsn:
        sample = _write_sample(exports / "sample-export")
        published = _publish(settings, dsn, sample, "alice", "Sample Export", None, lambda _: None)
        asyncio.run(_request_sample(settings, dsn, sample))
        _serve(
            settings,
            lambda: make_app(settings, dsn),
            lambda url: _print_demo(settings, published, url),
            _packer_command(config_file),
        )


async def _request_sample(settings: Settings, dsn: str, sample: Path) -> None:
    database = await connect(settings, dsn)
    await request_package(
        database,
        job_id=uuid.uuid4(),
        user_id="alice",
        tool_name="Packed By The Daemon",
        source=str(sample),
        retention_days=settings.retention.days,
    )
    await database.close()


def _packer_command(config_file: Path | None) -> Sequence[str]:
    config = ("--config", str(config_file)) if config_file else ()
    return sys.executable, "-m", "exportd", "packer", "--attended", *config


def _serve(
    settings: Settings,
    make: MakeApp,
    on_started: Callable[[str], None] = lambda _: None,
    companion: Sequence[str] = (),
) -> int:
    server = settings.server
    return serve(
        make,
        Listener(server.host, server.port, server.tls_cert, server.tls_key),
        workers=server.workers,
        drain_timeout_seconds=server.drain_timeout_seconds,
        limits=ConnectionLimits(
            server.max_connections,
            settings.limits.connections_per_address,
            server.head_timeout_seconds,
            server.keepalive_timeout_seconds,
        ),
        on_hangup=reopen_logs,
        on_started=on_started,
        companion=companion,
    )


def _print_demo(settings: Settings, published: dict[str, Any], url: str) -> None:
    bearer = make_tokens(settings).sign("alice", None, 86400)
    address = f"{url}{settings.server.base_path}/export-jobs/{published['jobId']}"
    click.echo(
        "\n"
        f"exportd serves a sample package ({published['packageSizeBytes']} bytes, "
        f"sha256 {published['sha256']}).\n\n"
        "See it in a browser, as alice:\n\n"
        f"  {url}/#token={bearer}\n\n"
        "Download it, from another terminal:\n\n"
        f"  curl -OJ -H 'Authorization: Bearer {bearer}' {address}/download\n\n"
        "How often it was downloaded:\n\n"
        f"  curl -H 'Authorization: Bearer {bearer}' {address}/download-stats\n\n"
        "Ctrl-C stops the daemon.\n"
    )


def _write_sample(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "README.txt").write_text("A sample export, made by `exportd demo`.\n", encoding="utf-8")
    for number in range(_SAMPLE_FILES):
        (folder / f"part-{number:02}.bin").write_bytes(secrets.token_bytes(_SAMPLE_FILE_BYTES))
    return folder


def _publish(
    settings: Settings,
    dsn: str,
    source: Path,
    user_id: str,
    tool_name: str,
    retention_days: int | None,
    progress: Progress,
) -> dict[str, Any]:
    job_id = uuid.uuid4()
    days = retention_days or settings.retention.days
    asyncio.run(_open_storage(settings, dsn))
    with _signals_deferred() as handle_signals:

        def report(count: int) -> None:
            handle_signals()
            progress(count)

        with draft_package(source, settings.storage_root, job_id, report) as draft:
            return _place(settings, dsn, draft, job_id, user_id, tool_name, days)


def _place(
    settings: Settings,
    dsn: str,
    draft: DraftPackage,
    job_id: uuid.UUID,
    user_id: str,
    tool_name: str,
    days: int,
) -> dict[str, Any]:
    draft.place()
    expires_at = asyncio.run(_record(settings, dsn, draft, job_id, user_id, tool_name, days))
    draft.keep()
    return {
        "jobId": job_id,
        "packagePath": draft.path,
        "packageSizeBytes": draft.size_bytes,
        "sha256": draft.sha256,
        "expiresAt": expires_at,
    }


async def _open_storage(settings: Settings, dsn: str) -> None:
    database = await connect(settings, dsn)
    try:
        await open_storage(settings, database)
    finally:
        await database.close()


async def _record(
    settings: Settings,
    dsn: str,
    draft: DraftPackage,
    job_id: uuid.UUID,
    user_id: str,
    tool_name: str,
    retention_days: int,
) -> datetime:
    database = await connect(settings, dsn)
    try:
        return await record_completed_job(
            database,
            job_id=job_id,
            user_id=user_id,
            tool_name=tool_name,
            package_path=draft.path,
            package_size_bytes=draft.size_bytes,
            package_sha256=draft.sha256,
            retention_days=retention_days,
        )
    except DatabaseUnavailable as error:
        # The row may have been written before the answer was lost: a package without a row wastes space, a
        # row without its package is a lie.
        draft.keep()
        raise DatabaseUnavailable(
            f"{error}; whether job {job_id} was recorded is unknown, so its package {draft.path} was kept"
        ) from error
    finally:
        await database.close()


@contextlib.contextmanager
def _signals_deferred() -> Iterator[Callable[[], None]]:
    """Holds SIGINT and SIGTERM back while the block lasts, since they would raise anywhere: between a package
    and its row, or amid a compressor's threads, which then wait for each other for ever.

    Yields what lets one that came be handled at once; the others are when the block ends.
    """
    came: list[int] = []
    handlers = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        # Not those that are ignored.
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
    """A bar on stderr where that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=total, label="Packing", file=sys.stderr) as bar:
        yield bar.update


@contextlib.contextmanager
def _database(settings: Settings, *, migrated: bool = True) -> Iterator[str]:
    """The database's libpq connection string, once it answers; ``migrated``: and has the present schema.

    The embedded database is brought up to date on the spot. An external one belongs to somebody: it is
    changed by ``exportd migrate up`` only.
    """
    configured = settings.database.dsn
    with contextlib.ExitStack() as stack:
        if configured is None:
            dsn = stack.enter_context(embedded_server(settings.data_dir))
            if migrated:
                migrate_up(dsn)
        else:
            dsn = configured.get_secret_value()
            wait_for_database(
                dsn,
                settings.database.startup_timeout_seconds,
                lambda reason: log.warning("database_waiting", error=reason),
            )
            if migrated and not all(migration.is_applied for migration in migration_status(dsn)):
                raise MigrationError("the database's schema is not up to date: run `exportd migrate up`")
        yield dsn


def _log_to_stdout(settings: Settings) -> None:
    try:
        configure_logging(
            settings.logging.level, settings.logging.format, sys.stdout, settings.logging.download_log
        )
    except OSError as error:
        raise SettingsError([f"logging.download_log: cannot be opened: {error.strerror}"]) from error


def _quiet_settings(config_file: Path | None) -> Settings:
    """Settings for the commands that print a result: only warnings are logged, to stderr."""
    settings = load_settings(config_file, os.environ)
    configure_logging("warning", "console", sys.stderr)
    return settings

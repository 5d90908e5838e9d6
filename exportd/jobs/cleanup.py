"""The cleanup: deletes expired packages and old events, on a schedule.

A lock of the database lets one cleanup run at a time in the whole fleet. Each batch is a transaction.
For each package it changes the row, which shows that the row can be changed, then unlinks the file. A crash
before the commit leaves rows whose files are missing, and the next run marks them as deleted. The cleanup
keeps a package while a principal may still resume its download, or while another job has it.
"""

import asyncio
import contextlib
import os
import time
import uuid
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from zoneinfo import ZoneInfo

import aiocron
import structlog
from cronsim import CronSim

from exportd.counting.upkeep import judge_late_jobs, prune
from exportd.db.expiry import (
    FIRST_ID,
    ExpiredPackage,
    database_clock,
    hides_rows,
    is_shared,
    last_cleanup,
    list_odd_paths,
    list_package_paths,
    marked_deleted,
    newest_package_paths,
    record_cleanup,
    take_expired,
)
from exportd.db.links import prune_links
from exportd.db.pool import Database, DatabaseError, DatabaseRefused, Session
from exportd.errors import OperatorError
from exportd.storage.files import PackageMissing, PackageStore, PackageUnusable

log = structlog.get_logger()

_LOCK = "exportd cleanup"
_BATCH = 50
# A batch locks its rows, and the ledger writes to the same rows.
_BATCH_SECONDS = 0.5
# The pause after a batch, as a multiple of the batch's duration.
_REST = 2.0
# This machine's clock and the database's may differ by this much. The cleanup still recognises that a
# scheduled run was already done.
_CLOCK_TOLERANCE = timedelta(seconds=5)
_MAX_NAMES = 100


class CleanupRefused(OperatorError):
    """The cleanup refuses to run. The message says why, for the operator."""


@dataclass(slots=True)
class CleanupSummary:
    """What a cleanup did; in a dry run, what it would have done."""

    packages_deleted: int = 0
    packages_failed: int = 0
    packages_waiting: int = 0
    bytes_freed: int = 0
    events_pruned: int = 0
    duration_seconds: float = 0.0


@dataclass(slots=True)
class Orphans:
    """Files that no job points to: their number, and the first names."""

    count: int = 0
    bytes: int = 0
    removed: int = 0
    names: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Cleanup:
    """The cleanup and its rules. ``event_days`` 0 keeps events for ever."""

    database: Database
    store: PackageStore
    grace: timedelta
    event_days: int
    on_finished: Callable[[CleanupSummary], None] = lambda _: None

    async def run(self, *, due_at: Callable[[datetime], datetime] | None = None) -> CleanupSummary | None:
        """Deletes expired packages and old events, logs one line and records the run.

        ``due_at`` returns the last scheduled time before a given one. If a run has started since then, this
        run does nothing and returns None. Raises CleanupRefused, DatabaseError.
        """
        if not self.store.is_marked():
            raise CleanupRefused(
                f"the storage root {self.store.root} has no file .exportd-storage: is it mounted? "
                "If it is the right folder, create that file"
            )
        if due_at is not None and await self._has_run_since(self.database, due_at):
            return None
        async with self.database.try_lock(_LOCK) as is_alone, self.database.session() as session:
            if not is_alone:
                if due_at is None:
                    raise CleanupRefused("another cleanup is running")
                return None
            if due_at is not None and await self._has_run_since(session, due_at):
                return None
            started_at, started = await database_clock(session), time.monotonic()
            summary = CleanupSummary()
            await self._delete_packages(session, summary)
            await prune_links(self.database)
            await judge_late_jobs(self.database)
            summary.events_pruned = await prune(self.database, self.event_days)
            summary.duration_seconds = round(time.monotonic() - started, 6)
            fields = asdict(summary)
            await record_cleanup(session, {"run_id": uuid.uuid4(), "started_at": started_at, **fields})
        log.info("cleanup_finished", **fields)
        self.on_finished(summary)
        return summary

    async def look(self) -> CleanupSummary:
        """Reports what ``run`` would do to packages. Raises DatabaseError."""
        summary, last = CleanupSummary(), None
        while packages := await take_expired(self.database, last, _BATCH, self.grace, lock=False):
            last = packages[-1]
            ready = [package for package in packages if not package.is_waiting]
            summary.packages_waiting += len(packages) - len(ready)
            summary.packages_deleted += len(ready)
            summary.bytes_freed += sum(package.size_bytes for package in ready)
        return summary

    async def run_scheduled(self, due_at: Callable[[datetime], datetime]) -> None:
        """Like ``run``, but logs errors. Raises only cancellation."""
        try:
            await self.run(due_at=due_at)
        except CleanupRefused as error:
            log.error("cleanup_refused", reason=str(error))
        except DatabaseError as error:
            log.error("cleanup_failed", error=str(error))
        except Exception:  # the task has no caller that could handle it
            log.exception("cleanup_failed")

    async def _has_run_since(
        self, database: Database | Session, due_at: Callable[[datetime], datetime]
    ) -> bool:
        last = await last_cleanup(database)
        if last is None:
            return False
        now = await database_clock(database)
        return last[0] >= due_at(now + _CLOCK_TOLERANCE) - _CLOCK_TOLERANCE

    async def _delete_packages(self, session: Session, summary: CleanupSummary) -> None:
        last: ExpiredPackage | None = None
        odd_paths: dict[str, set[str]] = defaultdict(set)
        for _, path in await list_odd_paths(session):
            if (name := self.store.name_of(path)) is not None:
                odd_paths[name].add(path)
        while True:
            started = time.monotonic()
            async with session.transaction():
                # A constraint that is checked at the commit would be checked after the file is gone.
                await session.fetch_all("SET CONSTRAINTS ALL IMMEDIATE")
                packages = await take_expired(session, last, _BATCH, self.grace, lock=True)
                if not packages:
                    return
                for last in packages:
                    if last.is_waiting:
                        summary.packages_waiting += 1
                    else:
                        await self._delete(session, last, odd_paths, summary)
                    if time.monotonic() - started > _BATCH_SECONDS:
                        break
            # Downloads need the disk, the database and the processor too, and the cleanup is not urgent.
            await asyncio.sleep(_REST * (time.monotonic() - started))

    async def _delete(
        self,
        session: Session,
        package: ExpiredPackage,
        odd_paths: Mapping[str, Collection[str]],
        summary: CleanupSummary,
    ) -> None:
        try:
            async with marked_deleted(session, package.job_id):
                name = self.store.name_of(package.package_path)
                if name is None:
                    raise PackageUnusable("the path leads out of the storage root")
                others = {*self.store.spellings(name), *odd_paths.get(name, ())}
                if not await is_shared(session, [*others]):
                    with contextlib.suppress(PackageMissing):
                        summary.bytes_freed += await asyncio.to_thread(self.store.remove, name)
        except (PackageUnusable, DatabaseRefused) as error:
            summary.packages_failed += 1
            log.error("package_not_deleted", job_id=str(package.job_id), reason=str(error))
        else:
            summary.packages_deleted += 1


async def find_orphans(
    database: Database, store: PackageStore, older_than_days: float, *, remove: bool
) -> Orphans:
    """Returns files in the storage that no job points to and that were not modified for a time.

    Raises CleanupRefused, OSError, DatabaseError.
    """
    if not store.is_marked():
        raise CleanupRefused(f"the storage root {store.root} has no file .exportd-storage: is it mounted?")
    before = time.time() - older_than_days * 86400

    def list_old() -> dict[str, int]:
        return {
            name: status.st_size
            for name, status in store.list_files()
            if max(status.st_mtime, status.st_ctime) < before
        }

    # List the files before the jobs: a package that is published in between is either not listed, or its job
    # is found.
    found = await asyncio.to_thread(list_old)
    doubt = await _drop_recorded(database, store, found)
    orphans = Orphans(len(found), sum(found.values()), 0, sorted(found)[:_MAX_NAMES])
    if not remove:
        return orphans
    if doubt is not None:
        raise CleanupRefused(doubt)
    for name in found:
        try:
            await asyncio.to_thread(store.remove, name)
        except (PackageMissing, PackageUnusable) as error:
            log.error("orphan_not_removed", name=name, reason=str(error))
        else:
            orphans.removed += 1
    log.info("orphans_removed", count=orphans.removed, failed=orphans.count - orphans.removed)
    return orphans


async def _drop_recorded(database: Database, store: PackageStore, found: dict[str, int]) -> str | None:
    """Drops the files that a job points to. Returns why the others may be packages all the same, or None."""
    doubt = None
    if await hides_rows(database):
        doubt = "row level security hides jobs from this role, and their packages would look like orphans"
    after = FIRST_ID
    while rows := await list_package_paths(database, after):
        after = rows[-1][0]
        for job_id, path in rows:
            if (name := store.name_of(path)) is not None:
                found.pop(name, None)
            elif path.startswith("/"):
                doubt = f"job {job_id} has its package at {path}, outside {store.root}: has the root moved?"
    if found and after == FIRST_ID:
        doubt = "no job has a package: is this the right database?"
    return doubt


async def claim_storage(database: Database, store: PackageStore) -> None:
    """Marks the root as the storage if that is certain: the database has no packages, or one of its newest is
    there. Raises DatabaseUnavailable and OSError."""
    if store.is_marked():
        return
    paths = await newest_package_paths(database)
    if not paths or any(_is_there(store, path) for path in paths):
        store.mark()
    else:
        log.error("storage_not_recognised", looked_for=len(paths))


def _is_there(store: PackageStore, path: str) -> bool:
    try:
        package = store.open(path, None)
    except (PackageMissing, PackageUnusable):
        return False
    os.close(package.descriptor)
    return True


@contextlib.asynccontextmanager
async def on_schedule(
    schedule: str,
    timezone: str,
    run: Callable[[Callable[[datetime], datetime]], Coroutine[None, None, None]],
) -> AsyncIterator[None]:
    """Runs ``run`` on a crontab schedule, in a time zone, while the block runs; never twice at once.

    Also runs it at the start, to catch up on a missed run. ``run`` gets a function that returns the last
    scheduled time.
    """
    lock = asyncio.Lock()
    running: set[asyncio.Task[None]] = set()
    zone = ZoneInfo(timezone)

    def last_due(now: datetime) -> datetime:
        return next(CronSim(schedule, now.astimezone(zone), reverse=True))

    async def run_alone() -> None:
        if lock.locked():
            return
        async with lock:
            task = asyncio.create_task(run(last_due))
            running.add(task)
            try:
                await asyncio.wait([task])
            finally:
                running.discard(task)

    missed = asyncio.create_task(run_alone())
    cron = aiocron.crontab(schedule, func=run_alone, loop=asyncio.get_running_loop(), tz=zone, start=True)
    try:
        yield
    finally:
        cron.stop()
        tasks = [missed, *running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

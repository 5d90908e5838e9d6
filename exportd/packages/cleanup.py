"""The cleanup: what its time has come for goes, on a schedule. So far: old download events."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from zoneinfo import ZoneInfo

import aiocron
import structlog

from exportd.db.downloads import prune_events
from exportd.db.pool import Database, DatabaseRefused, DatabaseUnavailable

log = structlog.get_logger()


async def clean_up(database: Database, event_days: int) -> None:
    """Removes events older than ``event_days`` (0: none) and logs how many. Never raises but cancellation.

    Safe to run in several processes at once, and to break off.
    """
    if not event_days:
        return
    try:
        pruned = await prune_events(database, event_days)
    except (DatabaseUnavailable, DatabaseRefused) as error:
        log.error("cleanup_failed", error=str(error))
    else:
        log.info("cleanup_finished", events_pruned=pruned)


@contextlib.asynccontextmanager
async def on_schedule(
    schedule: str, timezone: str, run: Callable[[], Coroutine[None, None, None]]
) -> AsyncIterator[None]:
    """Runs ``run`` by a crontab line, in the time of a zone, while the block lasts; never twice at once."""
    lock = asyncio.Lock()
    running: set[asyncio.Task[None]] = set()

    async def run_alone() -> None:
        if lock.locked():
            return
        async with lock:
            task = asyncio.create_task(run())
            running.add(task)
            try:
                await asyncio.wait([task])
            finally:
                running.discard(task)

    cron = aiocron.crontab(
        schedule, func=run_alone, loop=asyncio.get_running_loop(), tz=ZoneInfo(timezone), start=True
    )
    try:
        yield
    finally:
        cron.stop()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

"""Whether the database and the storage respond, for probes and scrapes."""

import asyncio
import time

from exportd.db.jobs import sum_packages
from exportd.db.pool import Database, DatabaseUnavailable
from exportd.storage.files import PackageStore

OK, UNAVAILABLE = "ok", "unavailable"

_REMEMBERED_SECONDS = 1.0
_STORAGE_TIMEOUT_SECONDS = 5.0
# How long a scrape waits for the database.
_SCRAPE_TIMEOUT_SECONDS = 2.0
# The sums read the whole table.
_SUMS_KEPT_SECONDS = 60.0


class Readiness:
    """Checks whether the database and the storage respond. One check runs at a time, and at most one a
    second; every caller gets its result."""

    def __init__(self, database: Database, store: PackageStore) -> None:
        self._database = database
        self._store = store
        self._look: asyncio.Task[dict[str, str]] | None = None
        self._looked_at = float("-inf")
        self._storage_look: asyncio.Future[bool] | None = None

    async def look(self) -> dict[str, str]:
        """Returns the state of each: ``ok`` or ``unavailable``."""
        now = asyncio.get_running_loop().time()
        if self._look is None or (self._look.done() and now - self._looked_at >= _REMEMBERED_SECONDS):
            self._looked_at = now
            self._look = asyncio.create_task(self._look_now())
        # Shielded, because other callers wait for it too.
        return await asyncio.shield(self._look)

    async def _look_now(self) -> dict[str, str]:
        is_database_ready, is_storage_ready = await asyncio.gather(self._ask_database(), self._ask_storage())
        return {
            "database": OK if is_database_ready else UNAVAILABLE,
            "storage": OK if is_storage_ready else UNAVAILABLE,
        }

    async def _ask_database(self) -> bool:
        try:
            await self._database.fetch_one("SELECT 1")
        except DatabaseUnavailable:
            return False
        return True

    async def _ask_storage(self) -> bool:
        # A hanging file system (NFS) blocks one thread, however often this runs.
        if self._storage_look is None:
            self._storage_look = asyncio.ensure_future(asyncio.to_thread(self._store.is_ready))
        done, _ = await asyncio.wait([self._storage_look], timeout=_STORAGE_TIMEOUT_SECONDS)
        if not done:
            return False
        self._storage_look = None
        return done.pop().result()


class DatabaseProbe:
    """Checks for scrapes whether the database responds, and sums up its jobs.

    It never cancels a statement, which would cost its connection: a slow statement runs to its end, and the
    next begins only then.
    """

    def __init__(self, database: Database) -> None:
        self.is_up = False
        self.packages: dict[str, tuple[int, int]] | None = None
        self._database = database
        self._ping: asyncio.Task[bool] | None = None
        self._sums: asyncio.Task[None] | None = None
        self._sums_begun_at = float("-inf")

    async def look(self) -> None:
        """Updates both, but waits two seconds at most."""
        if self._ping is None:
            self._ping = asyncio.create_task(self._answers())
        now = time.monotonic()
        if self._sums is None and now - self._sums_begun_at >= _SUMS_KEPT_SECONDS:
            self._sums_begun_at = now
            self._sums = asyncio.create_task(self._sum())
        under_way = [task for task in (self._ping, self._sums) if task is not None]
        await asyncio.wait(under_way, timeout=_SCRAPE_TIMEOUT_SECONDS)
        self.is_up = False
        if self._ping.done():
            self.is_up, self._ping = self._ping.result(), None
        if self._sums is not None and self._sums.done():
            sums, self._sums = self._sums, None
            sums.result()

    def close(self) -> None:
        """Cancels what is running."""
        for task in (self._ping, self._sums):
            if task is not None:
                task.cancel()

    async def _answers(self) -> bool:
        try:
            await self._database.fetch_one("SELECT 1")
        except DatabaseUnavailable:
            return False
        return True

    async def _sum(self) -> None:
        try:
            self.packages = await sum_packages(self._database)
        except DatabaseUnavailable:
            self.packages = None

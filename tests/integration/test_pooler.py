"""Behind pgbouncer in transaction mode, where each transaction may run in another session."""

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from exportd.db.pool import open_database
from tests.db.test_pool import OPTIONS
from tests.integration.test_faults import Load, count_of
from tests.support.application import Jobs, noise, skip_missed_cleanup
from tests.support.cluster import Server
from tests.support.daemon import Exportd, wait_for
from tests.support.postgres import query

pytestmark = pytest.mark.slow

EXPIRED = "UPDATE export_jobs SET package_expires_at = now() - interval '1 day'"


@pytest.fixture
def exportd(tmp_path: Path, pgbouncer_dsn: str) -> Iterator[Exportd]:
    command = Exportd(tmp_path, pgbouncer_dsn)
    command.storage.mkdir(parents=True)
    yield command
    command.close()


class Application:
    """Another client of the pooler, that keeps all its server connections in use."""

    def __init__(self, dsn: str) -> None:
        self.statement_timeouts: set[str] = set()
        self._dsn = dsn
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(6)]
        for thread in self._threads:
            thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            for name in ("statement_timeout", "lock_timeout", "client_connection_check_interval"):
                ((value,),) = query(self._dsn, f"SHOW {name}")
                self.statement_timeouts.add(value)
            time.sleep(0.001)

    def finish(self) -> set[str]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.statement_timeouts


def test_downloads_cleanups_and_migrations_disturb_nobody(
    exportd: Exportd, server: Server, pgbouncer_dsn: str
) -> None:
    jobs = Jobs(server.dsn, exportd.storage)
    package = jobs.add(noise(30_000))
    # The daemon would clean up at its start, and the commands would be refused meanwhile.
    skip_missed_cleanup(server.dsn)
    application = Application(pgbouncer_dsn)
    daemon = exportd.serve()
    load = Load(daemon.port, package, clients=4, in_parts=2)
    (exportd.storage / ".exportd-storage").touch()
    for _ in range(10):
        expired = jobs.add(noise(100))
        query(server.dsn, f"{EXPIRED} WHERE job_id = %s", (expired.job_id,))
        cleaned = exportd.call("cleanup")
        assert cleaned.returncode == 0, cleaned.stderr
        assert not expired.file.exists()
        for command in ("up", "check"):
            migrated = exportd.call("migrate", command)
            assert migrated.returncode == 0, migrated.stderr
    wait_for("some downloads", lambda: load.completed > 200)
    completed = load.finish()
    assert not load.refused
    assert daemon.stop() == 0
    assert count_of(server.dsn, package.job_id) == completed
    # Nothing of exportd's reached the application, and nothing is left.
    assert application.finish() == {"0"}
    assert query(server.dsn, "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'") == [(0,)]
    assert not [line for line in daemon.log if line["level"] in ("warning", "error")]


async def test_notifications_come_past_the_pooler(server: Server, pgbouncer_dsn: str) -> None:
    database = await open_database(pgbouncer_dsn, **OPTIONS, direct_dsn=server.dsn)  # type: ignore[arg-type]
    async with database.listening("some channel") as wait:
        query(pgbouncer_dsn, 'NOTIFY "some channel"')
        async with asyncio.timeout(30):
            await wait(600)
    await database.close()


async def test_without_a_way_past_the_pooler_the_wait_ends_by_itself(pgbouncer_dsn: str) -> None:
    database = await open_database(pgbouncer_dsn, **OPTIONS)  # type: ignore[arg-type]
    async with database.listening("some channel") as wait:
        await wait(0.1)
        await wait(0.1)
    assert query(pgbouncer_dsn, "SELECT * FROM pg_listening_channels()") == []
    await database.close()

"""``python record_probe.py DSN TIMES``: what records cost, as a line of JSON for each line of input.

It measures the exportd on PYTHONPATH, which may be an earlier one. The DSN's database must be empty.
"""

import asyncio
import importlib
import json
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from exportd.counting.record import record_downloads
from exportd.db.migrate import migrate_up
from exportd.db.pool import Database, open_database
from exportd.domain.delivery import DownloadEvent

_running = importlib.import_module("exportd.counting.running")
# Its name in earlier versions.
write_running: Callable[[Database, Sequence[DownloadEvent]], Awaitable[None]] = (
    getattr(_running, "write_running", None) or _running.checkpoint_downloads
)
_FIELDS = {field.name for field in fields(DownloadEvent)}
_JOBS = [uuid.UUID(int=number + 1) for number in range(64)]
_SIZE = 1000


def _event(number: int, start: int = 0, stop: int = _SIZE, **changes: object) -> DownloadEvent:
    received = ((start, stop),)
    values: dict[str, Any] = {
        "event_id": uuid.uuid4(), "job_id": _JOBS[number % 64], "user_id": f"user {number}",
        "started_at": datetime.now(UTC), "duration_seconds": 0.1234, "outcome": "completed",
        "http_status": 200 if stop - start == _SIZE else 206, "requested": received, "received": received,
        "bytes_sent": stop - start, "package_size_bytes": _SIZE, "request_id": "r" * 32,
        "bytes_acknowledged": stop - start, "reason": None, "method": "sendfile", "daemon_id": uuid.uuid4(),
        "package_sha256": "0" * 64,
    }  # fmt: skip
    return DownloadEvent(**{name: value for name, value in {**values, **changes}.items() if name in _FIELDS})


class _Meter:
    """The processor time of the pool's one connection, of this process, and the WAL that is written."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def measure(self, batches: Sequence[Callable[[], Awaitable[object]]]) -> dict[str, float]:
        """What each batch costs on average."""
        (row,) = await self._database.fetch_all("SELECT pg_backend_pid() AS pid")
        schedule = Path(f"/proc/{row.pid if hasattr(row, 'pid') else row[0]}/schedstat")
        server, client, wal = int(schedule.read_text().split()[0]), time.process_time(), await self._wal()
        for batch in batches:
            await batch()
        return {
            "server_ms": (int(schedule.read_text().split()[0]) - server) / 1e6 / len(batches),
            "client_ms": (time.process_time() - client) * 1e3 / len(batches),
            "wal_bytes": (await self._wal() - wal) / len(batches),
        }

    async def _wal(self) -> int:
        (row,) = await self._database.fetch_all("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn")
        return int(row[0])


async def _measure(database: Database, times: int) -> dict[str, dict[str, float]]:
    meter, found = _Meter(database), {}

    def record(events: list[DownloadEvent]) -> Callable[[], Awaitable[object]]:
        return lambda: record_downloads(database, events)

    for size in (1, 64, 500):
        batches = [record([_event(number) for number in range(size)]) for _ in range(times)]
        found[f"{size} whole"] = await meter.measure(batches)
    for size in (1, 64):
        # Deliveries that broke off, and then their resumes, which make them downloads.
        broken = {"outcome": "aborted", "received": ((0, 400),), "bytes_sent": 500}
        batches = [
            record(
                [
                    _event(user, 450) if number % 2 else _event(user, **broken)  # type: ignore[arg-type]
                    for user in range(size)
                ]
            )
            for number in range(times)
        ]
        found[f"{size} partial"] = await meter.measure(batches)
    for size in (1, 64):
        running = [_event(user, outcome="running", bytes_acknowledged=1) for user in range(size)]
        await write_running(database, running)
        await database.fetch_all("CHECKPOINT")
        # The first change of a page after a checkpoint of PostgreSQL writes the whole page.
        await write_running(database, running)
        batches = [lambda running=running: write_running(database, running)] * times  # type: ignore[misc]
        cost = await meter.measure(batches)
        found[f"{size} running"] = cost | {"wal_bytes": cost["wal_bytes"] / size}
    return found


async def _main(dsn: str, times: int) -> None:
    migrate_up(dsn)
    database = await open_database(
        dsn, pool_min_size=1, pool_max_size=1, connect_timeout_seconds=10, statement_timeout_seconds=60
    )
    for job_id in _JOBS:
        await database.fetch_all(
            "INSERT INTO export_jobs (job_id, user_id, status, package_path, package_size_bytes)"
            " VALUES (%s, 'ann', 'completed', 'p', %s)",
            (job_id, _SIZE),
        )
    await database.fetch_all("ANALYZE export_jobs")
    # A round for each line of input, so that rounds of two versions can alternate.
    while await asyncio.to_thread(sys.stdin.readline):
        print(json.dumps(await _measure(database, times)), flush=True)
    await database.close()


if __name__ == "__main__":
    asyncio.run(_main(sys.argv[1], int(sys.argv[2])))

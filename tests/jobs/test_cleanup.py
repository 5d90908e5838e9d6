"""The cleanup and its schedule."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
import structlog

from exportd.counting import upkeep
from exportd.counting.record import record_downloads
from exportd.counting.running import write_running
from exportd.counting.upkeep import prune
from exportd.db.pool import Database
from exportd.jobs.cleanup import on_schedule
from tests.counting.test_ledger import completed_job, count, event, part
from tests.support.application import Start
from tests.support.postgres import query


async def test_old_events_go_and_what_they_counted_stays(
    database: Database,
    dsn: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upkeep, "_PRUNED_AT_ONCE", 3)
    job_id, _ = await completed_job(database)
    long_ago = datetime.now(UTC) - timedelta(days=31)
    for _ in range(7):
        await record_downloads(database, [event(job_id, started_at=long_ago)])
    await record_downloads(database, [part(job_id, 0, 500, started_at=long_ago)])
    recent = event(job_id, started_at=long_ago + timedelta(days=2))
    await record_downloads(database, [recent])
    running = event(job_id, started_at=long_ago, outcome="running")
    await write_running(database, [running])

    assert await prune(database, 30) == 8
    assert await prune(database, 30) == 0
    left = {row[0] for row in query(dsn, "SELECT event_id::text FROM download_events")}
    assert left == {str(recent.event_id)}
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(1,)]
    assert await count(database, job_id) == 8


async def test_the_daemon_cleans_up_on_schedule(start: Start, dsn: str) -> None:
    query(
        dsn,
        "INSERT INTO download_events (event_id, job_id, user_id, started_at, duration_seconds, outcome,"
        " http_status, requested, received, bytes_sent, package_size_bytes, request_id)"
        " VALUES (%s, %s, 'ann', now() - interval '2 days', 1, 'completed', 200, '{}', '{}', 0, 0, 'r')",
        (str(uuid.uuid4()), str(uuid.uuid4())),
    )
    with structlog.testing.capture_logs() as logs:
        # Six fields: every second.
        await start(retention={"event_days": 1, "cleanup_schedule": "* * * * * *"})
        async with asyncio.timeout(30):
            while not any(line.get("events_pruned") == 1 for line in logs):
                await asyncio.sleep(0.02)
    assert query(dsn, "SELECT count(*) FROM download_events") == [(0,)]


async def test_a_run_that_takes_long_is_not_joined_by_another_and_ends_with_the_block() -> None:
    started = 0
    ended = asyncio.Event()

    async def run(_: Callable[[datetime], datetime]) -> None:
        nonlocal started
        started += 1
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with on_schedule("* * * * * *", "UTC", run):
        async with asyncio.timeout(30):
            while not started:
                await asyncio.sleep(0.02)
        await asyncio.sleep(1.2)
    assert started == 1
    assert ended.is_set()

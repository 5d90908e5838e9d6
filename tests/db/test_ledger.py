"""Jobs and downloads in SQL."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import pytest

from exportd.db.downloads import record_download
from exportd.db.jobs import find_job, find_statistics, record_completed_job
from exportd.db.migrate import migrate_up
from exportd.db.pool import Database, open_database
from exportd.db.rows import DownloadEvent
from tests.db.test_pool import OPTIONS
from tests.support.postgres import query

DIGEST = "0" * 64


@pytest.fixture
async def database(dsn: str) -> AsyncIterator[Database]:
    database = await open_database(dsn, **{**OPTIONS, "pool_max_size": 8})  # type: ignore[arg-type]
    yield database
    await database.close()


async def completed_job(
    database: Database, job_id: uuid.UUID | None = None, days: int = 30
) -> tuple[uuid.UUID, datetime]:
    job_id = job_id or uuid.uuid4()
    expires_at = await record_completed_job(
        database,
        job_id=job_id,
        user_id="ann",
        tool_name="Form",
        package_path="a.tar.gz",
        package_size_bytes=1000,
        package_sha256=DIGEST,
        retention_days=days,
    )
    return job_id, expires_at


def event(job_id: uuid.UUID, **changes: object) -> DownloadEvent:
    values: dict[str, object] = {
        "event_id": uuid.uuid4(),
        "job_id": job_id,
        "user_id": "ann",
        "started_at": datetime.now(UTC),
        "duration_seconds": 1.5,
        "outcome": "completed",
        "http_status": 200,
        "requested": ((0, 1000),),
        "bytes_sent": 1000,
        "package_size_bytes": 1000,
        "request_id": "r",
        "is_whole": True,
    }
    return DownloadEvent(**{**values, **changes})  # type: ignore[arg-type]


async def test_a_recorded_job_is_found_with_its_expiry(database: Database) -> None:
    job_id, expires_at = await completed_job(database, days=7)
    job = await find_job(database, job_id)
    assert job is not None
    assert (job.user_id, job.status, job.tool_name) == ("ann", "completed", "Form")
    assert (job.package_path, job.package_size_bytes, job.package_sha256) == ("a.tar.gz", 1000, DIGEST)
    assert job.completed_at is not None
    assert job.package_expires_at == expires_at == job.completed_at + timedelta(days=7)
    assert job.read_at >= job.completed_at
    assert await find_job(database, uuid.uuid4()) is None
    assert await find_statistics(database, uuid.uuid4()) is None


async def test_recording_a_job_twice_records_it_once(database: Database, dsn: str) -> None:
    job_id, first = await completed_job(database, days=7)
    _, second = await completed_job(database, job_id, days=8)
    assert second == first
    assert query(dsn, "SELECT count(*) FROM export_jobs") == [(1,)]


async def test_each_whole_delivery_counts_once_however_often_it_is_written(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    once = event(job_id)
    for _ in range(3):
        await record_download(database, once)
    await record_download(database, event(job_id))
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served) == (2, 2000)
    assert statistics.last_downloaded_at is not None
    assert query(dsn, "SELECT count(*) FROM download_events") == [(2,)]


async def test_a_partial_delivery_counts_bytes_only(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    partial = event(job_id, is_whole=False, bytes_sent=10, http_status=206, requested=((0, 5), (7, 12)))
    await record_download(database, partial)
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served, statistics.last_downloaded_at) == (
        0,
        10,
        None,
    )
    assert query(dsn, "SELECT requested::text, outcome, http_status FROM download_events") == [
        ("{[0,5),[7,12)}", "completed", 206)
    ]


async def test_no_count_is_lost_when_many_end_together(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await asyncio.gather(*(record_download(database, event(job_id)) for _ in range(200)))
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served) == (200, 200_000)


async def test_an_event_of_a_job_that_was_deleted_is_kept(database: Database, dsn: str) -> None:
    await record_download(database, event(uuid.uuid4()))
    assert query(dsn, "SELECT count(*) FROM download_events") == [(1,)]


async def test_an_applications_own_types_are_read(empty_dsn: str) -> None:
    job_id = uuid.uuid4()
    query(
        empty_dsn,
        "CREATE TYPE job_status AS ENUM ('queued', 'completed');"
        "CREATE TABLE export_jobs (job_id uuid PRIMARY KEY, user_id integer, status job_status,"
        " tool_data jsonb, completed_at timestamp, package_size_bytes integer, download_count integer)",
    )
    migrate_up(empty_dsn)
    query(
        empty_dsn,
        "INSERT INTO export_jobs (job_id, user_id, status, tool_data, completed_at, package_path)"
        " VALUES (%s, 42, 'completed', '{\"toolName\": \"Form\"}', '2025-10-24 12:00:00', 'a.tar.gz')",
        (str(job_id),),
    )
    database = await open_database(empty_dsn, **OPTIONS)  # type: ignore[arg-type]
    job = await find_job(database, job_id)
    assert job is not None
    assert (job.user_id, job.status, job.tool_name) == ("42", "completed", "Form")
    assert job.completed_at == datetime(2025, 10, 24, 12, tzinfo=UTC)
    await record_download(database, event(job_id))
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert statistics.download_count == 1
    await database.close()

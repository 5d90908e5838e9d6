"""Jobs and downloads in SQL."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from random import Random

import pytest

from exportd.db.downloads import DownloadLedger, record_downloads
from exportd.db.jobs import JobFinder, find_statistics, record_completed_job
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
        "received": ((0, 1000),),
        "bytes_sent": 1000,
        "package_size_bytes": 1000,
        "request_id": "r",
    }
    return DownloadEvent(**{**values, **changes})  # type: ignore[arg-type]


async def test_a_recorded_job_is_found_with_its_expiry(database: Database) -> None:
    job_id, expires_at = await completed_job(database, days=7)
    job = await JobFinder(database).find_job(job_id)
    assert job is not None
    assert (job.user_id, job.status, job.tool_name) == ("ann", "completed", "Form")
    assert (job.package_path, job.package_size_bytes, job.package_sha256) == ("a.tar.gz", 1000, DIGEST)
    assert job.completed_at is not None
    assert job.package_expires_at == expires_at == job.completed_at + timedelta(days=7)
    assert job.read_at >= job.completed_at
    assert await JobFinder(database).find_job(uuid.uuid4()) is None
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
        await record_downloads(database, [once])
    await record_downloads(database, [event(job_id)])
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served) == (2, 2000)
    assert statistics.last_downloaded_at is not None
    assert query(dsn, "SELECT count(*) FROM download_events") == [(2,)]


async def test_a_partial_delivery_counts_bytes_only(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    parts = ((0, 5), (7, 12))
    partial = event(job_id, bytes_sent=10, http_status=206, requested=parts, received=parts)
    await record_downloads(database, [partial])
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
    ledger = DownloadLedger(database)
    await asyncio.gather(*(ledger.record(event(job_id)) for _ in range(1200)))
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served) == (1200, 1_200_000)


async def test_an_event_of_a_job_that_was_deleted_is_kept(database: Database, dsn: str) -> None:
    await record_downloads(database, [event(uuid.uuid4())])
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
    job = await JobFinder(database).find_job(job_id)
    assert job is not None
    assert (job.user_id, job.status, job.tool_name) == ("42", "completed", "Form")
    assert job.completed_at == datetime(2025, 10, 24, 12, tzinfo=UTC)
    await record_downloads(database, [event(job_id)])
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    assert statistics.download_count == 1
    await database.close()


def part(job_id: uuid.UUID, start: int, stop: int, **changes: object) -> DownloadEvent:
    ranges = ((start, stop),)
    return event(
        job_id, http_status=206, requested=ranges, received=ranges, bytes_sent=stop - start, **changes
    )


async def count(database: Database, job_id: uuid.UUID) -> int:
    statistics = await find_statistics(database, job_id)
    assert statistics is not None
    return statistics.download_count


@pytest.mark.parametrize(
    "ranges",
    [
        [(0, 500), (500, 1000)],
        [(500, 1000), (0, 500)],
        [(0, 700), (300, 1000)],
        [(0, 1), (999, 1000), (1, 999)],
    ],
)
async def test_parts_that_cover_the_package_count_once(
    database: Database, dsn: str, ranges: list[tuple[int, int]]
) -> None:
    job_id, _ = await completed_job(database)
    for start, stop in ranges[:-1]:
        await record_downloads(database, [part(job_id, start, stop)])
        assert await count(database, job_id) == 0
    last = part(job_id, *ranges[-1])
    await record_downloads(database, [last])
    await record_downloads(database, [last])
    assert await count(database, job_id) == 1
    # The progress is cleared: the next download begins anew.
    assert query(dsn, "SELECT isempty(received) FROM download_progress") == [(True,)]
    await record_downloads(database, [part(job_id, *ranges[0])])
    assert await count(database, job_id) == 1


async def test_two_principals_do_not_complete_each_other(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [part(job_id, 0, 500), part(job_id, 500, 1000, user_id="root")])
    assert await count(database, job_id) == 0
    await record_downloads(database, [part(job_id, 500, 1000), part(job_id, 0, 500, user_id="root")])
    assert await count(database, job_id) == 2


async def test_the_same_bytes_again_are_no_progress(database: Database) -> None:
    job_id, _ = await completed_job(database)
    for _ in range(5):
        await record_downloads(database, [part(job_id, 0, 999)])
    assert await count(database, job_id) == 0


async def test_a_whole_delivery_clears_what_was_in_progress(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [part(job_id, 0, 500)])
    await record_downloads(database, [event(job_id)])
    await record_downloads(database, [part(job_id, 500, 1000)])
    assert await count(database, job_id) == 1


async def test_an_aborted_delivery_is_progress_as_far_as_it_went(database: Database) -> None:
    job_id, _ = await completed_job(database)
    aborted = event(job_id, outcome="aborted", received=((0, 400),), bytes_sent=400)
    await record_downloads(database, [aborted])
    await record_downloads(database, [part(job_id, 400, 1000)])
    assert await count(database, job_id) == 1


async def test_an_aborted_delivery_is_never_a_whole_one(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [event(job_id, outcome="failed")])
    assert not event(job_id, outcome="aborted").is_whole


async def test_a_delivery_of_which_nothing_can_be_trusted_is_no_progress(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [event(job_id, outcome="changed", received=(), bytes_sent=400)])
    assert await count(database, job_id) == 0
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]


async def test_an_empty_package_is_whole_at_once(database: Database) -> None:
    job_id, _ = await completed_job(database)
    empty = event(job_id, package_size_bytes=0, requested=((0, 0),), received=(), bytes_sent=0)
    assert empty.is_whole
    await record_downloads(database, [empty])
    assert await count(database, job_id) == 1


async def test_what_comes_in_together_is_written_together(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    ledger = DownloadLedger(database)
    await asyncio.gather(*(ledger.record(event(job_id)) for _ in range(100)))
    # xmin names the transaction that wrote a row: the first event went alone, the rest as one.
    assert query(dsn, "SELECT count(DISTINCT xmin::text) FROM download_events") == [(1,)]


async def test_a_statement_that_fails_is_told_to_each_who_waits_and_the_next_is_written(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    ledger = DownloadLedger(database)
    wrong = event(job_id, requested=((5, 1),))
    results = await asyncio.gather(ledger.record(wrong), ledger.record(event(job_id)), return_exceptions=True)
    assert [type(result).__name__ for result in results] == ["DataException", "DataException"]
    await ledger.record(event(job_id))
    assert await count(database, job_id) == 1


class Model:
    """The rule as the design says it, event by event."""

    def __init__(self) -> None:
        self.count = 0
        self.received: dict[str, set[int]] = {}

    def add(self, user_id: str, start: int, stop: int) -> None:
        received = self.received.setdefault(user_id, set())
        received |= set(range(start, stop))
        if len(received) == 1000:
            self.count += 1
            received.clear()


@pytest.mark.parametrize("seed", range(8))
async def test_any_interleaving_counts_as_one_after_the_other(database: Database, seed: int) -> None:
    random = Random(seed)
    job_id, _ = await completed_job(database)
    ledger, model = DownloadLedger(database), Model()
    for _ in range(6):
        together = []
        for _ in range(random.randint(1, 40)):
            start, stop = random.choice([(0, 1000), (0, 500), (500, 1000), (0, 999), (999, 1000), (250, 750)])
            user_id = random.choice(["ann", "bob", "eve"])
            model.add(user_id, start, stop)
            together.append(ledger.record(part(job_id, start, stop, user_id=user_id)))
        await asyncio.gather(*together)
    assert await count(database, job_id) == model.count

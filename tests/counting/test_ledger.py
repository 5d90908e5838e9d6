"""Jobs and downloads in SQL."""

import asyncio
import contextlib
import fcntl
import os
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import psycopg2
import pytest
import structlog

from exportd.counting.ledger import DownloadLedger, open_ledger
from exportd.counting.record import record_downloads
from exportd.counting.running import write_running
from exportd.counting.spool import Spool
from exportd.db.driver import FIRST_TIME, LAST_TIME
from exportd.db.jobs import CompletedJob, JobFinder, record_completed_job
from exportd.db.migrate import migrate_up
from exportd.db.pool import Database, DatabaseUnavailable, open_database
from exportd.db.statistics import find_statistics
from exportd.domain.delivery import DownloadEvent, Outcome
from exportd.domain.sizes import LOWER_BOUNDS
from tests.db.test_pool import OPTIONS
from tests.support.postgres import database_dsn, query

DIGEST = "0" * 64


@pytest.fixture
async def ledger(database: Database, tmp_path: Path) -> AsyncIterator[DownloadLedger]:
    ledger = await open_ledger(database, tmp_path / "ledger")
    yield ledger
    await ledger.close()


async def completed_job(
    database: Database, job_id: uuid.UUID | None = None, days: int = 30
) -> tuple[uuid.UUID, datetime]:
    job_id = job_id or uuid.uuid4()
    job = CompletedJob(job_id, "ann", "Form", "a.tar.gz", 1000, DIGEST, days)
    expires_at = await record_completed_job(database, job)
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
        "bytes_acknowledged": 1000,
        "reason": None,
        "method": "sendfile",
        "daemon_id": uuid.uuid4(),
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
    assert await find_statistics(database, uuid.uuid4(), LOWER_BOUNDS) is None


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
    statistics = await find_statistics(database, job_id, LOWER_BOUNDS)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served) == (2, 2000)
    assert statistics.last_downloaded_at is not None
    assert query(dsn, "SELECT count(*) FROM download_events") == [(2,)]


async def test_a_partial_delivery_counts_bytes_only(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    parts = ((0, 5), (7, 12))
    partial = event(job_id, bytes_sent=10, http_status=206, requested=parts, received=parts)
    await record_downloads(database, [partial])
    statistics = await find_statistics(database, job_id, LOWER_BOUNDS)
    assert statistics is not None
    assert (statistics.download_count, statistics.bytes_served, statistics.last_downloaded_at) == (
        0,
        10,
        None,
    )
    assert query(dsn, "SELECT requested::text, outcome, http_status FROM download_events") == [
        ("{[0,5),[7,12)}", "completed", 206)
    ]


async def test_no_count_is_lost_when_many_end_together(database: Database, ledger: DownloadLedger) -> None:
    job_id, _ = await completed_job(database)
    await asyncio.gather(*(ledger.record(event(job_id)) for _ in range(1200)))
    statistics = await find_statistics(database, job_id, LOWER_BOUNDS)
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
    statistics = await find_statistics(database, job_id, LOWER_BOUNDS)
    assert statistics is not None
    assert statistics.download_count == 1
    await database.close()


def part(job_id: uuid.UUID, start: int, stop: int, **changes: object) -> DownloadEvent:
    ranges = ((start, stop),)
    return event(
        job_id, http_status=206, requested=ranges, received=ranges, bytes_sent=stop - start, **changes
    )


async def count(database: Database, job_id: uuid.UUID) -> int:
    statistics = await find_statistics(database, job_id, LOWER_BOUNDS)
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
    # The progress is deleted: the next download begins anew.
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]
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
    aborted = event(job_id, outcome=Outcome.ABORTED, received=((0, 400),), bytes_sent=400)
    await record_downloads(database, [aborted])
    await record_downloads(database, [part(job_id, 400, 1000)])
    assert await count(database, job_id) == 1


@pytest.mark.parametrize("outcome", ["aborted", "failed", "lost"])
async def test_only_a_completed_delivery_is_whole(database: Database, outcome: str) -> None:
    """Every byte was acknowledged, so the download counts; but by its progress, as parts would."""
    job_id, _ = await completed_job(database)
    ended = event(job_id, outcome=outcome)
    assert not ended.is_whole
    await record_downloads(database, [ended])
    assert await count(database, job_id) == 1
    assert event(job_id).is_whole


async def test_a_delivery_of_which_nothing_can_be_trusted_is_no_progress(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [event(job_id, outcome=Outcome.CHANGED, received=(), bytes_sent=400)])
    assert await count(database, job_id) == 0
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]


async def test_an_empty_package_is_whole_at_once(database: Database) -> None:
    job_id, _ = await completed_job(database)
    empty = event(job_id, package_size_bytes=0, requested=((0, 0),), received=(), bytes_sent=0)
    assert empty.is_whole
    await record_downloads(database, [empty])
    assert await count(database, job_id) == 1


async def test_concurrent_events_share_a_statement(
    database: Database, ledger: DownloadLedger, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    await asyncio.gather(*(ledger.record(event(job_id)) for _ in range(100)))
    # xmin names the transaction that wrote a row: the first event went alone, the rest as one.
    assert query(dsn, "SELECT count(DISTINCT xmin::text) FROM download_events") == [(1,)]


async def test_an_event_that_cannot_be_written_costs_no_other(
    database: Database, ledger: DownloadLedger
) -> None:
    job_id, _ = await completed_job(database)
    wrong = event(job_id, requested=((5, 1),))
    with structlog.testing.capture_logs() as logs:
        await asyncio.gather(ledger.record(wrong), ledger.record(event(job_id)), ledger.record(event(job_id)))
    assert await count(database, job_id) == 2
    (line,) = [line for line in logs if line["event"] == "download_not_recorded"]
    assert (line["event_id"], line["received"]) == (str(wrong.event_id), [[0, 1000]])


async def test_an_observer_is_told_of_each_statement_and_how_many_wait(
    database: Database, dsn: str, tmp_path: Path
) -> None:
    job_id, _ = await completed_job(database)
    seen: list[tuple[int, bool]] = []

    def observe(count: int, seconds: float, is_written: bool) -> None:
        assert 0 < seconds < 30
        seen.append((count, is_written))

    ledger = await open_ledger(database, tmp_path / "ledger", observe)
    with psycopg2.connect(dsn) as blocker:
        blocker.cursor().execute("LOCK TABLE download_events IN ACCESS EXCLUSIVE MODE")
        first = ledger.record(event(job_id))
        assert ledger.waiting == 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        # One is under way, and counts until it is written.
        rest = [ledger.record(event(job_id)) for _ in range(4)]
        assert ledger.waiting == 5
        blocker.rollback()
    blocker.close()
    await asyncio.gather(first, *rest)
    assert (seen, ledger.waiting) == ([(1, True), (4, True)], 0)
    await ledger.close()


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
async def test_any_interleaving_counts_as_one_after_the_other(
    database: Database, ledger: DownloadLedger, seed: int
) -> None:
    random = Random(seed)
    job_id, _ = await completed_job(database)
    model = Model()
    for _ in range(6):
        together = []
        for _ in range(random.randint(1, 40)):
            start, stop = random.choice([(0, 1000), (0, 500), (500, 1000), (0, 999), (999, 1000), (250, 750)])
            user_id = random.choice(["ann", "bob", "eve"])
            model.add(user_id, start, stop)
            together.append(ledger.record(part(job_id, start, stop, user_id=user_id)))
        await asyncio.gather(*together)
    assert await count(database, job_id) == model.count


async def test_parts_of_one_answer_that_cover_the_package_count(database: Database) -> None:
    job_id, _ = await completed_job(database)
    parts = ((0, 10), (10, 1000))
    whole_in_two = event(job_id, http_status=206, requested=parts, received=parts)
    assert not whole_in_two.is_whole
    await record_downloads(database, [whole_in_two])
    assert await count(database, job_id) == 1
    await record_downloads(database, [part(job_id, 0, 10)])
    assert await count(database, job_id) == 1


async def test_a_checkpoint_neither_counts_nor_outlives_the_end(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    whole = event(job_id)
    running = replace(whole, outcome=Outcome.RUNNING, received=((0, 400),), bytes_acknowledged=400)
    await write_running(database, [running])
    await write_running(database, [replace(running, bytes_acknowledged=500)])
    assert query(dsn, "SELECT bytes_acknowledged FROM exportd_running") == [(500,)]
    assert query(dsn, "SELECT count(*) FROM download_events") == [(0,)]
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]
    # Another delivery completes meanwhile: what is under way is no part of it.
    await record_downloads(database, [part(job_id, 500, 1000)])
    assert await count(database, job_id) == 0
    await record_downloads(database, [whole])
    assert await count(database, job_id) == 1
    # A late checkpoint of what has ended changes nothing.
    await write_running(database, [running])
    await record_downloads(database, [whole])
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(0,)]
    assert query(dsn, "SELECT outcome, received::text FROM download_events WHERE http_status = 200") == [
        ("completed", "{[0,1000)}")
    ]
    assert await count(database, job_id) == 1


def lost(job_id: uuid.UUID, start: int, acknowledged: int, stop: int, **changes: object) -> DownloadEvent:
    """A delivery whose daemon was killed when it had checkpointed ``acknowledged``."""
    values: dict[str, object] = {
        "outcome": Outcome.LOST,
        "duration_seconds": 0.0,
        "requested": ((start, stop),),
        "received": ((start, acknowledged),),
        "bytes_sent": acknowledged - start,
        "bytes_acknowledged": acknowledged - start,
    }
    return event(job_id, **{**values, **changes})


@pytest.mark.parametrize(
    ("left", "resumes", "counted"),
    [
        # (lost deliveries as start, acknowledged, stop), (what came after the kill), the count
        ([(0, 400, 1000)], [(700, 1000)], 1),  # resumed where it had got to
        ([(0, 400, 1000)], [(400, 1000)], 1),  # exactly at the checkpoint
        ([(0, 400, 1000)], [(300, 1000)], 1),  # before it
        ([(0, 400, 1000)], [(700, 900)], 0),  # the end is missing
        ([(0, 400, 1000)], [(700, 900), (900, 1000)], 1),
        ([(0, 400, 600)], [(700, 1000)], 0),  # beyond what was asked for: a gap
        ([(0, 400, 600)], [(600, 1000)], 0),  # another segment, which tells nothing of the lost one
        ([(100, 400, 1000)], [(700, 1000)], 0),  # the beginning is missing
        ([(0, 400, 1000)], [(0, 1000)], 1),  # begun anew
        ([(0, 200, 500), (500, 700, 1000)], [(300, 500), (800, 1000)], 1),  # two segments
        ([(0, 200, 500), (500, 700, 1000)], [(800, 1000)], 0),  # the first never resumed
        ([(0, 200, 1000), (500, 700, 1000)], [(800, 1000)], 0),  # nor here
        ([(0, 200, 1000), (500, 700, 1000)], [(800, 1000), (300, 500)], 1),
    ],
)
async def test_a_resume_after_a_kill_tells_how_far_the_client_had_got(
    database: Database, left: list[tuple[int, int, int]], resumes: list[tuple[int, int]], counted: int
) -> None:
    job_id, _ = await completed_job(database)
    killed = uuid.uuid4()
    for numbers in left:
        await record_downloads(database, [lost(job_id, *numbers, daemon_id=killed)])
    for start, stop in resumes:
        assert await count(database, job_id) == 0
        await record_downloads(database, [part(job_id, start, stop)])
    assert await count(database, job_id) == counted


async def test_a_resume_by_another_user_infers_no_bytes(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [lost(job_id, 0, 400, 1000)])
    await record_downloads(database, [part(job_id, 700, 1000, user_id="root")])
    assert await count(database, job_id) == 0


@pytest.mark.parametrize(
    ("sent", "resumed_at", "counted"),
    [
        (700, 700, 1),  # the last acknowledgements were on their way
        (700, 500, 1),
        (700, 400, 1),
        (700, 701, 0),  # it cannot have what was never sent
    ],
)
async def test_a_resume_after_an_abort_tells_how_much_of_what_was_sent_had_arrived(
    database: Database, sent: int, resumed_at: int, counted: int
) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(
        database, [event(job_id, outcome=Outcome.ABORTED, received=((0, 400),), bytes_sent=sent)]
    )
    await record_downloads(database, [part(job_id, resumed_at, 1000)])
    assert await count(database, job_id) == counted


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
async def test_a_segment_that_takes_over_from_a_connection_tells_it_too(
    database: Database, order: list[int]
) -> None:
    """As aria2 does it: a second connection begins in the middle, where the first is then closed."""
    job_id, _ = await completed_job(database)
    began = datetime.now(UTC)
    first = event(job_id, started_at=began, outcome=Outcome.ABORTED, received=((0, 480),), bytes_sent=600)
    second = part(job_id, 500, 1000, started_at=began + timedelta(seconds=1))
    for number in order:
        await record_downloads(database, [[first, second][number]])
    assert await count(database, job_id) == 1


async def test_a_loss_before_the_last_whole_download_infers_nothing(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [lost(job_id, 0, 400, 1000)])
    await record_downloads(database, [event(job_id)])
    await record_downloads(database, [part(job_id, 0, 300)])
    await record_downloads(database, [part(job_id, 700, 1000)])
    assert await count(database, job_id) == 1


async def test_a_daemon_that_is_killed_again_and_again_counts_once(database: Database) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [lost(job_id, 0, 100, 1000)])
    await record_downloads(database, [lost(job_id, 150, 300, 1000)])
    await record_downloads(database, [lost(job_id, 420, 500, 1000)])
    assert await count(database, job_id) == 0
    await record_downloads(database, [part(job_id, 900, 1000)])
    assert await count(database, job_id) == 1


async def test_a_delivery_recorded_as_lost_that_ends_later_counts_once(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    whole = event(job_id)
    await record_downloads(database, [replace(whole, outcome=Outcome.LOST, received=((0, 400),))])
    for _ in range(2):
        await record_downloads(database, [whole])
    await record_downloads(database, [replace(whole, outcome=Outcome.LOST, received=((0, 400),))])
    assert await count(database, job_id) == 1
    assert query(dsn, "SELECT outcome FROM download_events") == [("completed",)]
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]


async def test_the_next_start_records_running_deliveries_of_a_killed_process(
    database: Database, dsn: str, tmp_path: Path
) -> None:
    job_id, _ = await completed_job(database)
    dead = Spool.create(tmp_path / "ledger", uuid.uuid4())
    running = event(
        job_id,
        outcome=Outcome.RUNNING,
        duration_seconds=0.0,
        received=((0, 400),),
        bytes_acknowledged=400,
        daemon_id=dead.owner,
    )
    await write_running(database, [running])
    spooled = event(job_id, daemon_id=dead.owner, user_id="root")
    await dead.append([spooled])
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)

    # A living process's deliveries are its own.
    alive = await open_ledger(database, tmp_path / "other")
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(1,)]
    ledger = await open_ledger(database, tmp_path / "ledger")
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(0,)]
    assert sorted(query(dsn, "SELECT outcome FROM download_events")) == [("completed",), ("lost",)]
    assert query(dsn, "SELECT received::text FROM download_progress WHERE user_id = 'ann'") == [
        ("{[0,400)}",)
    ]
    assert await count(database, job_id) == 1
    assert len(list((tmp_path / "ledger").iterdir())) == 1
    await ledger.record(part(job_id, 650, 1000))
    assert await count(database, job_id) == 2
    await ledger.close()
    await alive.close()
    os.close(dead._descriptor)


class Away:
    """A database that can be gone, or slow."""

    def __init__(self, database: Database) -> None:
        self.real = database
        self.is_away = False
        self.is_slow = False

    async def fetch_all(self, *arguments: object) -> object:
        if self.is_away:
            raise DatabaseUnavailable("away")
        rows = await self.real.fetch_all(*arguments)  # type: ignore[arg-type]
        await self._answer()
        return rows

    @contextlib.asynccontextmanager
    async def session(self) -> AsyncIterator[object]:
        if self.is_away:
            raise DatabaseUnavailable("away")
        async with self.real.session() as session:
            yield session
            await self._answer()

    async def _answer(self) -> None:
        if self.is_slow:
            # The statement has done its work; only its answer never comes.
            await asyncio.sleep(3600)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exportd.counting.ledger._TURN_SECONDS", 0.02)
    for module in ("ledger", "replay"):
        monkeypatch.setattr(f"exportd.counting.{module}.WRITE_TIMEOUT_SECONDS", 0.1)


@pytest.mark.parametrize("trouble", ["is_away", "is_slow"])
@pytest.mark.usefixtures("quickly")
async def test_with_the_database_in_trouble_events_wait_in_the_spool_and_count_once(
    database: Database, dsn: str, tmp_path: Path, trouble: str
) -> None:
    job_id, _ = await completed_job(database)
    away = Away(database)
    ledger = await open_ledger(away, tmp_path / "ledger")  # type: ignore[arg-type]
    setattr(away, trouble, True)
    async with asyncio.timeout(30):
        await asyncio.gather(*(ledger.record(event(job_id)) for _ in range(10)))
    assert ledger.spooled
    await ledger.record(event(job_id))
    setattr(away, trouble, False)
    async with asyncio.timeout(30):
        while ledger.spooled:
            await asyncio.sleep(0.01)
    assert await count(database, job_id) == 11
    await ledger.record(event(job_id))
    assert await count(database, job_id) == 12
    await ledger.close()


@pytest.mark.usefixtures("quickly")
async def test_with_database_and_disk_in_trouble_events_wait_in_memory(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, _ = await completed_job(database)
    away = Away(database)
    ledger = await open_ledger(away, tmp_path / "ledger")  # type: ignore[arg-type]
    away.is_away = True

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Spool, "_append", full)
    with pytest.raises(OSError, match="No space"):
        await ledger.record(event(job_id))
    assert ledger.spooled == 1
    away.is_away = False
    async with asyncio.timeout(30):
        while ledger.spooled:
            await asyncio.sleep(0.01)
    assert await count(database, job_id) == 1
    await ledger.close()


@pytest.mark.usefixtures("quickly")
async def test_a_long_delivery_is_written_while_it_runs(
    database: Database, ledger: DownloadLedger, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd.counting.ledger._FIRST_CHECKPOINT_SECONDS", 0.1)
    job_id, _ = await completed_job(database)
    stop = 100

    def snapshot() -> DownloadEvent:
        return replace(running, bytes_acknowledged=stop)

    running = event(job_id, outcome=Outcome.RUNNING, daemon_id=ledger.daemon_id)
    seen = []
    with ledger.checkpoints(snapshot):
        async with asyncio.timeout(30):
            for expected in (100, 200, 300):
                stop = expected
                while query(dsn, "SELECT bytes_acknowledged FROM exportd_running") != [(expected,)]:
                    await asyncio.sleep(0.01)
                seen.append(expected)
    assert seen == [100, 200, 300]
    assert await count(database, job_id) == 0


async def test_times_beyond_pythons_are_the_last_or_the_first(database: Database, dsn: str) -> None:
    jobs = {}
    for time in (
        "10000-01-01",
        "275760-09-13",
        "infinity",
        "-infinity",
        "0044-03-15 BC",
        "9999-12-31 23:00 -05",
    ):
        job_id, _ = await completed_job(database)
        query(dsn, "UPDATE export_jobs SET completed_at = %s WHERE job_id = %s", (time, str(job_id)))
        jobs[job_id] = FIRST_TIME if time.startswith(("-", "0044")) else LAST_TIME
    finder = JobFinder(database)
    found = await asyncio.gather(*(finder.find_job(job_id) for job_id in jobs))
    assert [job.completed_at for job in found if job] == list(jobs.values())


async def test_a_delivery_of_a_large_package_is_written_when_it_starts(
    database: Database, ledger: DownloadLedger, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    size = 1024 * 1024
    small = event(job_id, outcome=Outcome.RUNNING, package_size_bytes=size)
    large = event(job_id, outcome=Outcome.RUNNING, package_size_bytes=size + 1)
    with ledger.checkpoints(lambda: small), ledger.checkpoints(lambda: large):
        async with asyncio.timeout(0.9):
            while query(dsn, "SELECT event_id::text FROM exportd_running") != [(str(large.event_id),)]:
                await asyncio.sleep(0.01)


async def test_an_end_waits_for_the_checkpoint_of_its_delivery(
    database: Database, ledger: DownloadLedger, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, package_size_bytes=2**30)
    may_write = asyncio.Event()

    async def write_late(*arguments: object) -> None:
        await may_write.wait()
        await write_running(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("exportd.counting.ledger.write_running", write_late)
    with ledger.checkpoints(lambda: replace(end, outcome=Outcome.RUNNING)):
        await asyncio.sleep(0.01)
        recording = ledger.record(end)
    await asyncio.sleep(0.1)
    assert not recording.done()
    may_write.set()
    await recording
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(0,)]
    assert query(dsn, "SELECT count(*) FROM download_events") == [(1,)]


async def test_a_checkpoint_that_is_refused_holds_up_no_record(
    database: Database, ledger: DownloadLedger, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    wrong = event(job_id, outcome=Outcome.RUNNING, bytes_sent=2**63, package_size_bytes=2**30)
    with ledger.checkpoints(lambda: wrong):
        await asyncio.sleep(0.1)
    await ledger.record(event(job_id))
    assert ledger.spooled == 0
    assert await count(database, job_id) == 1


@pytest.mark.usefixtures("quickly")
async def test_a_spooled_checkpoint_that_is_refused_holds_up_no_end(
    database: Database, dsn: str, tmp_path: Path
) -> None:
    job_id, _ = await completed_job(database)
    dead = Spool.create(tmp_path / "ledger", uuid.uuid4())
    wrong = event(job_id, outcome=Outcome.RUNNING, bytes_sent=2**63)
    await dead.append([wrong, event(job_id)])
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)
    ledger = await open_ledger(database, tmp_path / "ledger")
    assert ledger.spooled == 0
    assert await count(database, job_id) == 1
    await ledger.close()
    os.close(dead._descriptor)


async def test_records_of_two_daemons_at_the_same_time_count_once(database: Database, dsn: str) -> None:
    """The parts of one download, and each of them written by both."""
    job_id, _ = await completed_job(database)
    users = [f"user {number}" for number in range(8)]
    parts = [
        part(job_id, start, start + 100, user_id=user) for user in users for start in range(0, 1000, 100)
    ]
    Random(0).shuffle(parts)
    wholes = [event(job_id, user_id=user) for user in users]
    events = [*parts, *wholes]
    batches = [events[start : start + 7] for start in range(0, len(events), 7)]
    await asyncio.gather(*(record_downloads(database, batch) for batch in [*batches, *batches[::-1]]))
    ((counted, bytes_served),) = query(dsn, "SELECT download_count, bytes_served FROM export_jobs")
    # A whole delivery in the middle of a download ends it, as any whole one does.
    assert 8 <= counted <= 16
    assert bytes_served == 16_000
    assert query(dsn, "SELECT count(*) FROM download_events") == [(len(events),)]


async def test_parts_that_end_at_the_same_time_in_two_daemons_are_one_download(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    for number in range(20):
        parts = [part(job_id, start, start + 250, user_id=f"user {number}") for start in range(0, 1000, 250)]
        await asyncio.gather(*(record_downloads(database, [one]) for one in [*parts, *parts]))
    assert await count(database, job_id) == 20
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]


@pytest.mark.parametrize("user_id", ["Ж", "\ud800", "a\0b", "é"])
@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII", "UTF8"])
async def test_a_text_that_the_database_cannot_hold_costs_no_count(
    server_dsn: str, tmp_path: Path, encoding: str, user_id: str
) -> None:
    name = f"encoding_{uuid.uuid4().hex}"
    query(
        server_dsn,
        f"CREATE DATABASE {name} ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'",
    )
    dsn = database_dsn(server_dsn, name)
    migrate_up(dsn)
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    ledger = await open_ledger(database, tmp_path / "ledger")
    job_id, _ = await completed_job(database)
    parts = [part(job_id, 0, 500, user_id=user_id), part(job_id, 500, 1000, user_id=user_id)]
    for ended in [event(job_id, user_id=user_id), event(job_id), *parts]:
        await ledger.record(ended)
    assert await count(database, job_id) == 3
    await ledger.close()
    await database.close()
    query(server_dsn, f"DROP DATABASE {name} WITH (FORCE)")

"""What the ledger does when something does not go: nobody waits for others' records, and nothing is lost."""

import asyncio
import fcntl
import os
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import psycopg2
import pytest
import structlog

from exportd.counting.ledger import DownloadLedger, open_ledger
from exportd.counting.running import write_running
from exportd.counting.spool import Spool
from exportd.db.pool import Database
from exportd.domain.delivery import Outcome
from tests.counting.test_ledger import completed_job, count, event, lost, part
from tests.support.postgres import query

CUT_OFF = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE datname = current_database() AND pid <> pg_backend_pid()"
)


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exportd.counting.ledger._TURN_SECONDS", 0.02)
    for module in ("ledger", "replay"):
        monkeypatch.setattr(f"exportd.counting.{module}.WRITE_TIMEOUT_SECONDS", 0.3)


@contextmanager
def locked(dsn: str, job_id: uuid.UUID) -> Iterator[None]:
    """The job's row is held by somebody else while the block lasts."""
    connection = psycopg2.connect(dsn)
    connection.cursor().execute("SELECT FROM export_jobs WHERE job_id = %s FOR UPDATE", (str(job_id),))
    yield
    connection.rollback()
    connection.close()


async def until_spooled(ledger: DownloadLedger, expected: int) -> None:
    async with asyncio.timeout(30):
        while ledger.spooled != expected:
            await asyncio.sleep(0.01)


@pytest.fixture
async def ledger(database: Database, tmp_path: Path) -> AsyncIterator[DownloadLedger]:
    ledger = await open_ledger(database, tmp_path / "ledger")
    yield ledger
    await ledger.close()


async def test_a_job_settles_while_anothers_record_hangs(
    database: Database, ledger: DownloadLedger, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hanging, _ = await completed_job(database)
    other, _ = await completed_job(database)
    with locked(dsn, hanging):
        recording = ledger.record(event(hanging))
        async with asyncio.timeout(30):
            await ledger.settle(other)
            await ledger.finish_recording([other, uuid.uuid4()])
        assert not recording.done()
        # Its own readers do not wait for ever either.
        monkeypatch.setattr("exportd.counting.ledger._RECORDING_SECONDS", 0.01)
        async with asyncio.timeout(30):
            await ledger.settle(hanging)
        assert not recording.done()
    await recording
    assert await count(database, hanging) == 1


async def test_settle_waits_for_deliveries_whose_client_has_every_byte(ledger: DownloadLedger) -> None:
    job_id = uuid.uuid4()
    described = 0

    def snapshot() -> object:
        nonlocal described
        described += 1
        return event(job_id, outcome=Outcome.RUNNING)

    with ledger.checkpoints(snapshot, lambda: 999):  # type: ignore[arg-type]
        async with asyncio.timeout(30):
            await ledger.settle(job_id)
    with ledger.checkpoints(snapshot, lambda: 1000):  # type: ignore[arg-type]
        settling = asyncio.create_task(ledger.settle(job_id))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not settling.done()
    async with asyncio.timeout(30):
        await settling
    # Once for each delivery, at its beginning.
    assert described == 2


async def test_settle_ignores_deliveries_of_other_jobs(ledger: DownloadLedger) -> None:
    def asked() -> int:
        raise AssertionError

    with ledger.checkpoints(lambda: event(uuid.uuid4(), outcome=Outcome.RUNNING), asked):
        await ledger.settle(uuid.uuid4())
        assert ledger.running([uuid.uuid4()]) == []


@pytest.mark.usefixtures("quickly")
async def test_a_job_that_is_locked_holds_up_no_other(
    database: Database, ledger: DownloadLedger, dsn: str, tmp_path: Path
) -> None:
    stuck, _ = await completed_job(database)
    others = [(await completed_job(database))[0] for _ in range(3)]
    with structlog.testing.capture_logs() as logs:
        with locked(dsn, stuck):
            await asyncio.gather(*(ledger.record(event(job_id)) for job_id in [*others, stuck, *others]))
            await until_spooled(ledger, 1)
            assert [await count(database, job_id) for job_id in others] == [2, 2, 2]
            # What comes in from now on is not even delayed, and the stuck job's own keeps its order.
            await asyncio.gather(*(ledger.record(event(job_id)) for job_id in [*others, stuck]))
            assert [await count(database, job_id) for job_id in others] == [3, 3, 3]
            assert ledger.spooled == 2
            async with asyncio.timeout(30):
                while not any(line["event"] == "spool_not_drained" for line in logs):
                    await asyncio.sleep(0.01)
        await until_spooled(ledger, 0)
    assert await count(database, stuck) == 2
    (line,) = [line for line in logs if line["event"] == "spool_not_drained"]
    assert (line["job_ids"], line["log_level"]) == ([str(stuck)], "warning")
    # And all is as before.
    await ledger.record(event(stuck))
    assert await count(database, stuck) == 3
    assert all(file.stat().st_size == 0 for file in (tmp_path / "ledger").iterdir())


@pytest.mark.usefixtures("quickly")
async def test_a_start_does_not_wait_for_what_cannot_be_finished_and_finishes_it_later(
    database: Database, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exportd.counting.ledger._START_SECONDS", 0.05)
    job_id, _ = await completed_job(database)
    other, _ = await completed_job(database)
    dead = Spool.create(tmp_path / "ledger", uuid.uuid4())
    await dead.append([event(job_id, daemon_id=dead.owner), event(other, daemon_id=dead.owner)])
    running = event(other, outcome=Outcome.RUNNING, received=((0, 400),), daemon_id=dead.owner, user_id="bob")
    await dead.append([running])
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)
    with locked(dsn, job_id):
        async with asyncio.timeout(30):
            ledger = await open_ledger(database, tmp_path / "ledger")
        # The rest of it does not wait either.
        await until_spooled(ledger, 1)
        assert await count(database, other) == 1
    await until_spooled(ledger, 0)
    async with asyncio.timeout(30):
        while not query(dsn, "SELECT 1 FROM download_events WHERE outcome = 'lost'"):
            await asyncio.sleep(0.01)
    assert await count(database, job_id) == 1
    await ledger.record(part(other, 600, 1000, user_id="bob"))
    assert await count(database, other) == 2
    await ledger.close()
    assert list((tmp_path / "ledger").iterdir()) == []
    os.close(dead._descriptor)


async def test_hundreds_of_lost_deliveries_are_recorded_by_few_statements(
    database: Database, dsn: str, tmp_path: Path
) -> None:
    job_id, _ = await completed_job(database)
    dead = Spool.create(tmp_path / "ledger", uuid.uuid4())
    left = [lost(job_id, number, number + 1, 1000, daemon_id=dead.owner) for number in range(400)]
    await dead.append([replace(event, outcome=Outcome.RUNNING) for event in left])
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)
    ledger = await open_ledger(database, tmp_path / "ledger")
    assert query(dsn, "SELECT count(*), count(DISTINCT xmin::text) FROM download_events") == [(400, 1)]
    assert query(dsn, "SELECT received::text FROM download_progress") == [("{[0,400)}",)]
    await ledger.close()
    os.close(dead._descriptor)


async def test_one_rejected_event_among_hundreds_costs_few_statements(
    database: Database, ledger: DownloadLedger, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None of them goes by the spool, however slow the machine is.
    for module in ("ledger", "replay"):
        monkeypatch.setattr(f"exportd.counting.{module}.WRITE_TIMEOUT_SECONDS", 60.0)
    job_id, _ = await completed_job(database)
    statements = 0
    real = database.fetch_all

    async def fetch_all(*arguments: object) -> object:
        nonlocal statements
        statements += 1
        return await real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(database, "fetch_all", fetch_all)
    events = [event(job_id) for _ in range(499)]
    events.insert(300, event(job_id, requested=((5, 1),)))
    await asyncio.gather(*map(ledger.record, events))
    assert statements < 30
    assert await count(database, job_id) == 499


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize(
    ("go_wrong", "be_right_again"),
    [
        (
            "ALTER TABLE download_progress RENAME TO elsewhere",
            "ALTER TABLE elsewhere RENAME TO download_progress",
        ),
        (
            "CREATE FUNCTION object() RETURNS trigger LANGUAGE plpgsql AS"
            " $$ BEGIN RAISE EXCEPTION 'maintenance'; END $$;"
            "CREATE TRIGGER object BEFORE UPDATE ON export_jobs FOR EACH ROW EXECUTE FUNCTION object()",
            "DROP TRIGGER object ON export_jobs",
        ),
    ],
    ids=["a table is missing", "a trigger objects"],
)
@pytest.mark.fresh_database
async def test_a_database_that_refuses_for_a_while_costs_no_count(
    database: Database, ledger: DownloadLedger, dsn: str, go_wrong: str, be_right_again: str
) -> None:
    job_id, _ = await completed_job(database)
    query(dsn, go_wrong)
    try:
        with structlog.testing.capture_logs() as logs:
            async with asyncio.timeout(60):
                await asyncio.gather(ledger.record(event(job_id)), ledger.record(part(job_id, 0, 999)))
                while not any(line["event"] == "spool_not_drained" for line in logs):
                    await asyncio.sleep(0.01)
        assert ledger.spooled == 2
    finally:
        query(dsn, be_right_again)
    await until_spooled(ledger, 0)
    assert await count(database, job_id) == 1
    await ledger.record(part(job_id, 999, 1000))
    assert await count(database, job_id) == 2


@pytest.mark.usefixtures("quickly")
async def test_an_event_is_kept_after_any_error(
    database: Database, ledger: DownloadLedger, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id, _ = await completed_job(database)
    with monkeypatch.context() as patched:

        async def fail(*_: object) -> None:
            raise OSError(24, "Too many open files")

        patched.setattr(database, "fetch_all", fail)
        await ledger.record(event(job_id))
        assert ledger.spooled == 1

        async def fail_too(*_: object) -> None:
            raise RuntimeError("can't start new thread")

        patched.setattr(ledger._spool, "append", fail_too)
        with pytest.raises(RuntimeError):
            await ledger.record(event(job_id))
        assert ledger.spooled == 2
    await until_spooled(ledger, 0)
    assert await count(database, job_id) == 2


@pytest.mark.usefixtures("quickly")
@pytest.mark.parametrize("way", ["a whole one", "a part"])
async def test_new_events_wait_behind_adopted_events_of_the_same_job(
    database: Database, dsn: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr("exportd.counting.ledger._START_SECONDS", 0.05)
    job_id, _ = await completed_job(database)
    dead = Spool.create(tmp_path / "ledger", uuid.uuid4())
    if way == "a whole one":
        # It was written down while it ran; then its end could not be.
        whole = event(job_id, daemon_id=dead.owner)
        await write_running(
            database, [replace(whole, outcome=Outcome.RUNNING, received=((0, 400),), bytes_sent=400)]
        )
        await dead.append([whole])
        later = [part(job_id, 400, 1000)]
    else:
        await dead.append([part(job_id, 0, 500, daemon_id=dead.owner)])
        later = [event(job_id), part(job_id, 500, 1000)]
    fcntl.flock(dead._descriptor, fcntl.LOCK_UN)
    with locked(dsn, job_id):
        ledger = await open_ledger(database, tmp_path / "ledger")
        await until_spooled(ledger, 1)
        for recorded in later:
            await ledger.record(recorded)
        assert ledger.spooled == 1 + len(later)
    await until_spooled(ledger, 0)
    assert await count(database, job_id) == 1
    assert query(dsn, "SELECT outcome FROM download_events WHERE outcome = 'lost'") == []
    await ledger.close()
    os.close(dead._descriptor)

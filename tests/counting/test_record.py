"""What a record costs does not grow with the history, and writing together counts as one after the other."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import psycopg2
import pytest
from psycopg2.extras import register_uuid

from exportd.counting import record as downloads
from exportd.counting.grouping import one_statement
from exportd.counting.record import record_downloads
from exportd.counting.running import checkpoint_downloads
from exportd.db.pool import Database
from exportd.domain.delivery import DownloadEvent, Outcome
from tests.counting.test_ledger import completed_job, count, event, lost, part
from tests.support.postgres import query

register_uuid()
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)
HISTORY = 8000


def groups(events: list[DownloadEvent]) -> list[list[DownloadEvent]]:
    found = []
    while events:
        may_join = one_statement()
        found.append([event for event in events if may_join(event)])
        events = [event for event in events if event not in found[-1]]
    return found


def deliveries(random: Random, job_id: uuid.UUID) -> list[DownloadEvent]:
    """What may happen to three principals of a package of 1000 bytes, in the order of the records."""
    places = [0, 0, 0, 200, 400, 500, 700, 800, 900, 1000]
    daemons = [uuid.UUID(int=1), uuid.UUID(int=2)]
    events = []
    for _ in range(random.randint(2, 25)):
        start, stop = sorted(random.sample(range(10), 2))
        begins, ends = places[start], places[stop] or 1000
        acknowledged, sent = sorted(random.randint(begins, ends) for _ in range(2))
        outcome = random.choice([*["completed", "aborted", "lost"] * 4, "whole"])
        if outcome == "whole":
            begins, ends = 0, 1000
        if outcome in ("completed", "whole"):
            acknowledged = sent = ends
        events.append(
            event(
                job_id,
                user_id=random.choice(["ann", "ann", "bob"]),
                outcome=Outcome.COMPLETED if outcome == "whole" else outcome,
                started_at=LONG_AGO + timedelta(seconds=random.randint(0, 50) * 10),
                requested=((begins, ends),),
                received=((begins, acknowledged),) if acknowledged > begins else (),
                bytes_sent=sent - begins,
                daemon_id=random.choice(daemons),
            )
        )
    return events


async def write(database: Database, dsn: str, groups: list[list[DownloadEvent]]) -> list[tuple[Any, ...]]:
    """The count, and what each has in the end."""
    lost = [event for group in groups for event in group if event.outcome == "lost"]
    await checkpoint_downloads(database, [replace(event, outcome=Outcome.RUNNING) for event in lost])
    query(
        dsn, "UPDATE download_events SET updated_at = started_at + interval '15 s' WHERE outcome = 'running'"
    )
    for group in groups:
        await record_downloads(database, group)
    job_id = groups[0][0].job_id
    rows = query(
        dsn,
        "SELECT user_id, received::text, completed_at > '-infinity' FROM download_progress WHERE job_id = %s"
        " ORDER BY user_id",
        (job_id,),
    )
    return [(await count(database, job_id),), *((user, received) for user, received, _ in rows)]


@pytest.mark.parametrize("seed", range(20))
async def test_writing_together_counts_as_writing_one_after_the_other(
    database: Database, dsn: str, seed: int
) -> None:
    random = Random(seed)
    for _ in range(10):
        together, singly = (await completed_job(database))[0], (await completed_job(database))[0]
        events = deliveries(random, together)
        same = [replace(event, job_id=singly, event_id=uuid.uuid4()) for event in events]
        assert len(groups(events)) == 1
        assert await write(database, dsn, groups(events)) == await write(
            database, dsn, [[one] for one in same]
        )


@pytest.mark.parametrize("outcome", ["aborted", "lost"])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
async def test_an_interrupted_delivery_and_its_resume_may_share_a_statement(
    database: Database, dsn: str, outcome: str, order: list[int]
) -> None:
    job_id, _ = await completed_job(database)
    broken = event(
        job_id,
        outcome=outcome,
        started_at=LONG_AGO,
        received=((0, 400),),
        bytes_sent=700,
        daemon_id=uuid.uuid4(),
    )
    both = [broken, part(job_id, 600, 1000, started_at=LONG_AGO + timedelta(seconds=20))]
    assert await write(database, dsn, [[both[number] for number in order]]) == [(1,), ("ann", "{}")]


async def test_a_resume_counts_from_its_own_turn_on(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    broken = event(job_id, outcome=Outcome.ABORTED, started_at=LONG_AGO, received=((0, 400),), bytes_sent=700)
    earlier = part(job_id, 600, 1000, started_at=LONG_AGO - timedelta(seconds=1))
    resume = part(job_id, 600, 700, started_at=LONG_AGO + timedelta(seconds=1))
    assert await write(database, dsn, [[broken, earlier, resume]]) == [(1,), ("ann", "{}")]


async def test_hundreds_of_one_principals_broken_connections_are_a_few_statements() -> None:
    job_id = uuid.uuid4()
    dropped = [part(job_id, number, number + 1, outcome=Outcome.ABORTED) for number in range(600)]
    assert [len(group) for group in groups(dropped)] == [50] * 12
    others = [part(uuid.uuid4(), 0, 1) for _ in range(300)]
    assert [len(group) for group in groups([*dropped, *others])] == [350, *[50] * 11]


async def test_a_later_event_does_not_overtake_a_waiting_one_of_its_principal() -> None:
    job_id = uuid.uuid4()
    events = [part(job_id, number, number + 1) for number in range(51)]
    last = event(job_id)
    assert [group[-1] for group in groups([*events, last])] == [events[49], last]


@pytest.fixture
async def history(database: Database, dsn: str) -> uuid.UUID:
    """A job of which one principal has thousands of bytes, each by a delivery of its own: completed ones, and
    some that broke off and may have brought more."""
    job_id, _ = await completed_job(database)
    query(
        dsn,
        "INSERT INTO download_events (event_id, job_id, user_id, started_at, duration_seconds, outcome,"
        " http_status, requested, received, bytes_sent, package_size_bytes, request_id, daemon_id)"
        " SELECT gen_random_uuid(), %s, 'ann', now() - interval '1 hour' + make_interval(secs => n * 0.1), 1,"
        "        CASE n %% 2 WHEN 0 THEN 'completed' ELSE 'aborted' END, 206,"
        "        int8multirange(int8range(3 * n, 3 * n + 2)), int8multirange(int8range(3 * n, 3 * n + 1)), 2,"
        "        100000, '', gen_random_uuid()"
        "   FROM generate_series(1, %s) AS n",
        (job_id, HISTORY),
    )
    query(
        dsn,
        "INSERT INTO download_progress (job_id, user_id, received)"
        " SELECT job_id, user_id, range_agg(part) FROM download_events, unnest(received) AS part"
        "  GROUP BY 1, 2",
    )
    query(dsn, "ANALYZE download_events")
    return job_id


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for inner in plan.get("Plans", ()) for node in nodes(inner))]


def rows_read(dsn: str, events: list[DownloadEvent]) -> float:
    """How many rows of the events' table the record of those looks at."""
    columns = downloads.columns_of(events) | {"is_whole": [event.is_whole for event in events]}
    with psycopg2.connect(dsn) as connection, connection.cursor() as cursor:
        statement = f"EXPLAIN (ANALYZE, FORMAT JSON) {downloads.RECORD_DOWNLOADS}"
        cursor.execute(statement, columns)
        row = cursor.fetchone()
        assert row is not None
        connection.rollback()
    found = 0.0
    for node in nodes(row[0][0]["Plan"]):
        if node.get("Relation Name") == "download_events" and node["Node Type"] != "ModifyTable":
            removed = node.get("Rows Removed by Filter", 0) + node.get("Rows Removed by Index Recheck", 0)
            found += (node["Actual Rows"] + removed) * node["Actual Loops"]
    connection.close()
    return found


@pytest.mark.fresh_database
async def test_a_record_looks_at_few_rows_whatever_the_principal_did_before(
    history: uuid.UUID, dsn: str
) -> None:
    resuming = part(history, 30_000, 30_001, package_size_bytes=100_000)
    assert rows_read(dsn, [resuming]) <= 64
    broken = event(
        history,
        outcome=Outcome.ABORTED,
        started_at=LONG_AGO,
        received=((0, 500),),
        bytes_sent=30_000,
        package_size_bytes=100_000,
    )
    assert rows_read(dsn, [broken]) <= 64
    assert rows_read(dsn, [resuming, broken, part(history, 5, 6, package_size_bytes=100_000)]) <= 4 * 64
    # Who downloads the whole is none the worse for anybody's history.
    assert rows_read(dsn, [event(history, package_size_bytes=100_000)]) == 0


@pytest.mark.fresh_database
async def test_the_largest_pieces_of_a_scattered_progress_are_kept(
    history: uuid.UUID, database: Database, dsn: str
) -> None:
    await record_downloads(database, [part(history, 50_000, 60_000, package_size_bytes=100_000)])
    pieces = query(dsn, "SELECT unnest(received)::text FROM download_progress")
    assert len(pieces) == 500
    assert ("[50000,60000)",) in pieces
    # They are the beginning of a whole download like any other.
    await record_downloads(database, [part(history, 0, 50_000, package_size_bytes=100_000)])
    assert await count(database, history) == 0
    await record_downloads(database, [part(history, 60_000, 100_000, package_size_bytes=100_000)])
    assert await count(database, history) == 1


@pytest.mark.parametrize("outcome", ["aborted", "lost"])
async def test_a_resume_among_very_many_is_compared_with_the_last_that_broke_off_before_it(
    database: Database, dsn: str, outcome: str
) -> None:
    job_id, _ = await completed_job(database)
    killed, now = uuid.uuid4(), datetime.now(UTC)
    broken = event(
        job_id,
        outcome=outcome,
        started_at=now - timedelta(seconds=100),
        received=((0, 400),),
        bytes_sent=700,
        daemon_id=killed,
    )
    await record_downloads(database, [broken])
    query(dsn, "UPDATE download_events SET updated_at = now() - interval '95 s'")
    # A long delivery began then, and ends when many others have come and gone.
    resume = part(job_id, 600, 1000, started_at=now - timedelta(seconds=90))
    later = [
        event(
            job_id,
            outcome=Outcome.ABORTED,
            started_at=now - timedelta(seconds=80) + timedelta(milliseconds=number),
            received=((0, 1),),
            bytes_sent=2,
        )
        for number in range(100)
    ]
    await record_downloads(database, later)
    await record_downloads(database, [resume])
    assert await count(database, job_id) == 1


@pytest.mark.parametrize("outcome", ["aborted", "lost"])
async def test_a_resume_explains_an_interrupted_delivery_recorded_later(
    database: Database, dsn: str, outcome: str
) -> None:
    """A connection that hung is given up a minute later; what a killed daemon left is found later."""
    job_id, _ = await completed_job(database)
    began = datetime.now(UTC) - timedelta(seconds=60)
    broken = event(
        job_id,
        outcome=outcome,
        started_at=began,
        received=((0, 400),),
        bytes_sent=700,
        daemon_id=uuid.uuid4(),
    )
    await checkpoint_downloads(database, [replace(broken, outcome=Outcome.RUNNING)])
    query(dsn, "UPDATE download_events SET updated_at = started_at + interval '1 s'")
    await record_downloads(database, [part(job_id, 600, 1000, started_at=began + timedelta(seconds=2))])
    assert await count(database, job_id) == 0
    await record_downloads(database, [broken])
    assert await count(database, job_id) == 1


async def test_a_resume_infers_nothing_if_the_byte_before_it_was_received(database: Database) -> None:
    job_id, _ = await completed_job(database)
    for broken in (lost(job_id, 0, 200, 1000), part(job_id, 500, 700)):
        await record_downloads(database, [broken])
    await record_downloads(database, [part(job_id, 700, 1000)])
    assert await count(database, job_id) == 0


@pytest.mark.parametrize("outcome", ["aborted", "lost"])
async def test_a_delivery_may_break_off_before_anything_of_it_is_acknowledged(
    database: Database, dsn: str, outcome: str
) -> None:
    for order in ([0, 1], [1, 0]):
        for together in (True, False):
            job_id, _ = await completed_job(database)
            broken = event(
                job_id,
                outcome=outcome,
                started_at=LONG_AGO,
                requested=((100, 1000),),
                received=(),
                bytes_sent=600,
                daemon_id=uuid.uuid4(),
            )
            resume = part(job_id, 600, 1000, started_at=LONG_AGO + timedelta(seconds=20))
            both = [[broken, resume][number] for number in order]
            await record_downloads(database, [part(job_id, 0, 100, started_at=LONG_AGO)])
            assert (await write(database, dsn, [both] if together else [[one] for one in both]))[0] == (1,)


@pytest.mark.parametrize("is_alone", [True, False])
async def test_a_lost_delivery_that_ends_whole_after_all_counts_and_serves_once(
    database: Database, dsn: str, is_alone: bool
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, started_at=LONG_AGO)
    await record_downloads(
        database, [replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)]
    )
    others = (
        [] if is_alone else [event(job_id), event(job_id, user_id="bob"), part(job_id, 0, 1, user_id="eve")]
    )
    for _ in range(2):
        await record_downloads(database, [end, *others])
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [
        (1, 1000) if is_alone else (3, 3001)
    ]


async def test_a_lost_delivery_that_was_resumed_and_ends_after_all_joins_what_came_since(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, started_at=LONG_AGO, outcome=Outcome.ABORTED, received=((0, 450),), bytes_sent=450)
    await record_downloads(
        database, [replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)]
    )
    await record_downloads(database, [part(job_id, 400, 1000, started_at=LONG_AGO + timedelta(seconds=10))])
    assert await count(database, job_id) == 1
    await record_downloads(database, [end])
    assert query(dsn, "SELECT received::text FROM download_progress") == [("{[400,450)}",)]
    await record_downloads(database, [part(job_id, 450, 1000)])
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(1, 1600)]


async def test_a_lost_delivery_that_was_resumed_and_ends_whole_after_all_is_no_second_download(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, started_at=LONG_AGO)
    await record_downloads(
        database, [replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)]
    )
    await record_downloads(database, [part(job_id, 400, 1000, started_at=LONG_AGO + timedelta(seconds=10))])
    await record_downloads(database, [end])
    # With the next one's first bytes, it is: all of both has come.
    assert await count(database, job_id) == 1
    await record_downloads(database, [part(job_id, 0, 400)])
    assert await count(database, job_id) == 2


@pytest.mark.parametrize("is_together", [True, False])
@pytest.mark.parametrize(("order", "expected"), [([0, 1], "{[0,450),[700,999)}"), ([1, 0], "{[0,999)}")])
async def test_a_resume_uses_the_real_end_of_a_delivery_once_recorded_as_lost(
    database: Database, dsn: str, order: list[int], expected: str, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, started_at=LONG_AGO, outcome=Outcome.ABORTED, received=((0, 450),), bytes_sent=500)
    await record_downloads(
        database, [replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)]
    )
    query(dsn, "UPDATE download_events SET updated_at = started_at + interval '1 s'")
    resume = part(job_id, 700, 999, started_at=LONG_AGO + timedelta(seconds=10))
    both = [[end, resume][number] for number in order]
    for group in [both] if is_together else [[one] for one in both]:
        await record_downloads(database, group)
    assert query(dsn, "SELECT received::text FROM download_progress") == [(expected,)]


async def test_a_delivery_of_an_empty_package_that_was_taken_for_lost_counts_when_it_ends(
    database: Database,
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, package_size_bytes=0, requested=((0, 0),), received=(), bytes_sent=0)
    await record_downloads(database, [replace(end, outcome=Outcome.LOST)])
    await record_downloads(database, [end])
    assert await count(database, job_id) == 1


def after(seconds: float) -> datetime:
    return LONG_AGO + timedelta(seconds=seconds)


def broken_off(job_id: uuid.UUID, began: float, seconds: float = 1, **changes: Any) -> DownloadEvent:
    values = {"outcome": "aborted", "received": ((0, 400),), "bytes_sent": 700, **changes}
    return event(job_id, started_at=after(began), duration_seconds=seconds, **values)


async def record(database: Database, events: list[DownloadEvent], is_together: bool) -> None:
    for group in [events] if is_together else [[one] for one in events]:
        await record_downloads(database, group)


together = pytest.mark.parametrize("is_together", [True, False])


@together
@pytest.mark.parametrize("is_one", [True, False])
async def test_a_delivery_after_the_completion_counts_even_if_recorded_late(
    database: Database, is_one: bool, is_together: bool
) -> None:
    """The database was away for an hour, or the daemon's clock is behind by one."""
    job_id, _ = await completed_job(database)
    second = event(job_id, started_at=after(10)) if is_one else part(job_id, 500, 1000, started_at=after(10))
    events = [part(job_id, 0, 500, started_at=after(0)), second, broken_off(job_id, 20)]
    await record(database, [*events, part(job_id, 600, 1000, started_at=after(30))], is_together)
    assert await count(database, job_id) == 2


@together
async def test_a_whole_delivery_alone_is_noted_with_its_own_end(
    database: Database, dsn: str, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    await record_downloads(database, [part(job_id, 0, 500, started_at=after(0))])
    whole = [event(job_id, started_at=after(began), duration_seconds=1) for began in (10, 30, 20)]
    await record(database, whole, is_together)
    assert query(dsn, "SELECT completed_at FROM download_progress") == [(after(31),)]


@together
async def test_a_delivery_that_ran_on_when_the_package_was_whole_is_not_over(
    database: Database, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    first = [part(job_id, 0, 500, started_at=after(0)), part(job_id, 500, 1000, started_at=after(10))]
    both = [event(job_id, started_at=after(20), duration_seconds=5), broken_off(job_id, 20, 10)]
    resume = part(job_id, 600, 1000, started_at=after(40))
    await record(database, [*first, *both, resume], is_together)
    assert await count(database, job_id) == 3


@together
@pytest.mark.parametrize("is_replayed", [True, False])
async def test_a_delivery_that_ended_before_the_completion_joins_nothing(
    database: Database, dsn: str, is_replayed: bool, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    events = [broken_off(job_id, 40), part(job_id, 400, 1000, started_at=after(50))]
    if is_replayed:
        # Another daemon's record of an earlier download comes in late.
        events += [part(job_id, 0, 500, started_at=after(0)), part(job_id, 500, 1000, started_at=after(10))]
    await record(database, [*events, part(job_id, 600, 1000, started_at=after(60))], is_together)
    assert query(dsn, "SELECT received::text FROM download_progress") == [("{[600,1000)}",)]


@together
async def test_a_resume_that_was_counted_explains_no_delivery_that_breaks_off_later(
    database: Database, dsn: str, is_together: bool
) -> None:
    """The connection hung; the client went on in two others meanwhile."""
    job_id, _ = await completed_job(database)
    hung = broken_off(job_id, 0, 60)
    others = [part(job_id, start, start + 500, started_at=after(10)) for start in (0, 500)]
    await record(database, [*others, hung], is_together)
    assert query(dsn, "SELECT received::text FROM download_progress") == [("{[0,400)}",)]


@together
async def test_a_resume_goes_on_from_the_nearest_that_is_not_over(
    database: Database, dsn: str, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    near = broken_off(job_id, 10, received=((0, 500),))
    whole = part(job_id, 500, 1000, started_at=after(20))
    far = broken_off(job_id, 0, 60, received=((0, 300),))
    resume = part(job_id, 600, 999, started_at=after(70))
    await record(database, [near, whole, far, resume], is_together)
    assert query(dsn, "SELECT received::text FROM download_progress") == [("{[0,999)}",)]


async def test_a_lost_delivery_that_makes_the_package_whole_does_so_when_it_is_recorded(
    database: Database, dsn: str
) -> None:
    """Its client went on long ago, and has the whole: it does not count as one that may resume."""
    job_id, _ = await completed_job(database)
    await record_downloads(database, [part(job_id, 400, 1000, started_at=after(10))])
    await record_downloads(database, [lost(job_id, 0, 400, 1000, started_at=after(0))])
    assert await count(database, job_id) == 1
    assert query(dsn, "SELECT exportd_unfinished_downloads(%s)", (job_id,)) == []


@together
async def test_a_delivery_that_failed_after_bytes_were_sent_may_be_resumed_like_one_that_was_aborted(
    database: Database, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    resume = part(job_id, 600, 1000, started_at=after(10))
    await record(database, [broken_off(job_id, 0, outcome=Outcome.FAILED), resume], is_together)
    assert await count(database, job_id) == 1

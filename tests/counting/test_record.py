"""Records of deliveries: in batches or one by one, after faults, and of jobs that change."""

import uuid
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from random import Random
from typing import Any

import pytest
from psycopg2.extras import register_uuid

from exportd.counting.record import record_downloads
from exportd.counting.upkeep import judge_late_jobs, prune
from exportd.db.pool import Database, ValueRefused
from exportd.domain.delivery import DownloadEvent, Outcome
from tests.counting.test_ledger import DIGEST, completed_job, count, event, lost, part
from tests.support.postgres import query

register_uuid()
LONG_AGO = datetime.now(UTC) - timedelta(hours=1)


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
                started_at=LONG_AGO + timedelta(seconds=random.random() * 500),
                requested=((begins, ends),),
                received=((begins, acknowledged),) if acknowledged > begins else (),
                bytes_sent=sent - begins,
                daemon_id=random.choice(daemons),
            )
        )
    return events


def ended_at(event: DownloadEvent) -> datetime:
    return event.started_at + timedelta(seconds=event.duration_seconds)


async def write(database: Database, dsn: str, groups: list[list[DownloadEvent]]) -> list[tuple[Any, ...]]:
    """The count, and what each has in the end."""
    for group in groups:
        await record_downloads(database, group)
    job_id = groups[0][0].job_id
    rows = query(
        dsn,
        "SELECT user_id, received::text, tails, resumes FROM download_progress WHERE job_id = %s"
        " ORDER BY user_id",
        (job_id,),
    )
    return [(await count(database, job_id),), *rows]


@pytest.mark.parametrize("seed", range(20))
async def test_writing_together_counts_as_writing_one_after_the_other(
    database: Database, dsn: str, seed: int
) -> None:
    """Each kill's deliveries are one record; a batch is written in the order of the deliveries' ends."""
    random = Random(seed)
    for _ in range(10):
        together, singly = (await completed_job(database))[0], (await completed_job(database))[0]
        events = deliveries(random, together)
        kills = {event.daemon_id: event for event in events if event.outcome == "lost"}
        events = [event for event in events if event.outcome != "lost" or event is kills[event.daemon_id]]
        same = [
            replace(event, job_id=singly, event_id=uuid.uuid4()) for event in sorted(events, key=ended_at)
        ]
        random.shuffle(events)
        assert await write(database, dsn, [events]) == await write(database, dsn, [[one] for one in same])


@pytest.mark.parametrize("outcome", ["aborted", "lost"])
@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
async def test_an_interrupted_delivery_and_its_resume_may_share_a_batch(
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
    assert await write(database, dsn, [[both[number] for number in order]]) == [(1,)]


async def test_a_resume_counts_from_its_own_turn_on(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    broken = event(job_id, outcome=Outcome.ABORTED, started_at=LONG_AGO, received=((0, 400),), bytes_sent=700)
    earlier = part(job_id, 600, 1000, started_at=LONG_AGO - timedelta(seconds=1))
    resume = part(job_id, 600, 700, started_at=LONG_AGO + timedelta(seconds=1))
    assert await write(database, dsn, [[broken, earlier, resume]]) == [(1,)]


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
    await record_downloads(database, [part(job_id, 600, 1000, started_at=began + timedelta(seconds=2))])
    assert await count(database, job_id) == 0
    await record_downloads(database, [broken])
    assert await count(database, job_id) == 1


async def test_a_resume_infers_nothing_if_the_byte_before_it_was_received(database: Database) -> None:
    job_id, _ = await completed_job(database)
    for broken in (lost(job_id, 0, 200, 1000), part(job_id, 500, 700, started_at=LONG_AGO)):
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


@pytest.mark.parametrize(
    ("order", "is_together", "expected"),
    [
        ([0, 1], False, "{[0,450),[700,999)}"),
        ([1, 0], False, "{[0,999)}"),
        # A batch is recorded in the order of the ends.
        ([0, 1], True, "{[0,450),[700,999)}"),
        ([1, 0], True, "{[0,450),[700,999)}"),
    ],
)
async def test_a_resume_uses_the_real_end_of_a_delivery_once_recorded_as_lost(
    database: Database, dsn: str, order: list[int], expected: str, is_together: bool
) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id, started_at=LONG_AGO, outcome=Outcome.ABORTED, received=((0, 450),), bytes_sent=500)
    await record_downloads(
        database, [replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)]
    )
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


@pytest.mark.parametrize(
    ("column", "limit"), [("integer", 2**31 - 1), ("smallint", 2**15 - 1), ("bigint", 2**63 - 1)]
)
@pytest.mark.fresh_database
async def test_a_column_of_bytes_that_is_too_small_costs_no_count(
    database: Database, dsn: str, column: str, limit: int
) -> None:
    job_id, _ = await completed_job(database)
    query(dsn, f"ALTER TABLE export_jobs ALTER COLUMN bytes_served TYPE {column}")
    query(dsn, "UPDATE export_jobs SET bytes_served = %s", (limit - 1500,))
    await record_downloads(database, [event(job_id)])
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(1, limit - 500)]
    await record_downloads(database, [event(job_id)])
    for start in (0, 500):
        await record_downloads(database, [part(job_id, start, start + 500)])
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(3, limit)]


async def test_a_package_that_is_made_again_shares_no_progress(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    for digest in ("a" * 64, "b" * 64):
        await record_downloads(database, [part(job_id, 0, 500, package_sha256=digest)])
    # The record of a delivery of the first package may come late.
    await record_downloads(database, [part(job_id, 500, 999, package_sha256="a" * 64)])
    assert await count(database, job_id) == 0
    await record_downloads(database, [part(job_id, 500, 1000, package_sha256="b" * 64)])
    assert await count(database, job_id) == 1
    await record_downloads(database, [event(job_id, package_sha256="b" * 64)])
    assert query(dsn, "SELECT package_sha256, received::text FROM download_progress") == [
        ("a" * 64, "{[0,999)}")
    ]
    await record_downloads(database, [part(job_id, 999, 1000, package_sha256="a" * 64)])
    assert await count(database, job_id) == 3


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_delivery_without_a_digest_is_one_of_the_present_package(
    database: Database, dsn: str, is_whole: bool
) -> None:
    """The spool of an earlier version has no digests."""
    job_id, _ = await completed_job(database)
    await record_downloads(database, [part(job_id, 0, 500, package_sha256=DIGEST)])
    await record_downloads(database, [event(job_id) if is_whole else part(job_id, 500, 1000)])
    assert await count(database, job_id) == 1
    assert query(dsn, "SELECT count(*) FROM download_progress") == [(0,)]


@pytest.mark.parametrize("is_whole", [True, False])
async def test_a_delivery_counts_when_its_job_comes_later(
    database: Database, dsn: str, is_whole: bool
) -> None:
    """A standby that took over without the job's row gets it from the application."""
    job_id = uuid.uuid4()
    parts = [event(job_id)] if is_whole else [part(job_id, 0, 500), part(job_id, 500, 1000)]
    for _ in range(2):
        for one in parts:
            await record_downloads(database, [one])
    await judge_late_jobs(database)
    assert query(dsn, "SELECT bool_or(is_judged) FROM download_events") == [(False,)]
    await completed_job(database, job_id)
    for _ in range(2):
        await judge_late_jobs(database)
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(1, 1000)]
    assert query(dsn, "SELECT bool_and(is_judged) FROM download_events") == [(True,)]


async def test_a_delivery_lost_before_its_job_came_counts_by_its_end(database: Database, dsn: str) -> None:
    job_id = uuid.uuid4()
    end = event(job_id)
    await record_downloads(
        database, [replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)]
    )
    await completed_job(database, job_id)
    await record_downloads(database, [end])
    await judge_late_jobs(database)
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(1, 1000)]


async def test_a_loss_and_an_end_in_one_batch_are_one_end(database: Database, dsn: str) -> None:
    job_id, _ = await completed_job(database)
    end = event(job_id)
    loss = replace(end, outcome=Outcome.LOST, received=((0, 400),), bytes_sent=400)
    for batch in ([end, loss, end], [loss], [loss, end]):
        await record_downloads(database, batch)
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(1, 1000)]


async def test_the_end_of_a_recorded_delivery_removes_a_checkpoint_that_came_late(
    database: Database, dsn: str
) -> None:
    job_id, _ = await completed_job(database)
    end = part(job_id, 0, 500)
    await record_downloads(database, [end])
    query(
        dsn,
        "INSERT INTO exportd_running SELECT event_id, job_id, user_id, daemon_id, started_at, http_status,"
        " requested, package_size_bytes, package_sha256, request_id, 1, 1, 1, now() FROM download_events",
    )
    await record_downloads(database, [replace(end, outcome=Outcome.LOST)])
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(0,)]
    assert query(dsn, "SELECT outcome FROM download_events") == [("completed",)]


async def test_a_batch_of_hundreds_counts_each_principal_and_job(database: Database, dsn: str) -> None:
    jobs = [(await completed_job(database))[0] for _ in range(5)]
    batch = [
        part(job_id, start, start + 500, user_id=f"user {number}")
        for job_id in jobs
        for number in range(50)
        for start in (0, 500)
    ]
    assert len(batch) == 500
    await record_downloads(database, batch)
    assert query(dsn, "SELECT download_count, bytes_served FROM export_jobs") == [(50, 50_000)] * 5
    assert query(dsn, "SELECT count(DISTINCT xmin::text) FROM download_events") == [(1,)]


async def test_progress_with_a_deleted_package_is_pruned(database: Database, dsn: str) -> None:
    kept, deleted, made_again = [(await completed_job(database))[0] for _ in range(3)]
    for job_id in (kept, deleted, made_again, uuid.uuid4()):
        await record_downloads(database, [part(job_id, 0, 500)])
    query(dsn, "UPDATE export_jobs SET package_path = NULL WHERE job_id = %s", (str(deleted),))
    query(dsn, "UPDATE export_jobs SET package_sha256 = 'other' WHERE job_id = %s", (str(made_again),))
    query(dsn, "UPDATE download_progress SET updated_at = now() - interval '2 days'")
    assert await prune(database, 0) == 0
    assert query(dsn, "SELECT job_id FROM download_progress") == [(kept,)]
    await record_downloads(database, [part(kept, 500, 1000)])
    assert await count(database, kept) == 1


async def test_a_text_that_is_not_unicode_is_refused(database: Database) -> None:
    job_id, _ = await completed_job(database)
    for text in ("\ud800", "\0"):
        with pytest.raises(ValueRefused):
            await record_downloads(database, [event(job_id, user_id=text)])

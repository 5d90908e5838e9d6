"""What the tables tell of downloads."""

import uuid

from exportd.counting.record import record_downloads
from exportd.db.pool import Database
from exportd.db.statistics import find_statistics
from exportd.domain.sizes import LOWER_BOUNDS, SIZE_RANGES
from exportd.domain.statistics import FailureCount
from tests.counting.test_ledger import completed_job, event, part


async def test_a_job_that_was_never_downloaded_has_nothing_to_tell(database: Database) -> None:
    job_id, _ = await completed_job(database)
    found = await find_statistics(database, job_id, LOWER_BOUNDS)
    assert found is not None
    assert (found.user_id, found.download_count, found.unique_users) == ("ann", 0, 0)
    assert (found.sizes, found.failures, found.recent) == ([], [], [])
    assert await find_statistics(database, uuid.uuid4(), LOWER_BOUNDS) is None


async def test_downloads_are_told_by_size_user_and_failure(database: Database) -> None:
    job_id, _ = await completed_job(database)
    other, _ = await completed_job(database)
    large = {"package_size_bytes": 5_000_000, "bytes_sent": 5_000_000}
    for given in (
        event(job_id, duration_seconds=1.0),
        event(job_id, duration_seconds=3.0, user_id="root"),
        event(other, duration_seconds=2.0, received=((0, 5_000_000),), requested=((0, 5_000_000),), **large),
        part(job_id, 0, 100, duration_seconds=50.0),
        event(job_id, outcome="aborted", reason="stalled", received=((0, 4),)),
        event(job_id, outcome="aborted", reason="stalled", received=((0, 4),), user_id="eve"),
        event(job_id, outcome="changed", received=()),
    ):
        await record_downloads(database, [given])

    of_one = await find_statistics(database, job_id, LOWER_BOUNDS)
    assert of_one is not None
    assert (of_one.download_count, of_one.unique_users) == (2, 2)
    assert [(SIZE_RANGES[item.range_number], item.downloads) for item in of_one.sizes] == [("under_1MB", 2)]
    assert of_one.sizes[0].average_duration_seconds == 2.0
    assert of_one.sizes[0].average_bytes_per_second == 500.0
    assert of_one.failures == [FailureCount("aborted", "stalled", 2), FailureCount("changed", "", 1)]
    assert len(of_one.recent) == 6
    assert [item.outcome for item in of_one.recent][:3] == ["changed", "aborted", "aborted"]

    of_all = await find_statistics(database, None, LOWER_BOUNDS)
    assert of_all is not None
    assert (of_all.job_id, of_all.user_id, of_all.download_count) == (None, None, 3)
    assert [(SIZE_RANGES[item.range_number], item.downloads) for item in of_all.sizes] == [
        ("under_1MB", 2),
        ("1MB_to_10MB", 1),
    ]
    assert of_all.sizes[1].average_bytes_per_second == 2_500_000
    assert len(of_all.recent) == 7

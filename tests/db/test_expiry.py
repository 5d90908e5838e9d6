"""Whoever completes a job, its package gets its expiry from the database."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from exportd.db.migrate import migrate_up
from tests.support.postgres import query

COMPLETED = datetime(2026, 1, 31, 12, 30, tzinfo=UTC)


def insert(dsn: str, **columns: object) -> str:
    job_id = str(uuid.uuid4())
    row: dict[str, object] = {"job_id": job_id, "user_id": "ann", **columns}
    query(
        dsn,
        f"INSERT INTO export_jobs ({', '.join(row)}) VALUES ({', '.join(['%s'] * len(row))})",
        tuple(row.values()),
    )
    return job_id


def expiry(dsn: str, job_id: str) -> datetime | None:
    ((found,),) = query(dsn, "SELECT package_expires_at FROM export_jobs WHERE job_id = %s", (job_id,))
    expires_at: datetime | None = found
    return expires_at


def complete(dsn: str, job_id: str, sets: str) -> None:
    query(dsn, f"UPDATE export_jobs SET {sets} WHERE job_id = %s", (job_id,))


def test_a_job_inserted_as_completed_expires_by_its_retention(dsn: str) -> None:
    completed = {"status": "completed", "package_path": "a.tar.gz", "completed_at": COMPLETED}
    assert expiry(dsn, insert(dsn, **completed)) == COMPLETED + timedelta(days=30)
    assert expiry(dsn, insert(dsn, **completed, package_retention_days=7)) == COMPLETED + timedelta(days=7)


def test_a_retention_of_null_keeps_the_package_for_ever(dsn: str) -> None:
    job_id = insert(dsn, status="completed", package_path="a.tar.gz", package_retention_days=None)
    assert expiry(dsn, job_id) is None


def test_an_expiry_that_is_given_stays(dsn: str) -> None:
    job_id = insert(dsn, status="completed", package_path="a.tar.gz", package_expires_at=COMPLETED)
    assert expiry(dsn, job_id) == COMPLETED


@pytest.mark.parametrize(
    "steps",
    [
        ["status = 'completed', package_path = 'a.tar.gz'"],
        ["package_path = 'a.tar.gz'", "status = 'completed'"],
        ["status = 'completed'", "package_path = 'a.tar.gz'"],
        ["status = 'processing'", "package_path = 'a.tar.gz'", "status = 'completed', completed_at = now()"],
    ],
)
def test_an_update_that_completes_a_job_sets_its_expiry(dsn: str, steps: list[str]) -> None:
    job_id = insert(dsn, status="pending")
    for step in steps:
        assert expiry(dsn, job_id) is None
        complete(dsn, job_id, step)
    found = query(
        dsn,
        "SELECT package_expires_at = completed_at + interval '30 days',"
        " completed_at > now() - interval '1 minute' FROM export_jobs WHERE job_id = %s",
        (job_id,),
    )
    assert found == [(True, True)]


def test_a_package_that_was_there_before_gets_no_expiry_by_later_updates(empty_dsn: str) -> None:
    query(empty_dsn, "CREATE TABLE export_jobs (job_id uuid PRIMARY KEY, user_id text, status text)")
    job_id = insert(empty_dsn, status="completed")
    query(empty_dsn, "ALTER TABLE export_jobs ADD COLUMN package_path text DEFAULT 'old.tar.gz'")
    migrate_up(empty_dsn)
    complete(empty_dsn, job_id, "status = 'completed'")
    complete(empty_dsn, job_id, "package_path = 'moved.tar.gz'")
    assert expiry(empty_dsn, job_id) is None


def test_times_without_a_zone_are_those_of_the_session_that_completes_the_job(empty_dsn: str) -> None:
    query(
        empty_dsn,
        "CREATE TYPE job_status AS ENUM ('queued', 'completed');"
        "CREATE TABLE export_jobs (job_id uuid PRIMARY KEY, user_id integer, status job_status,"
        " completed_at timestamp)",
    )
    migrate_up(empty_dsn)
    query(
        empty_dsn,
        "SET timezone = 'Asia/Tokyo'; INSERT INTO export_jobs (job_id, user_id, status, package_path)"
        " VALUES (gen_random_uuid(), 1, 'completed', 'a.tar.gz')",
    )
    assert query(
        empty_dsn,
        "SELECT package_expires_at - (completed_at AT TIME ZONE 'Asia/Tokyo'),"
        " abs(extract(epoch FROM now() - package_expires_at + interval '30 days')) < 60 FROM export_jobs",
    ) == [(timedelta(days=30), True)]

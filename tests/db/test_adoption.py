"""An application's own table works with every statement of exportd, or is refused with the reason."""

import contextlib
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from uuid import UUID

import psycopg2
import pytest
import structlog

from exportd.db import migrate
from exportd.db.adoption import COLUMNS, find_problems
from exportd.db.expiry import take_expired
from exportd.db.indexes import build_indexes
from exportd.db.job_details import list_jobs
from exportd.db.jobs import JobFinder, sum_packages
from exportd.db.migrate import MigrationError, check_not_replaced, migrate_up
from exportd.db.pool import open_database
from exportd.db.statistics import find_statistics
from exportd.db.verification import list_packages
from tests.db.test_pool import OPTIONS
from tests.jobs.test_expired_packages import RAISE, REFUSALS, frozen
from tests.support.daemon import wait_for
from tests.support.postgres import query

JOB = "11111111-2222-3333-4444-555555555555"
TABLE = "CREATE TABLE export_jobs (job_id uuid PRIMARY KEY, user_id text, status text, {})"
ROW = f"INSERT INTO export_jobs (job_id, user_id, status) VALUES ('{JOB}', 'ann', 'completed')"

SAMPLES = {
    "jsonb": "'{}'", "json": "'{}'", "text": "'x'", "character varying": "'x'",
    "character": "'x'", "bigint": "1", "integer": "1", "smallint": "1", "numeric": "1", "uuid": f"'{JOB}'",
    "timestamp with time zone": "now()", "timestamp without time zone": "now()",
}  # fmt: skip
TYPES = [(column, kind) for column, use in COLUMNS.items() for kind in use.types]


@pytest.mark.parametrize(("column", "kind"), TYPES)
def test_every_type_of_the_list_is_adopted(empty_dsn: str, column: str, kind: str) -> None:
    query(empty_dsn, TABLE.format(f"{column} {kind} DEFAULT {SAMPLES[kind]}"))
    query(empty_dsn, ROW)
    migrate_up(empty_dsn)
    assert find_problems(empty_dsn, is_migrating=False) == []


@pytest.mark.parametrize(
    ("column", "kind"),
    [
        ("tool_data", "text"),
        ("completed_at", "bigint"),
        ("created_at", "bigint"),
        ("last_downloaded_at", "bigint"),
        ("package_expires_at", "text"),
        ("package_size_bytes", "text"),
        ("package_size_bytes", "double precision"),
        ("package_size_bytes", "numeric"),
        ("package_retention_days", "interval"),
        ("package_path", "bytea"),
        ("download_count", "money"),
        ("package_path", "character(50)"),
    ],
)
def test_another_type_is_refused_with_its_cure(empty_dsn: str, column: str, kind: str) -> None:
    query(empty_dsn, TABLE.format(f"{column} {kind}"))
    with pytest.raises(MigrationError) as refused:
        migrate_up(empty_dsn)
    (_, line) = str(refused.value).splitlines()
    assert re.match(rf"  {column} is of type {kind.partition('(')[0]}; exportd needs ", line)
    assert f"ALTER TABLE export_jobs ALTER COLUMN {column} TYPE " in line
    assert query(empty_dsn, "SELECT to_regclass('download_events')") == [(None,)]


@pytest.mark.parametrize(
    ("columns", "sentences"),
    [
        ("package_path text NOT NULL DEFAULT ''", ["package_path may not be null"]),
        (
            "package_path text NOT NULL, package_size_bytes bigint NOT NULL DEFAULT 0",
            ["package_path may not be null", "package_size_bytes may not be null"],
        ),
        (
            "size bigint, package_size_bytes bigint GENERATED ALWAYS AS (size) STORED",
            ["package_size_bytes is a generated column"],
        ),
        (
            "package_path text, package_size_bytes text, tool_data text",
            ["package_size_bytes is of type text", "tool_data is of type text"],
        ),
    ],
)
def test_every_problem_is_one_line(empty_dsn: str, columns: str, sentences: list[str]) -> None:
    query(empty_dsn, TABLE.format(columns))
    problems = find_problems(empty_dsn, is_migrating=True)
    assert [problem.startswith(sentence) for problem, sentence in zip(problems, sentences, strict=True)]
    assert all("ALTER TABLE" in problem for problem in problems)


def test_a_type_below_a_domain_is_the_type(empty_dsn: str) -> None:
    query(empty_dsn, "CREATE DOMAIN size AS bigint CHECK (VALUE >= 0); CREATE DOMAIN location AS bytea")
    query(empty_dsn, TABLE.format("package_size_bytes size, package_path location"))
    (problem,) = find_problems(empty_dsn, is_migrating=True)
    assert problem.startswith("package_path is of type bytea")


def test_statuses_in_upper_case_are_refused(empty_dsn: str) -> None:
    query(empty_dsn, TABLE.format("package_path text"))
    query(empty_dsn, ROW.replace("completed", "COMPLETED"))
    (problem,) = find_problems(empty_dsn, is_migrating=True)
    assert problem.startswith("status holds 'COMPLETED', and exportd looks for 'completed'")


@pytest.mark.parametrize(
    ("kind", "sql"),
    [
        ("a view", "CREATE VIEW export_jobs AS SELECT * FROM jobs"),
        ("a materialized view", "CREATE MATERIALIZED VIEW export_jobs AS SELECT * FROM jobs"),
    ],
)
def test_a_view_in_place_of_the_table_is_refused(empty_dsn: str, kind: str, sql: str) -> None:
    query(empty_dsn, TABLE.format("package_path text").replace("export_jobs", "jobs"))
    query(empty_dsn, sql)
    with pytest.raises(MigrationError, match=f"public.export_jobs is {kind}"):
        migrate_up(empty_dsn)


def test_a_table_in_another_schema_is_not_replaced_by_an_empty_one(empty_dsn: str) -> None:
    query(empty_dsn, "CREATE SCHEMA app")
    query(empty_dsn, TABLE.format("package_path text").replace("export_jobs", "app.export_jobs"))
    with pytest.raises(MigrationError, match="SET search_path = app"):
        migrate_up(empty_dsn)
    assert query(empty_dsn, "SELECT to_regclass('export_jobs')") == [(None,)]
    there = psycopg2.extensions.make_dsn(empty_dsn, options="-c search_path=app")
    migrate_up(there)
    assert query(empty_dsn, "SELECT to_regclass('app.download_events')") != [(None,)]


@pytest.fixture
def role(empty_dsn: str) -> Iterator[str]:
    """A role without rights; the connection string of the database as this role."""
    ((name,),) = query(empty_dsn, "SELECT 'role_' || current_database()")
    query(empty_dsn, f"CREATE ROLE {name} LOGIN; REVOKE CREATE ON SCHEMA public FROM public")
    yield psycopg2.extensions.make_dsn(empty_dsn, user=name)
    query(empty_dsn, f"DROP OWNED BY {name}; DROP ROLE {name}")


def test_a_role_without_rights_is_told_which(empty_dsn: str, role: str) -> None:
    assert [problem.partition(":")[0] for problem in find_problems(role, is_migrating=True)] == [
        f"the role {psycopg2.extensions.parse_dsn(role)['user']} may not create tables in the schema public"
    ]
    query(empty_dsn, TABLE.format("package_path text"))
    problems = find_problems(role, is_migrating=True)
    assert [re.sub("role_\\w+", "ROLE", problem.partition(":")[0]) for problem in problems] == [
        "the role ROLE may not create tables in the schema public",
        "the role ROLE does not own export_jobs, which gets columns, indexes and triggers",
        "the role ROLE lacks rights on export_jobs",
    ]
    with pytest.raises(MigrationError, match=r"GRANT SELECT, INSERT, UPDATE ON public\.export_jobs"):
        migrate_up(role)


def test_row_level_security_that_hides_rows_is_refused(empty_dsn: str, role: str) -> None:
    name = psycopg2.extensions.parse_dsn(role)["user"]
    query(empty_dsn, TABLE.format("package_path text"))
    query(
        empty_dsn,
        f"ALTER TABLE export_jobs ENABLE ROW LEVEL SECURITY; GRANT ALL ON export_jobs TO {name};"
        "CREATE POLICY own ON export_jobs USING (user_id = current_user)",
    )
    (problem,) = find_problems(role, is_migrating=False)
    assert problem.startswith("row level security of export_jobs hides rows")
    assert find_problems(empty_dsn, is_migrating=False) == []


@pytest.mark.fresh_database
@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_row_that_cannot_be_changed_is_found(dsn: str, refusal: str) -> None:
    query(dsn, f"UPDATE export_jobs SET package_path = 'p'; {ROW}")
    query(dsn, "UPDATE export_jobs SET package_path = 'p', package_size_bytes = 1")
    before = query(dsn, "SELECT * FROM export_jobs")
    query(dsn, REFUSALS[refusal])
    problems = find_problems(dsn, is_migrating=False)
    assert problems
    assert all(re.search("may not be null|does not let exportd record", problem) for problem in problems)
    assert query(dsn, "SELECT * FROM export_jobs") == before


def test_a_locked_row_is_not_waited_for(dsn: str) -> None:
    query(dsn, ROW)
    with psycopg2.connect(dsn) as blocker:
        blocker.cursor().execute("SELECT FROM export_jobs FOR UPDATE")
        assert find_problems(dsn, is_migrating=True) == []
    blocker.close()


@pytest.mark.fresh_database
@pytest.mark.parametrize(
    ("kind", "days"), [("bigint", 10**12), ("integer", 10**9), ("numeric", 10**9), ("integer", -(10**9))]
)
def test_exportds_trigger_fails_no_statement_of_the_application(dsn: str, kind: str, days: int) -> None:
    query(dsn, f"ALTER TABLE export_jobs ALTER COLUMN package_retention_days TYPE {kind}")
    query(dsn, ROW.replace("completed", "pending"))
    query(
        dsn,
        "UPDATE export_jobs SET status = 'completed', package_path = 'p', package_retention_days = %s",
        (days,),
    )
    assert query(dsn, "SELECT status, package_path, package_expires_at FROM export_jobs") == [
        ("completed", "p", None)
    ]


@pytest.mark.fresh_database
def test_a_trigger_of_the_application_that_raises_is_found_once_for_each_change(dsn: str) -> None:
    query(dsn, ROW)
    query(dsn, frozen("TRIGGER frozen BEFORE UPDATE ON export_jobs", RAISE))
    assert find_problems(dsn, is_migrating=False) == [
        f"export_jobs does not let exportd record {what}: completed jobs are frozen"
        for what in ("a download", "that a package is deleted")
    ]


def test_the_documentation_lists_the_types() -> None:
    text = (Path(__file__).parent.parent.parent / "docs" / "your-table.md").read_text()
    table = text.partition("## Types that work")[2].partition("\n\n`exportd migrate check`")[0]
    documented = {
        column: tuple(re.findall("`([^`]+)`", types))
        for columns, types in re.findall(r"^\| (`[^|]+`) \| (`[^|]+`) \|$", table, re.MULTILINE)
        for column in re.findall("`([^`]+)`", columns)
    }
    assert documented.pop("job_id") == ("uuid",)
    assert documented == {column: use.types for column, use in COLUMNS.items()}


def locked(dsn: str) -> psycopg2.extensions.connection:
    """A transaction of the application that has read the table and is idle now."""
    there = psycopg2.extensions.make_dsn(dsn, application_name="report")
    connection = psycopg2.connect(there)
    connection.cursor().execute("SELECT count(*) FROM export_jobs")
    return connection


def test_a_migration_lets_no_statement_wait_behind_a_lock(
    empty_dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(migrate, "_LOCK_PAUSE_SECONDS", 0.3)
    query(empty_dsn, TABLE.format("package_path text"))
    query(empty_dsn, ROW)
    blocker = locked(empty_dsn)
    with structlog.testing.capture_logs() as logs, ThreadPoolExecutor() as threads:
        migrating = threads.submit(migrate_up, empty_dsn)
        wait_for("a refused lock", lambda: len(logs) > 1)
        for _ in range(20):
            # The limit is generous: what waits behind a lock waits until the blocker ends.
            query(empty_dsn, "SET statement_timeout = '10s'; SELECT * FROM export_jobs")
        assert not migrating.done()
        blocker.rollback()
        assert "0005.guest" in migrating.result(60)
    blocker.close()
    named = r"the table export_jobs is locked by session \d+ \(report of \w+, idle in transaction\)"
    assert re.fullmatch(named, logs[0]["error"])


def test_a_lock_that_is_never_released_is_reported(empty_dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(migrate, "_MAX_LOCK_SECONDS", 0.0)
    query(empty_dsn, TABLE.format("package_path text"))
    blocker = locked(empty_dsn)
    with pytest.raises(MigrationError, match=rf"locked by session {blocker.info.backend_pid} \(report of"):
        migrate_up(empty_dsn)
    blocker.close()
    assert migrate_up(empty_dsn)


@pytest.mark.parametrize("zone", ["Asia/Kolkata", "America/New_York"])
async def test_times_without_a_zone_are_in_the_zone_of_the_database(empty_dsn: str, zone: str) -> None:
    """As the application writes and reads them."""
    ((name,),) = query(empty_dsn, "SELECT current_database()")
    query(empty_dsn, f"ALTER DATABASE {name} SET timezone = '{zone}'")
    columns = ("created_at", "completed_at", "package_expires_at")
    query(empty_dsn, TABLE.format(", ".join(f"{column} timestamp" for column in columns)))
    migrate_up(empty_dsn)
    query(empty_dsn, ROW.replace("completed", "pending"))
    query(
        empty_dsn,
        "UPDATE export_jobs"
        "   SET status = 'completed', package_path = 'p', completed_at = now(), package_retention_days = 1",
    )
    ((completed, expires),) = query(
        empty_dsn, "SELECT completed_at::timestamptz, now() + interval '1 day' FROM export_jobs"
    )
    database = await open_database(empty_dsn, **OPTIONS)  # type: ignore[arg-type]
    job = await JobFinder(database).find_job(UUID(JOB))
    await database.close()
    assert job is not None
    assert job.completed_at == completed
    assert job.package_expires_at is not None
    assert abs(job.package_expires_at - expires) < timedelta(hours=1)


@pytest.mark.fresh_database
async def test_values_that_no_type_forbids_fail_nothing(dsn: str) -> None:
    query(dsn, "ALTER TABLE export_jobs ALTER COLUMN tool_data TYPE json, ALTER COLUMN user_id DROP NOT NULL")
    insert = """
    INSERT INTO export_jobs (job_id, user_id, status, package_path, package_size_bytes, download_count,
                             bytes_served, tool_data, created_at, completed_at, package_expires_at)
    VALUES (gen_random_uuid(), %s, 'completed', 'p', 9223372036854775807, 9223372036854775807,
            9223372036854775807, %s, %s, %s, %s)
    """
    for user, tool, created, moment in (
        ("ann", r'{"name": "a\u0000b"}', "10000-01-01", "10000-01-01"),
        (None, r'{"name": "\ud800"}', "2026-01-01", "0044-03-15 BC"),
        ("ann", r'{"name": "\ud83d\ude00"}', "infinity", "infinity"),
        ("ann", "[1]", "2026-01-01", "-infinity"),
        # No page could follow these two, so they are not listed.
        ("ann", "7", None, None),
        ("ann", "8", "0044-03-15 BC", None),
    ):
        query(dsn, insert, (user, tool, created, moment, moment))
    database = await open_database(dsn, **OPTIONS)  # type: ignore[arg-type]
    listed = await list_jobs(database, user_id=None, status=None, before=None, limit=10)
    assert sorted((details.job.user_id, details.job.tool_name) for details in listed) == [
        ("", ""), ("ann", ""), ("ann", ""), ("ann", "\U0001f600")
    ]  # fmt: skip
    states = await sum_packages(database)
    assert sum(jobs for jobs, _ in states.values()) == 6
    for job_id in (None, listed[0].job.job_id):
        assert await find_statistics(database, job_id, [1]) is not None
    assert len(await list_packages(database, None, None)) == 6
    await take_expired(database, None, 10, timedelta(days=1), lock=False)
    await database.close()


@pytest.mark.fresh_database
def test_a_table_that_was_replaced_is_noticed_and_migrated_again(dsn: str) -> None:
    check_not_replaced(dsn)
    query(
        dsn,
        "ALTER TABLE export_jobs RENAME TO old;"
        "CREATE TABLE export_jobs (LIKE old INCLUDING DEFAULTS INCLUDING INDEXES)",
    )
    query(dsn, "ALTER TABLE export_jobs DROP COLUMN package_suspect_since")
    with pytest.raises(MigrationError, match="lacks package_suspect_since, exportd_expiry_of_new_jobs"):
        check_not_replaced(dsn)
    migrate_up(dsn)
    check_not_replaced(dsn)
    query(dsn, ROW)


@pytest.mark.fresh_database
def test_a_table_that_was_dropped_is_made_again(dsn: str) -> None:
    query(dsn, "DROP TABLE export_jobs")
    with pytest.raises(MigrationError, match="run `exportd migrate up`"):
        check_not_replaced(dsn)
    migrate_up(dsn)
    check_not_replaced(dsn)


def test_an_index_whose_building_was_interrupted_is_built_again(empty_dsn: str) -> None:
    migrate_up(empty_dsn)
    query(
        empty_dsn,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'exportd_jobs_by_path'::regclass;"
        "DROP INDEX exportd_jobs_by_user",
    )
    assert build_indexes(empty_dsn) == ["exportd_jobs_by_user", "exportd_jobs_by_path"]
    assert build_indexes(empty_dsn) == []
    assert query(empty_dsn, "SELECT count(*) FROM pg_index WHERE NOT indisvalid") == [(0,)]


class Application:
    """Reads and writes the table all the time, and waits no longer than a second for a lock."""

    def __init__(self, dsn: str) -> None:
        self.errors: list[psycopg2.Error] = []
        self._dsn = psycopg2.extensions.make_dsn(dsn, options="-c lock_timeout=1000")
        self._stop = threading.Event()
        statements = (
            f"SELECT count(*) FROM (SELECT FROM export_jobs WHERE job_id = '{JOB}') AS found",
            f"UPDATE export_jobs SET status = status WHERE job_id = '{JOB}'",
            "INSERT INTO export_jobs (job_id, user_id, status) VALUES (gen_random_uuid(), 'ann', 'pending')",
        )
        self._threads = [threading.Thread(target=self._run, args=(one,)) for one in statements]
        for thread in self._threads:
            thread.start()

    def _run(self, statement: str) -> None:
        with contextlib.closing(psycopg2.connect(self._dsn)) as connection:
            connection.autocommit = True
            while not self._stop.is_set():
                try:
                    connection.cursor().execute(statement)
                except psycopg2.Error as error:
                    self.errors.append(error)

    def finish(self) -> list[psycopg2.Error]:
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.errors


@pytest.mark.slow
def test_two_million_rows_are_adopted_while_the_application_works(empty_dsn: str) -> None:
    query(empty_dsn, TABLE.format("created_at timestamptz DEFAULT now()"))
    query(empty_dsn, ROW)
    query(
        empty_dsn,
        "INSERT INTO export_jobs SELECT gen_random_uuid(), 'user ' || n %% 1000, 'pending'"
        "  FROM generate_series(1, 2000000) AS n",
        (),
    )
    application = Application(empty_dsn)
    try:
        migrate_up(empty_dsn)
    finally:
        errors = application.finish()
    assert errors == []
    assert find_problems(empty_dsn, is_migrating=False) == []

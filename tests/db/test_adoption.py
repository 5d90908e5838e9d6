"""An application's own table works with every statement of exportd, or is refused with the reason."""

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg2
import pytest
import structlog

from exportd.db import migrate
from exportd.db.adoption import COLUMNS, find_problems
from exportd.db.migrate import MigrationError, migrate_up
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

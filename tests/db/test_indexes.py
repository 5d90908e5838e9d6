"""Statements that must stay quick with millions of rows use indexes: PostgreSQL's own plans say so."""

import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import pytest
from psycopg2.extras import register_uuid

from exportd.counting import record, upkeep
from exportd.db import job_details, jobs, links, packing, re_exports, statistics
from exportd.db.expiry import _FIND_UNFINISHED, FIND_SHARING, TAKE_EXPIRED
from exportd.limits import quota
from tests.support.postgres import query

# The planner goes by statistics, which rows of earlier tests would leave behind.
pytestmark = pytest.mark.fresh_database

register_uuid()
JOB = uuid.UUID(int=7)
STATISTICS = {"job_id": JOB, "bounds": [1, 2], "recent": 20}
PAGE = {"user_id": "user-5", "status": "pending", "created_at": datetime.now(UTC), "job_id": JOB, "limit": 21}


@pytest.fixture
def large_dsn(dsn: str) -> str:
    """Enough rows that reading a table whole is what the planner avoids where it can."""
    query(
        dsn,
        "INSERT INTO export_jobs (job_id, user_id, status, created_at, package_path, package_expires_at,"
        "                         completed_at)"
        " SELECT gen_random_uuid(), 'user-' || n %% 500,"
        "        CASE n %% 50 WHEN 0 THEN 'pending' ELSE 'completed' END, now() - make_interval(mins => n),"
        "        'p-' || n, now() + make_interval(mins => n - 200),"
        "        CASE n %% 50 WHEN 0 THEN NULL ELSE now() END"
        "   FROM generate_series(1, 30000) AS n",
    )
    query(
        dsn,
        "INSERT INTO download_events (event_id, job_id, user_id, started_at, duration_seconds, outcome,"
        " http_status, requested, received, bytes_sent, package_size_bytes, request_id)"
        " SELECT gen_random_uuid(), job_id, user_id, created_at, 1, 'completed', 200, '{[0,9)}', '{[0,9)}',"
        "        9, 9, '' FROM export_jobs, generate_series(1, 3)",
    )
    query(
        dsn,
        "INSERT INTO download_progress (job_id, user_id, package_size_bytes, package_sha256)"
        " SELECT job_id, user_id, 9, '' FROM export_jobs",
    )
    query(
        dsn,
        "INSERT INTO exportd_running"
        " SELECT event_id, job_id, user_id, event_id, started_at, 200, requested, 9, '', '', 0, 0, 0, now()"
        "   FROM download_events",
    )
    query(
        dsn,
        "INSERT INTO exportd_download_links (ticket_sha256, job_id, user_id, is_admin, start_until,"
        "                                    resume_until)"
        " SELECT sha256(job_id::text::bytea), job_id, user_id, false, created_at,"
        "        created_at + interval '20 days'"
        "   FROM export_jobs",
    )
    connection = psycopg2.connect(dsn)
    connection.autocommit = True
    connection.cursor().execute("VACUUM ANALYZE")
    connection.close()
    return dsn


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for inner in plan.get("Plans", ()) for node in nodes(inner))]


LARGE = (
    "export_jobs", "download_events", "download_progress", "exportd_running", "exportd_download_links",
)  # fmt: skip
STATEMENTS: dict[str, tuple[str, Any]] = {
    "look-up": (jobs._FIND_JOBS, ([JOB],)),
    "list of all": (job_details.LIST_ALL, PAGE),
    "list by status": (job_details.LIST_BY_STATUS, PAGE),
    "list of a user": (job_details.LIST_BY_USER, PAGE),
    "list of a user by status": (job_details.LIST_BY_USER_AND_STATUS, PAGE),
    "one job": (job_details.FIND_JOBS, ([JOB],)),
    "an export's jobs": (re_exports.FIND_FAMILY, (JOB,)),
    "a user's re-exports": (re_exports.COUNT_WAITING, ("ann",)),
    "running downloads": (job_details.FIND_RUNNING_DOWNLOADS, ([JOB],)),
    "the cleanup's search": (
        TAKE_EXPIRED,
        {"expires_at": "-infinity", "job_id": JOB, "limit": 100, "grace": timedelta(hours=24)},
    ),
    "who shares a package": (FIND_SHARING, (["p-5", "/root/p-5"],)),
    "who may resume": (_FIND_UNFINISHED, (JOB, "ann")),
    "a packer's search": (packing.TAKE_JOB, {"packer_id": JOB}),
    "statistics: the job": (statistics._FIND_JOB, STATISTICS),
    "statistics: users": (statistics._COUNT_USERS, STATISTICS),
    "statistics: sizes": (statistics._SUM_BY_SIZE, STATISTICS),
    "statistics: failures": (statistics._COUNT_FAILURES, STATISTICS),
    "statistics: recent": (statistics._LIST_RECENT, STATISTICS),
    "the last day's bytes": (quota.REACH_QUOTA, {"user_id": "user-5", "limit": 10**9}),
    "a link": (links.FIND_LINK, (b"x" * 32,)),
    "links of a job": (links.REVOKE_LINKS, {"job_id": JOB, "user_id": None}),
    "old links": (links.PRUNE_LINKS, ()),
    "old events": (upkeep._PRUNE_EVENTS, (365, 5000)),
    "deliveries of late jobs": (upkeep._FIND_JUDGEABLE, (JOB, 500)),
    "known deliveries": (record._FIND_EVENTS, ([JOB],)),
    "progress": (record._FIND_PROGRESS, ([JOB], ["user-5"])),
}


@pytest.fixture
def explain(large_dsn: str) -> Any:
    connection = psycopg2.connect(large_dsn)

    def explain(statement: str, parameters: Any) -> list[dict[str, Any]]:
        with connection.cursor() as cursor:
            cursor.execute(f"EXPLAIN (FORMAT JSON) {statement}", parameters)
            row = cursor.fetchone()
            assert row is not None
            return nodes(row[0][0]["Plan"])

    yield explain
    connection.close()


def test_no_statement_reads_a_table_whole(explain: Any) -> None:
    whole = {
        name: node["Relation Name"]
        for name, (statement, parameters) in STATEMENTS.items()
        for node in explain(statement, parameters)
        if node["Node Type"] == "Seq Scan" and node["Relation Name"] in LARGE
    }
    assert not whole


def test_pages_come_in_order_without_sorting(explain: Any) -> None:
    for name in ("list of all", "list by status", "list of a user", "the cleanup's search"):
        statement, parameters = STATEMENTS[name]
        plan = explain(statement, parameters)
        # The sub-select of one row's re-export may sort its few.
        top = [node for node in plan if node.get("Parent Relationship") != "SubPlan"][:2]
        assert [node["Node Type"] for node in top][-1] in ("Index Scan", "Index Scan Backward"), (name, plan)

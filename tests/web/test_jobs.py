"""Jobs over HTTP: the list and its pages, one job, and asking for an export again."""

import asyncio
import base64
import uuid
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exportd.web.edge.errors import InvalidParameter
from exportd.web.jobs.list import _parse_cursor
from tests.support.application import ADMIN, ANN, BASE, EVE, Jobs, Start, bearer, until_idle
from tests.support.postgres import query

LONG_AGO = datetime.now(UTC) - timedelta(days=3)
PENDING = {"status": "pending", "package_path": None, "completed_at": None, "package_expires_at": None}


async def get(client: Any, path: str, headers: dict[str, str] = ANN) -> tuple[int, Any]:
    async with client.get(path, headers=headers) as response:
        assert response.headers["Cache-Control"] == "no-store"
        return response.status, await response.json()


async def pages(client: Any, parameters: str, headers: dict[str, str] = ANN) -> list[str]:
    """Every job id, page by page."""
    found: list[str] = []
    cursor = ""
    while True:
        status, page = await get(client, f"{BASE}?{parameters}{cursor}", headers)
        assert status == 200
        found += [job["jobId"] for job in page["jobs"]]
        if page["nextCursor"] is None:
            return found
        assert page["jobs"]
        cursor = f"&cursor={page['nextCursor']}"


@pytest.mark.parametrize("limit", [1, 2, 7, 100])
async def test_the_pages_together_are_the_whole_list_newest_first(
    start: Start, jobs: Jobs, limit: int
) -> None:
    client = await start()
    moments = [LONG_AGO + timedelta(seconds=n // 3) for n in range(12)]
    made = [jobs.add(created_at=at, user_id="ann" if n % 4 else "eve") for n, at in enumerate(moments)]
    rows = query(
        jobs.dsn, "SELECT job_id::text, user_id FROM export_jobs ORDER BY created_at DESC, job_id DESC"
    )
    assert len(rows) == len(made)
    assert await pages(client, f"limit={limit}") == [job_id for job_id, user in rows if user == "ann"]
    assert await pages(client, f"limit={limit}", EVE) == [job_id for job_id, user in rows if user == "eve"]
    assert await pages(client, f"limit={limit}", ADMIN) == [job_id for job_id, _ in rows]


async def test_the_status_narrows_the_list(start: Start, jobs: Jobs) -> None:
    client = await start()
    done, waiting = jobs.add(), jobs.add(**PENDING)
    for headers in (ANN, ADMIN):
        assert await pages(client, "status=completed&limit=1", headers) == [done.job_id]
        assert await pages(client, "status=pending", headers) == [waiting.job_id]
        assert await pages(client, "status=failed", headers) == []
    assert await pages(client, "status=pending", EVE) == []


async def test_a_job_that_is_made_meanwhile_shifts_no_page(start: Start, jobs: Jobs) -> None:
    client = await start()
    first, second = (jobs.add(created_at=LONG_AGO + timedelta(seconds=n)) for n in range(2))
    _, page = await get(client, f"{BASE}?limit=1")
    assert [job["jobId"] for job in page["jobs"]] == [second.job_id]
    jobs.add()
    _, page = await get(client, f"{BASE}?limit=1&cursor={page['nextCursor']}")
    assert [job["jobId"] for job in page["jobs"]] == [first.job_id]


@pytest.mark.parametrize(
    "created_at",
    [
        "2025-10-24T12:00:00+16:00", "2025-10-24T12:00:00-23:59", "0001-01-01T00:00:00+00:00",
        "0001-01-01T00:00:00+23:00", "9999-12-31T23:59:59-23:59", "9999-12-31T23:59:59.999999+00:00",
        "infinity", "now", "2025-10-24", "\0", "\ud800", "",
    ],
)  # fmt: skip
async def test_any_time_in_a_cursor_is_a_page_or_a_bad_parameter(start: Start, created_at: str) -> None:
    text = f"{created_at} {uuid.uuid4()}".encode("utf-8", "surrogatepass")
    client = await start()
    cursor = base64.urlsafe_b64encode(text).decode()
    async with client.get(f"{BASE}?cursor={cursor}", headers=ANN) as response:
        assert response.status in (200, 400)
        if response.status == 400:
            assert (await response.json())["parameter"] == "cursor"


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("limit", "0"), ("limit", "101"), ("limit", "-1"), ("limit", "x"), ("limit", ""), ("limit", "9" * 30),
     ("limit", "%C2%B2"), ("status", "done"), ("status", ""), ("status", "'"), ("cursor", ""),
     ("cursor", "x"), ("cursor", "AAAA"), ("cursor", "%00"), ("cursor", "%F0%9F%98%80")],
)  # fmt: skip
async def test_a_bad_parameter_is_named(start: Start, jobs: Jobs, parameter: str, value: str) -> None:
    client = await start()
    status, body = await get(client, f"{BASE}?{parameter}={value}")
    assert (status, body["code"], body["parameter"]) == (400, "INVALID_PARAMETER", parameter)


@given(
    st.text()
    | st.binary().map(lambda raw: base64.urlsafe_b64encode(raw).decode())
    | st.text().map(lambda text: base64.urlsafe_b64encode(f"2025-01-01 {text}".encode()).decode())
)
def test_a_made_up_cursor_is_refused_or_taken_and_nothing_else(text: str) -> None:
    try:
        before = _parse_cursor(text)
    except InvalidParameter:
        return
    assert before is not None
    assert before[0].tzinfo is not None


async def test_the_list_and_one_job_need_a_token(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    for path in (BASE, f"{BASE}/{package.job_id}", f"{BASE}/{package.job_id}/events"):
        assert (await get(client, path, {}))[0] == 401
    for leaf in ("", "/events"):
        assert (await get(client, f"{BASE}/{package.job_id}{leaf}", EVE))[1][
            "code"
        ] == "DOWNLOAD_UNAUTHORIZED"
        assert (await get(client, f"{BASE}/{uuid.uuid4()}{leaf}"))[1]["code"] == "JOB_NOT_FOUND"
        assert (await get(client, f"{BASE}/nonsense{leaf}"))[1]["code"] == "INVALID_JOB_ID"


async def test_a_job_shows_all_its_fields(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(b"x" * 2048)
    status, job = await get(client, f"{BASE}/{package.job_id}")
    assert status == 200
    ((created, expires, digest),) = query(
        jobs.dsn, "SELECT created_at, package_expires_at, package_sha256 FROM export_jobs"
    )
    assert datetime.fromisoformat(job.pop("createdAt")) == created
    assert datetime.fromisoformat(job["package"].pop("expiresAt")) == expires
    assert job == {
        "jobId": package.job_id, "userId": "ann", "tool": "Customer Form", "status": "completed",
        "percent": None, "failureReason": None, "completedAt": "2025-10-24T12:00:00.900000+00:00",
        "downloadCount": 0, "lastDownloadedAt": None, "reExportOf": None, "reExportedAs": None,
        "package": {"state": "available", "sizeBytes": 2048, "size": "2.0 KB", "sha256": digest,
                    "fileName": "export-customer-form-2025-10-24.tar.gz"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "state"),
    [({"package_expires_at": LONG_AGO}, "expired"), ({"package_path": None}, "deleted"),
     ({"package_suspect_since": LONG_AGO}, "suspect"), ({}, "available")],
)  # fmt: skip
async def test_the_state_of_the_package_is_told(
    start: Start, jobs: Jobs, columns: dict[str, object], state: str
) -> None:
    client = await start()
    package = jobs.add(**columns)
    _, job = await get(client, f"{BASE}/{package.job_id}")
    assert job["package"]["state"] == state


# Exporting again.


async def again(client: Any, job_id: str, headers: dict[str, str] = ANN) -> tuple[int, Any, Any]:
    async with client.post(f"{BASE}/{job_id}/re-export", headers=headers) as response:
        return response.status, await response.json(), response.headers


async def test_an_expired_export_is_made_again_as_a_new_job(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(
        package_expires_at=LONG_AGO, pack_source="/srv/x", package_retention_days=7, download_count=5
    )
    listener = psycopg2.connect(jobs.dsn)
    listener.autocommit = True
    listener.cursor().execute("LISTEN export_requested")
    status, job, headers = await again(client, package.job_id, ADMIN)
    assert status == 202
    assert headers["Location"] == f"{BASE}/{job['jobId']}"
    assert (job["status"], job["userId"], job["tool"], job["reExportOf"], job["package"]) == (
        "pending", "ann", "Customer Form", package.job_id, None,
    )  # fmt: skip
    rows = query(
        jobs.dsn,
        "SELECT pack_source, package_retention_days, download_count FROM export_jobs WHERE job_id = %s",
        (job["jobId"],),
    )
    assert rows == [("/srv/x", 7, 0)]
    listener.poll()
    assert [notify.payload for notify in listener.notifies] == [job["jobId"]]
    listener.close()
    assert (await get(client, headers["Location"]))[0] == 200
    _, old = await get(client, f"{BASE}/{package.job_id}")
    assert (old["status"], old["downloadCount"], old["reExportedAs"]) == ("completed", 5, job["jobId"])


@pytest.mark.parametrize(
    "columns",
    [{"package_expires_at": LONG_AGO}, {"package_path": None}, {"package_suspect_since": LONG_AGO},
     {"package_path": "gone"}, {"status": "failed", "package_path": None}],
    ids=["expired", "deleted", "damaged", "missing", "failed"],
)  # fmt: skip
async def test_a_missing_package_may_be_exported_again(
    start: Start, jobs: Jobs, columns: dict[str, object]
) -> None:
    client = await start()
    assert (await again(client, jobs.add(**columns).job_id))[0] == 202


async def test_an_available_or_running_export_is_not_repeated(start: Start, jobs: Jobs) -> None:
    client = await start()
    there, waiting = jobs.add(), jobs.add(**PENDING)
    old = jobs.add(package_expires_at=LONG_AGO)

    async def answer(job_id: str) -> tuple[int, str, str]:
        status, body, _ = await again(client, job_id)
        return status, body["code"], body["jobId"]

    assert await answer(there.job_id) == (409, "PACKAGE_AVAILABLE", there.job_id)
    assert await answer(waiting.job_id) == (409, "EXPORT_IN_PROGRESS", waiting.job_id)
    _, new, _ = await again(client, old.job_id)
    for status in ("pending", "processing"):
        query(jobs.dsn, "UPDATE export_jobs SET status = %s WHERE job_id = %s", (status, new["jobId"]))
        assert await answer(old.job_id) == (409, "EXPORT_IN_PROGRESS", new["jobId"])
    query(
        jobs.dsn,
        "UPDATE export_jobs SET status = 'completed', package_path = %s WHERE job_id = %s",
        (there.file.name, new["jobId"]),
    )
    assert await answer(old.job_id) == (409, "PACKAGE_AVAILABLE", new["jobId"])
    query(jobs.dsn, "UPDATE export_jobs SET package_path = NULL WHERE job_id = %s", (new["jobId"],))
    assert (await again(client, old.job_id))[0] == 202


GONE = {"package_path": None, "package_expires_at": LONG_AGO}


async def test_an_export_has_one_live_job_whichever_of_its_jobs_is_asked_for(
    start: Start, jobs: Jobs
) -> None:
    client = await start()
    first = jobs.add(**GONE)
    second = jobs.add(**GONE, re_export_of=first.job_id)
    third = jobs.add(**GONE, re_export_of=second.job_id)
    # A branch of its own, as an earlier version could make.
    fourth = jobs.add(**GONE, re_export_of=first.job_id)
    family = (first, second, third, fourth)
    status, live, _ = await again(client, third.job_id)
    assert status == 202
    for member in family:
        status, body, _ = await again(client, member.job_id)
        assert (status, body["code"], body["jobId"]) == (409, "EXPORT_IN_PROGRESS", live["jobId"])
    package = jobs.add(re_export_of=fourth.job_id)
    query(jobs.dsn, "DELETE FROM export_jobs WHERE job_id = %s", (live["jobId"],))
    for member in family:
        status, body, _ = await again(client, member.job_id)
        assert (status, body["code"], body["jobId"]) == (409, "PACKAGE_AVAILABLE", package.job_id)


async def test_a_ring_of_jobs_in_an_applications_table_is_an_export_too(start: Start, jobs: Jobs) -> None:
    client = await start()
    first = jobs.add(**GONE)
    second = jobs.add(**GONE, re_export_of=first.job_id)
    query(
        jobs.dsn, "UPDATE export_jobs SET re_export_of = %s WHERE job_id = %s", (second.job_id, first.job_id)
    )
    assert (await again(client, first.job_id))[0] == 202
    assert (await again(client, second.job_id))[0] == 409


async def test_after_failures_each_re_export_waits_longer(start: Start, jobs: Jobs) -> None:
    client = await start()
    old = jobs.add(**GONE, created_at=LONG_AGO)
    waits = []
    for _ in range(3):
        status, made, _ = await again(client, old.job_id)
        assert status == 202
        query(jobs.dsn, "UPDATE export_jobs SET status = 'failed' WHERE job_id = %s", (made["jobId"],))
        status, body, headers = await again(client, old.job_id)
        assert (status, body["code"], body["limit"]) == (429, "RATE_LIMITED", "re_export_after_failure")
        assert int(headers["Retry-After"]) == body["retryAfterSeconds"]
        waits.append(body["retryAfterSeconds"])
        query(
            jobs.dsn,
            "UPDATE export_jobs SET created_at = created_at - %s * interval '1 second'"
            " WHERE re_export_of IS NOT NULL",
            (body["retryAfterSeconds"],),
        )
    # Admins may try as soon as they like.
    assert waits == pytest.approx([60, 120, 240], abs=20)
    assert (await again(client, old.job_id, ADMIN))[0] == 202


async def test_a_user_has_so_many_re_exports_at_once(start: Start, jobs: Jobs) -> None:
    client = await start(limits={"re_exports_per_user": 3})
    gone = [jobs.add(**GONE) for _ in range(8)]
    answers = await asyncio.gather(*(again(client, package.job_id) for package in gone))
    assert sorted(status for status, _, _ in answers) == [202] * 3 + [429] * 5
    assert {body["limit"] for status, body, _ in answers if status == 429} == {"re_exports_per_user"}
    assert (await again(client, jobs.add(**GONE, user_id="eve").job_id, EVE))[0] == 202
    query(jobs.dsn, "UPDATE export_jobs SET status = 'failed' WHERE status = 'pending' AND user_id = 'ann'")
    assert (await again(client, jobs.add(**GONE).job_id))[0] == 202


async def test_only_the_creator_and_admins_can_export_again(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(package_expires_at=LONG_AGO)
    assert (await again(client, package.job_id, {}))[0] == 401
    assert (await again(client, package.job_id, EVE))[1]["code"] == "DOWNLOAD_UNAUTHORIZED"
    assert (await again(client, str(uuid.uuid4())))[1]["code"] == "JOB_NOT_FOUND"
    assert (await again(client, "x"))[1]["code"] == "INVALID_JOB_ID"
    assert query(jobs.dsn, "SELECT count(*) FROM export_jobs") == [(1,)]


async def test_concurrent_re_exports_make_one_job(start: Start, jobs: Jobs) -> None:
    clients = [await start(), await start()]
    package = jobs.add(package_expires_at=LONG_AGO)
    answers = await asyncio.gather(*(again(clients[n % 2], package.job_id) for n in range(10)))
    assert sorted(status for status, _, _ in answers) == [202] + [409] * 9
    assert len({body["jobId"] for _, body, _ in answers}) == 1


@pytest.mark.fresh_database
async def test_an_applications_table_that_refuses_the_row_is_told_so(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(package_expires_at=LONG_AGO)
    query(jobs.dsn, "ALTER TABLE export_jobs ADD tenant text")
    query(jobs.dsn, "ALTER TABLE export_jobs ADD CHECK (tenant IS NOT NULL) NOT VALID")
    status, body, _ = await again(client, package.job_id)
    assert (status, body["code"]) == (501, "RE_EXPORT_UNSUPPORTED")
    assert "tenant" not in str(body)


@pytest.mark.fresh_database
async def test_users_of_a_uuid_column_are_compared_as_uuids(start: Start, jobs: Jobs) -> None:
    user = "ABCDEF01-2345-6789-ABCD-EF0123456789"
    query(jobs.dsn, "ALTER TABLE export_jobs ALTER COLUMN user_id TYPE uuid USING user_id::uuid")
    package = jobs.add(user_id=user)
    client = await start()
    for spelling in (user, user.lower(), user.replace("-", ""), f"{{{user}}}"):
        headers = bearer(spelling)
        async with client.get(package.url, headers=headers) as response:
            assert response.status == 200
            await response.read()
        async with client.get(BASE, headers=headers) as response:
            assert len((await response.json())["jobs"]) == 1
    await until_idle(client)
    assert jobs.counts(package)[0] == 4
    async with client.get(package.url, headers=bearer(user[:-1] + "8")) as response:
        assert response.status == 403


@pytest.mark.fresh_database
async def test_a_job_without_a_user_is_an_admins(start: Start, jobs: Jobs) -> None:
    query(jobs.dsn, "ALTER TABLE export_jobs ALTER COLUMN user_id DROP NOT NULL")
    package = jobs.add(user_id=None)
    client = await start()
    for path in (package.url, package.stats_url, package.url.removesuffix("/download"), BASE):
        async with client.get(path, headers=bearer("root", "admin")) as response:
            assert response.status == 200
        async with client.get(path, headers=ANN) as response:
            assert response.status == (200 if path == BASE else 403)

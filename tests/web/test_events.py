"""A job's state by server-sent events."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
import structlog

from exportd.counting import ledger
from exportd.counting.running import write_running
from exportd.db.pool import Database
from exportd.jobs import hub
from exportd.web.jobs import events
from exportd.web.services import SERVICES
from tests.counting.test_ledger import event
from tests.delivery.test_broken_deliveries import until
from tests.support.application import ANN, BASE, Jobs, Package, Start, bearer, noise, until_idle
from tests.support.postgres import query


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_LOOK_SECONDS", 0.02)
    monkeypatch.setattr(events, "_WAIT_SECONDS", 0.02)


class Stream:
    """A reader."""

    def __init__(self, response: Any) -> None:
        self.response = response
        self.raw = b""

    async def next(self) -> tuple[str, dict[str, Any]]:
        """The next event's id and state."""
        while True:
            async with asyncio.timeout(30):
                block = await self.response.content.readuntil(b"\n\n")
            self.raw += block
            fields = dict(line.split(": ", 1) for line in block.decode().strip().split("\n"))
            if fields.get("event") == "job":
                return fields["id"], json.loads(fields["data"])

    async def ended(self) -> None:
        async with asyncio.timeout(30):
            while await self.response.content.readany():
                pass


@contextlib.asynccontextmanager
async def watching(client: Any, package: Package, headers: dict[str, str] = ANN) -> AsyncIterator[Stream]:
    async with client.get(f"{BASE}/{package.job_id}/events", headers=headers) as response:
        assert response.status == 200
        assert response.headers["Content-Type"] == "text/event-stream"
        assert response.headers["X-Accel-Buffering"] == "no"
        yield Stream(response)


def change(jobs: Jobs, package: Package, assignments: str) -> None:
    query(jobs.dsn, f"UPDATE export_jobs SET {assignments} WHERE job_id = %s", (package.job_id,))


async def test_a_job_is_followed_from_waiting_to_downloaded(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add(
        noise(1000), status="pending", completed_at=None, package_path=None, package_expires_at=None
    )
    async with watching(client, package) as stream:
        assert (await stream.next())[1]["status"] == "pending"
        assert stream.raw.startswith(b"retry: ")
        change(jobs, package, "status = 'processing', pack_percent = 40")
        state = (await stream.next())[1]
        assert (state["status"], state["percent"], state["package"]) == ("processing", 40, None)
        change(
            jobs, package, f"status = 'completed', pack_percent = 100, package_path = '{package.file.name}'"
        )
        state = (await stream.next())[1]
        assert (state["status"], state["package"]["state"], state["downloadCount"]) == (
            "completed",
            "available",
            0,
        )
        async with client.get(package.url, headers=ANN) as response:
            await response.read()
        while not state["downloadCount"] or state["downloads"]:
            state = (await stream.next())[1]
        assert state["downloadCount"] == 1
        query(jobs.dsn, "DELETE FROM export_jobs")
        await stream.ended()
    await until_idle(client)
    assert client.app is not None
    assert not client.app[SERVICES].hub._watches


async def test_the_callers_own_downloads_are_told_as_they_go(
    start: Start, jobs: Jobs, database: Database
) -> None:
    client = await start()
    package = jobs.add(noise(1000))
    running = event(
        UUID(package.job_id),
        outcome="running",
        received=(),
        bytes_acknowledged=0,
        started_at=datetime.now(UTC),
    )
    other = event(
        UUID(package.job_id), outcome="running", received=(), user_id="root", started_at=datetime.now(UTC)
    )
    async with watching(client, package) as stream:
        assert (await stream.next())[1]["downloads"] == []
        await write_running(database, [other, running])
        (download,) = (await stream.next())[1]["downloads"]
        assert (download["downloadId"], download["bytesAcknowledged"]) == (str(running.event_id), 0)
        assert download["bytesRequested"] == 1000
        query(jobs.dsn, "UPDATE exportd_running SET bytes_acknowledged = 700")
        (download,) = (await stream.next())[1]["downloads"]
        assert download["bytesAcknowledged"] == 700


async def test_a_download_is_told_to_the_byte_while_it_runs_and_what_came_of_it(
    start: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger, "_FIRST_CHECKPOINT_SECONDS", 600)
    client = await start()
    package = jobs.add(noise(30_000_000))
    async with watching(client, package) as stream:
        state = (await stream.next())[1]
        assert (state["downloads"], state["bytesReceived"]) == ([], 0)
        async with client.get(package.url, headers={**ANN, "Range": "bytes=0-19999999"}) as response:
            # Before it is written down.
            await response.content.readexactly(1_000_000)
            while not state["downloads"] or state["downloads"][0]["bytesAcknowledged"] < 1_000_000:
                state = (await stream.next())[1]
            assert state["downloads"][0]["bytesRequested"] == 20_000_000
            assert query(jobs.dsn, "SELECT count(*) FROM download_events") == [(0,)]
            await response.read()
        while state["downloads"] or not state["bytesReceived"]:
            state = (await stream.next())[1]
        assert (state["bytesReceived"], state["downloadCount"]) == (20_000_000, 0)
        async with watching(client, package) as other:
            assert (await other.next())[1]["bytesReceived"] == 20_000_000
        async with client.get(package.url, headers={**ANN, "Range": "bytes=20000000-"}) as response:
            await response.read()
        # One that ends while the hub looks may seem to run for a moment longer.
        while not state["downloadCount"] or state["downloads"]:
            state = (await stream.next())[1]
        assert (state["bytesReceived"], state["downloadCount"]) == (0, 1)
    async with watching(client, package, bearer("root", "admin")) as stream:
        assert (await stream.next())[1]["bytesReceived"] == 0


async def test_events_list_the_newest_running_downloads(start: Start, jobs: Jobs, database: Database) -> None:
    client = await start()
    package = jobs.add(noise(1000))
    began = datetime.now(UTC)
    running = [
        event(UUID(package.job_id), outcome="running", received=(), started_at=began + timedelta(seconds=n))
        for n in range(40)
    ]
    await write_running(database, running)
    async with watching(client, package) as stream:
        told = [download["downloadId"] for download in (await stream.next())[1]["downloads"]]
    assert told == [str(item.event_id) for item in running[8:]]


async def test_a_reconnecting_reader_gets_no_known_event_again(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    async with watching(client, package) as stream:
        known, _ = await stream.next()
    async with watching(client, package, ANN | {"Last-Event-ID": known}) as stream:
        change(jobs, package, "failure_reason = 'changed'")
        state_id, state = await stream.next()
        assert state["failureReason"] == "changed"
        assert state_id != known
    async with watching(client, package, ANN | {"Last-Event-ID": "from another time"}) as stream:
        assert (await stream.next())[0] == state_id


async def test_a_quiet_stream_shows_that_it_lives(
    start: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_HEARTBEAT_SECONDS", 0.05)
    client = await start()
    async with watching(client, jobs.add()) as stream, asyncio.timeout(30):
        await stream.next()
        for _ in range(3):
            assert await stream.response.content.readuntil(b"\n\n") == b": still here\n\n"


async def test_a_drain_ends_the_stream(start: Start, jobs: Jobs) -> None:
    client = await start()
    assert client.app is not None
    async with watching(client, jobs.add()) as stream:
        await stream.next()
        client.app[SERVICES].lifecycle.is_draining = True
        await stream.ended()
    await until_idle(client)


async def test_the_stream_ends_with_its_token(
    start: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()
    async with watching(client, jobs.add(), bearer("ann", ttl_seconds=3600)) as stream:
        await stream.next()
        later = time.time() + 3601
        monkeypatch.setattr("exportd.web.jobs.events.time.time", lambda: later)
        await stream.ended()


async def test_a_reader_who_leaves_is_forgotten(start: Start, jobs: Jobs) -> None:
    client = await start()
    assert client.app is not None
    package = jobs.add()
    async with watching(client, package) as stream:
        await stream.next()
        stream.response.close()
    await until_idle(client)
    assert not client.app[SERVICES].hub._watches


async def test_a_reader_who_takes_nothing_is_dropped(
    start: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "_PATIENCE_SECONDS", 0.1)
    client = await start()
    assert client.app is not None
    package = jobs.add(status="failed", package_path=None)
    reader, writer = await asyncio.open_connection("127.0.0.1", client.port, limit=1024)
    fields = f"Host: x\r\nAuthorization: {ANN['Authorization']}\r\n\r\n"
    writer.write(f"GET {BASE}/{package.job_id}/events HTTP/1.1\r\n{fields}".encode())
    await reader.readline()
    for number in range(200):
        if not client.app[SERVICES].hub._watches and number:
            break
        # A state of a megabyte, and another one.
        change(jobs, package, f"failure_reason = repeat('{number % 10}', 1000000)")
        await asyncio.sleep(0.05)
    await until_idle(client)
    assert not client.app[SERVICES].hub._watches
    writer.close()


async def test_one_poll_serves_all_readers_and_stops_without_readers(
    start: Start, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[list[UUID]] = []
    find = hub.find_details_in_progress

    async def counting(database: Database, job_ids: list[UUID]) -> Any:
        looks.append(job_ids)
        return await find(database, job_ids)

    client = await start()
    await asyncio.sleep(0.1)
    package = jobs.add()
    async with contextlib.AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(watching(client, package)) for _ in range(20)]
        for stream in streams:
            await stream.next()
        monkeypatch.setattr(hub, "find_details_in_progress", counting)
        change(jobs, package, "failure_reason = 'x'")
        for stream in streams:
            assert (await stream.next())[1]["failureReason"] == "x"
    assert all(look == [UUID(package.job_id)] for look in looks)
    assert len(looks) < 20
    await until_idle(client)
    await asyncio.sleep(0.1)
    before = len(looks)
    await asyncio.sleep(0.2)
    assert len(looks) == before


async def test_the_stream_outlives_a_database_that_is_away(start: Start, jobs: Jobs) -> None:
    client = await start()
    package = jobs.add()
    with structlog.testing.capture_logs() as logs:
        async with watching(client, package) as stream:
            await stream.next()
            query(jobs.dsn, "ALTER TABLE export_jobs RENAME TO elsewhere")
            await until(
                "a look that fails", lambda: any(line["event"] == "job_events_delayed" for line in logs)
            )
            query(jobs.dsn, "ALTER TABLE elsewhere RENAME TO export_jobs")
            change(jobs, package, "failure_reason = 'back'")
            assert (await stream.next())[1]["failureReason"] == "back"

"""Readiness: what probes cost, and what they tell when something hangs."""

import asyncio
import threading
from typing import Any

import pytest
from aiohttp.test_utils import TestClient

from exportd.db.pool import Database
from exportd.storage.files import PackageStore
from exportd.web.ops import probes
from exportd.web.services import SERVICES
from tests.support.application import Start

Client = TestClient[Any, Any]


async def probe(client: Client) -> tuple[int, Any]:
    async with client.get("/readyz") as response:
        return response.status, await response.json()


async def test_many_probes_are_one_look(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    client = await start()
    looks: list[str] = []
    is_ready, fetch_one = PackageStore.is_ready, Database.fetch_one

    def count_storage(store: PackageStore) -> bool:
        looks.append("storage")
        return is_ready(store)

    async def count_database(database: Database, statement: str, *parameters: Any) -> Any:
        if statement == "SELECT 1":
            looks.append(statement)
        return await fetch_one(database, statement, *parameters)

    monkeypatch.setattr(PackageStore, "is_ready", count_storage)
    monkeypatch.setattr(Database, "fetch_one", count_database)
    monkeypatch.setattr(probes, "_REMEMBERED_SECONDS", 3600.0)
    answers = await asyncio.gather(*(probe(client) for _ in range(50)))
    assert {status for status, _ in answers} == {200}
    assert sorted(looks) == ["SELECT 1", "storage"]


async def test_a_storage_that_hangs_holds_one_thread_and_is_told(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()
    may_answer = threading.Event()
    calls: list[int] = []

    def hang(_: PackageStore) -> bool:
        calls.append(threading.get_ident())
        return may_answer.wait(60)

    monkeypatch.setattr(PackageStore, "is_ready", hang)
    monkeypatch.setattr(probes, "_STORAGE_TIMEOUT_SECONDS", 0.02)
    monkeypatch.setattr(probes, "_REMEMBERED_SECONDS", 0.0)
    try:
        for _ in range(5):
            status, answer = await probe(client)
            assert (status, answer["storage"], answer["database"]) == (503, "unavailable", "ok")
        assert len(calls) == 1
    finally:
        may_answer.set()
    monkeypatch.setattr(probes, "_STORAGE_TIMEOUT_SECONDS", 60.0)
    assert (await probe(client))[0] == 200


async def test_a_prober_that_leaves_does_not_take_the_answer_from_others(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await start()
    readiness = client.app[SERVICES].readiness
    first = asyncio.create_task(readiness.look())
    await asyncio.sleep(0)
    first.cancel()
    assert set((await readiness.look()).values()) == {"ok"}

"""The application in this process, over a real database and storage, by each way of delivery."""

import hashlib
import random
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import uvloop
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from exportd.app import make_app
from exportd.auth.tokens import Claims, Tokens
from exportd.settings import Settings
from exportd.web.services import SERVICES
from tests.support.postgres import migrated_database, query

SECRET = "a secret for the tests, 32 bytes long"
BASE = "/api/tool-registry/export-jobs"


def bearer(user_id: str, role: str | None = None, ttl_seconds: int = 86_400) -> dict[str, str]:
    tokens = Tokens(Claims(), ["HS256"], secret=SECRET)
    return {"Authorization": f"Bearer {tokens.sign(user_id, role, ttl_seconds)}"}


ANN, EVE, ADMIN = bearer("ann"), bearer("eve"), bearer("root", "admin")


@dataclass
class Package:
    """A job in the database, its file in the storage, and where to download it."""

    job_id: str
    content: bytes
    file: Path
    url: str
    stats_url: str


class Jobs:
    """Makes jobs."""

    def __init__(self, dsn: str, storage: Path) -> None:
        self.dsn = dsn
        self.storage = storage

    def add(self, content: bytes = b"a package", /, **columns: object) -> Package:
        """A completed job of ann's that expires in a month; ``columns`` replace what its row says."""
        job_id = str(uuid.uuid4())
        file = self.storage / f"{job_id}.tar.gz"
        file.write_bytes(content)
        row: dict[str, object] = {
            "job_id": job_id,
            "user_id": "ann",
            "status": "completed",
            "tool_data": '{"name": "Customer Form"}',
            "completed_at": datetime.fromisoformat("2025-10-24T12:00:00.9+00:00"),
            "package_path": file.name,
            "package_size_bytes": len(content),
            "package_sha256": hashlib.sha256(content).hexdigest(),
            "package_expires_at": datetime.now().astimezone() + timedelta(days=30),
            **columns,
        }
        if row["package_expires_at"] is None:
            row.setdefault("package_retention_days", None)
        names = ", ".join(row)
        query(
            self.dsn,
            f"INSERT INTO export_jobs ({names}) VALUES ({', '.join(['%s'] * len(row))})",
            tuple(row.values()),
        )
        url = f"{BASE}/{row['job_id']}/download"
        return Package(job_id, content, file, url, f"{url}-stats")

    def counts(self, package: Package) -> tuple[int, int]:
        """download_count and bytes_served of the job's row."""
        ((count, served),) = query(
            self.dsn,
            "SELECT download_count, bytes_served FROM export_jobs WHERE job_id = %s",
            (package.job_id,),
        )
        return count, served


@pytest.fixture
def jobs(dsn: str, storage: Path) -> Jobs:
    return Jobs(dsn, storage)


@pytest.fixture(params=["sendfile", "chunks"])
def sender(request: pytest.FixtureRequest) -> str:
    """The way of delivery. A test that takes it runs by each way, and so does its ``client``."""
    name: str = request.param
    return name


def make_test_app(dsn: str, storage: Path, **sections: dict[str, object]) -> web.Application:
    """The application; ``sections`` change its settings."""
    document = {
        "data_dir": str(storage.parent),
        "storage": {"root": str(storage)},
        "auth": {"secret": SECRET},
        **sections,
    }
    return make_app(Settings.model_validate(document, strict=False), dsn)


def skip_missed_cleanup(dsn: str) -> None:
    """Otherwise the application starts with a cleanup, which logs and locks beside the test."""
    query(dsn, "INSERT INTO exportd_cleanup_runs SELECT gen_random_uuid(), now(), now(), 0, 0, 0, 0, 0")


def ask_once(
    server_dsn: str, folder: Path, ask: Callable[[TestClient[Any, Any], Jobs], Awaitable[str]]
) -> str:
    """What ``ask`` returns of an application of its own: a text that a fixture reads once for many tests."""

    async def run(dsn: str) -> str:
        async with TestClient(TestServer(make_test_app(dsn, folder))) as client:
            return await ask(client, Jobs(dsn, folder))

    with migrated_database(server_dsn) as dsn:
        skip_missed_cleanup(dsn)
        return uvloop.run(run(dsn))


Start = Callable[..., Awaitable[TestClient[Any, Any]]]


@pytest.fixture
async def start(
    dsn: str, storage: Path, aiohttp_client: Callable[..., Awaitable[TestClient[Any, Any]]]
) -> Start:
    """Starts the application; ``sections`` change its settings. It ends before its database is emptied."""

    async def start(**sections: dict[str, object]) -> TestClient[Any, Any]:
        if "retention" not in sections:
            skip_missed_cleanup(dsn)
        client = await aiohttp_client(make_test_app(dsn, storage, **sections), auto_decompress=False)
        # aiohttp's test server cancels a handler whose client leaves; the real one does not.
        client.server.handler.handler_cancellation = False
        return client

    return start


@pytest.fixture
async def client(request: pytest.FixtureRequest, start: Start) -> TestClient[Any, Any]:
    """Of an application that sends by sendfile, unless the test takes ``sender``."""
    by_chunks = "sender" in request.fixturenames and request.getfixturevalue("sender") == "chunks"
    return await start(download={"sendfile": not by_chunks})


def noise(size: int) -> bytes:
    return random.Random(size).randbytes(size)


async def until_idle(client: TestClient[Any, Any]) -> None:
    """Waits until every request has ended: its delivery acknowledged, recorded and logged."""
    assert client.app is not None
    assert await client.app[SERVICES].lifecycle.wait_until_idle(30)
